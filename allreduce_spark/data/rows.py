"""Rows of an RDD -> blocks: what a Spark map task runs over tuples (x, y) or (x, y, sample_weight)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from allreduce_spark.data.blocks import BLOCK_BYTES, BlockDealer, ErrorBlock, batch_of, encode_error
from allreduce_spark.data.spec import STRING, LeafSpec, RowSpec, describe, flatten
from allreduce_spark.data.values import as_array, cast, check_label, leaf_of
from allreduce_spark.errors import DataError

__all__ = ["rows_to_blocks", "spec_of_row"]


def rows_to_blocks(
    rows: Iterable[Any], *, partition: int, role: str, num_shards: int, block_bytes: int = BLOCK_BYTES
) -> Iterator[tuple[int, bytes]]:
    """Turn the rows of one partition into blocks for the shards.

    The first row says what the rows of the partition look like; every later row must have the same structure and
    shapes. Its numbers take the dtype of the first row if nothing is lost by it. If the first row has Python integers
    where a later one has floats, the whole place becomes float64 from there on (blocks sent before are int64, and
    `ShardWriter` brings them together).

    Args:
        rows: Tuples or lists (x, y) or (x, y, sample_weight); (x,) where there are no labels. Read once, one by one.
        partition: Index of the partition among all partitions of this role.
        role: "train" or "validation".
        num_shards: How many shards there are, one per rank.
        block_bytes: How large a block should be; rows are never split, and a partition's last blocks are smaller.

    Yields:
        (shard, block): every row in exactly one block, dealt out as `BlockDealer` says. If a row cannot be trained on,
        the last block is an error block and no more rows are read. A `DataError` that `rows` itself raises becomes an
        error block as it is; what else it raises passes through.
    """
    dealer = BlockDealer(partition=partition, role=role, num_shards=num_shards, block_bytes=block_bytes)
    buffer: RowBuffer | None = None
    refused: list[DataError] = []
    for number, row in enumerate(_until_refused(rows, refused)):
        try:
            if buffer is None:
                buffer = RowBuffer(spec_of_row(row), dealer.buffer_bytes)
            buffer.append(row)
        except DataError as error:
            yield dealer.refuse(str(error), number)
            return
        if buffer.is_full:
            yield from dealer.deal(*buffer.drain())
    if refused:
        message = str(refused[0])
        yield partition % num_shards, encode_error(ErrorBlock(message, role, partition, row=None))
    elif buffer is not None and len(buffer):
        yield from dealer.deal(*buffer.drain())


def _until_refused(rows: Iterable[Any], refused: list[DataError]) -> Iterator[Any]:
    """The rows up to one that their own source refuses, such as the functions of `spark.adapters`."""
    try:
        yield from rows
    except DataError as error:
        refused.append(error)


def spec_of_row(row: Any) -> RowSpec:
    """What a row looks like. Python's int is int64, float is float64, bool is bool.

    Raises:
        DataError: It is no tuple of one to three, or something in it cannot be trained on.
    """
    named = zip(("x", "y", "sample_weight"), _parts(row), strict=False)
    return RowSpec(*(describe(part, name, _leaf_of_value) for name, part in named))


def _leaf_of_value(value: Any, name: str) -> LeafSpec:
    array = as_array(value, name)
    leaf = leaf_of(array, name, array.shape)
    check_label(leaf)
    return leaf


def _parts(row: Any) -> Any:
    if not isinstance(row, (tuple, list)) or len(row) not in (1, 2, 3):
        length = f" of length {len(row)}" if isinstance(row, (tuple, list)) else ""
        raise DataError(f"the row is a {type(row).__name__}{length}; expected a tuple (x, y) or (x, y, sample_weight)")
    return row


class RowBuffer:
    """Rows on their way into columns: as many as fit into `buffer_bytes`, and at least one."""

    def __init__(self, spec: RowSpec, buffer_bytes: int) -> None:
        self._spec = spec
        self._rows = 0
        self._limit = buffer_bytes
        self._capacity = max(1, buffer_bytes // max(1, spec.row_bytes))
        self._columns: list[_Numbers | _Strings] = [
            _Strings(leaf) if leaf.dtype == STRING else _Numbers(leaf, self._capacity) for leaf in spec.leaves
        ]

    def __len__(self) -> int:
        return self._rows

    @property
    def is_full(self) -> bool:
        text_bytes = sum(column.text_bytes for column in self._columns)
        return self._rows >= self._capacity or text_bytes >= self._limit

    def append(self, row: Any) -> None:
        """Add a row.

        Raises:
            DataError: It differs from the first row, or cannot be trained on.
        """
        parts = _parts(row)
        structures = [part for part in (self._spec.x, self._spec.y, self._spec.sample_weight) if part is not None]
        if len(parts) != len(structures):
            raise DataError(
                f"the row has {len(parts)} parts, but the first row has {len(structures)}: (x, y[, sample_weight])"
            )
        values = (value for spec, part in zip(structures, parts, strict=True) for value in flatten(spec, part))
        for column, value in zip(self._columns, values, strict=True):
            column.put(self._rows, value)
        self._rows += 1

    def drain(self) -> tuple[pa.RecordBatch, RowSpec]:
        """The rows so far and what they look like. The batch is valid until the next `append`."""
        spec = self._spec.with_dtypes([column.dtype_name for column in self._columns])
        batch = batch_of(spec, [column.drain(self._rows) for column in self._columns])
        self._rows = 0
        return batch, spec


class _Numbers:
    """A numeric column in memory that is filled again and again."""

    text_bytes = 0

    def __init__(self, leaf: LeafSpec, capacity: int) -> None:
        self._leaf = leaf
        self._values = np.empty((capacity, *leaf.shape), leaf.numpy_dtype)

    @property
    def dtype_name(self) -> str:
        return self._values.dtype.name

    def put(self, position: int, value: Any) -> None:
        array = as_array(value, self._leaf.name)
        if array.shape != self._leaf.shape:
            raise _shape_error(self._leaf, array)
        if array.dtype != self._values.dtype:
            weak = isinstance(value, (int, float, list, tuple)) and not isinstance(value, np.generic)
            array = self._fit(array, position, weak=weak)
        self._values[position] = array

    def drain(self, rows: int) -> np.ndarray:
        return self._values[:rows]

    def _fit(self, array: np.ndarray, position: int, *, weak: bool) -> np.ndarray:
        if array.dtype.kind == "O":
            raise DataError(f"{self._leaf.name} is a string, but {self._leaf} in the first row")
        if self._values.dtype == np.int64 and array.dtype.kind == "f":
            # The rows so far happened to hold whole numbers: cutting off the fraction would train on other data.
            wider = np.empty(self._values.shape, np.float64)
            wider[:position] = cast(self._values[:position], wider.dtype, self._leaf.name)
            self._values = wider
        return cast(array, self._values.dtype, self._leaf.name, weak=weak)


class _Strings:
    """A column of strings; how large they are shows only as they come."""

    dtype_name = STRING

    def __init__(self, leaf: LeafSpec) -> None:
        self._leaf = leaf
        self._rows: list[np.ndarray] = []
        self.text_bytes = 0

    def put(self, position: int, value: Any) -> None:
        array = as_array(value, self._leaf.name)
        if array.dtype.kind != "O":
            raise DataError(f"{self._leaf.name} is {array.dtype}, but {self._leaf} in the first row")
        if array.shape != self._leaf.shape:
            raise _shape_error(self._leaf, array)
        self._rows.append(array)
        self.text_bytes += sum(map(len, array.flat))

    def drain(self, rows: int) -> np.ndarray:
        column = np.empty((rows, *self._leaf.shape), object)
        for position, array in enumerate(self._rows):
            column[position] = array[()]  # the string itself where the array is a scalar
        self._rows, self.text_bytes = [], 0
        return column


def _shape_error(leaf: LeafSpec, array: np.ndarray) -> DataError:
    return DataError(
        f"{leaf.name} has shape {array.shape}, but shape {leaf.shape} in the first row; "
        "all rows need the same shapes: pad or resize them first"
    )
