"""Arrow record batches of a DataFrame -> blocks: what a Spark map task runs under `mapInArrow`. No loop over rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as types

from allreduce_spark.data.blocks import BLOCK_BYTES, BlockDealer, merge_batches, schema_of
from allreduce_spark.data.spec import STRING, LeafSpec, NestSpec, RowSpec, Structure
from allreduce_spark.data.values import fixed_size_lists
from allreduce_spark.errors import DataError

__all__ = ["check_columns", "table_to_blocks"]


def table_to_blocks(
    batches: Iterable[pa.RecordBatch],
    *,
    features: Sequence[str],
    label: Sequence[str] | None,
    weight: str | None,
    partition: int,
    role: str,
    num_shards: int,
    block_bytes: int = BLOCK_BYTES,
) -> Iterator[tuple[int, bytes]]:
    """Turn the record batches of one partition into blocks for the shards.

    Args:
        batches: The rows of the partition; all batches have the same schema.
        features: Columns of x: the array itself for one column, a dict {column: array} for several.
        label: Columns of y, likewise; None or empty where there is no label.
        weight: The column of sample weights, or None.
        partition: Index of the partition among all partitions of this role.
        role: "train" or "validation".
        num_shards: How many shards there are, one per rank.
        block_bytes: How large a block should be.

    Yields:
        (shard, block): every row in exactly one block, dealt out as `BlockDealer` says. If a column cannot be trained
        on, the last block is an error block and no more batches are read. What `batches` raises passes through.
    """
    dealer = BlockDealer(partition=partition, role=role, num_shards=num_shards, block_bytes=block_bytes)
    reader = _TableReader(features, label or (), weight)
    waiting: list[pa.RecordBatch] = []
    waiting_bytes = 0
    for batch in batches:
        try:
            columns = reader.read(batch)
        except _RowError as error:
            yield dealer.refuse(str(error), error.row)
            return
        except DataError as error:
            yield dealer.refuse(str(error), None)
            return
        for piece in _pieces(columns, dealer.buffer_bytes):
            waiting.append(piece)
            waiting_bytes += piece.nbytes
            if waiting_bytes >= dealer.buffer_bytes:
                yield from dealer.deal(merge_batches(waiting), reader.spec)
                waiting, waiting_bytes = [], 0
    if waiting:
        yield from dealer.deal(merge_batches(waiting), reader.spec)


def check_columns(
    schema: pa.Schema, *, features: Sequence[str], label: Sequence[str] | None, weight: str | None
) -> None:
    """Refuse columns that can be seen to be unfit from their types alone: on the driver, before any task starts.

    Raises:
        DataError: A column is missing or named twice, or its type cannot be trained on.
    """
    if not features:
        raise DataError("no feature column is named: name at least one")
    for name in (*features, *(label or ()), *([weight] if weight else ())):
        if schema.names.count(name) != 1:
            problem = "there is no column" if name not in schema.names else "there are several columns"
            raise DataError(f"{problem} {name!r}; the columns are {schema.names}")
        _check_type(schema.field(name).type, name, allow_strings=name in features)
        if name in features and name in (label or ()):
            _check_type(schema.field(name).type, name, allow_strings=False)
    for names in (features, label or ()):
        twice = next((name for name in names if list(names).count(name) > 1), None)
        if twice is not None:
            raise DataError(f"the column {twice!r} is named twice in {list(names)}")


class _RowError(DataError):
    """A row of a batch cannot be trained on. Never leaves this module."""

    def __init__(self, message: str, row: int) -> None:
        super().__init__(message)
        self.row = row


class _TableReader:
    """Reads batch after batch into the columns of a spec, which the first batch with rows defines."""

    def __init__(self, features: Sequence[str], label: Sequence[str], weight: str | None) -> None:
        self._features, self._label, self._weight = tuple(features), tuple(label), weight
        self._columns = (*sorted(features), *sorted(label), *([weight] if weight else ()))
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._spec: RowSpec | None = None
        self._rows = 0

    @property
    def spec(self) -> RowSpec:
        assert self._spec is not None  # for mypy: asked for only after a batch with rows
        return self._spec

    def read(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        if self._rows == 0:
            check_columns(batch.schema, features=self._features, label=self._label, weight=self._weight)
        if batch.num_rows == 0:
            return batch
        flat = {name: self._flat_column(batch, name) for name in self._columns}
        if self._spec is None:
            dtypes = {name: _dtype_name(batch.schema.field(name).type) for name in self._columns}
            self._spec = self._make_spec(dtypes)
        self._rows += batch.num_rows
        leaves = self._spec.leaves
        arrays = [
            fixed_size_lists(flat[name], batch.num_rows, leaf) for name, leaf in zip(self._columns, leaves, strict=True)
        ]
        return pa.RecordBatch.from_arrays(arrays, schema=schema_of(self._spec))

    def _flat_column(self, batch: pa.RecordBatch, name: str) -> pa.Array:
        """The numbers or strings of a column without their lists; all lists of one depth must be of one length."""
        array = batch.column(name)
        expected = self._shapes.get(name)
        shape: tuple[int, ...] = ()
        while True:
            if types.is_dictionary(array.type):
                array = array.dictionary_decode()
            per_row = max(1, int(np.prod(shape, dtype=np.int64)))
            if array.null_count:
                row = self._rows + int(np.argmax(array.is_null().to_numpy(zero_copy_only=False))) // per_row
                within = " inside a list" if shape else ""
                raise _RowError(f"column {name!r} has a null{within}; drop such rows or fill in a value first", row)
            if not _is_list(array.type):
                break
            lengths = pc.list_value_length(array).to_numpy()
            usual = expected[len(shape)] if expected is not None else int(lengths[0]) if len(lengths) else 0
            wrong = np.flatnonzero(lengths != usual)
            if len(wrong):
                raise _RowError(
                    f"column {name!r} has a list of length {lengths[wrong[0]]}, but of length {usual} in row 0; "
                    "all rows need the same length: pad or cut them first",
                    self._rows + int(wrong[0]) // per_row,
                )
            shape += (usual,)
            array = array.flatten()
        self._shapes[name] = shape
        return _plain(array)

    def _make_spec(self, dtypes: dict[str, str]) -> RowSpec:
        def part(root: str, names: Sequence[str]) -> Structure:
            if len(names) == 1:
                return LeafSpec(root, dtypes[names[0]], self._shapes[names[0]])
            keys = tuple(sorted(names))
            leaves = tuple(LeafSpec(f"{root}[{key!r}]", dtypes[key], self._shapes[key]) for key in keys)
            return NestSpec(root, "dict", keys, leaves)

        return RowSpec(
            part("x", self._features),
            part("y", self._label) if self._label else None,
            part("sample_weight", [self._weight]) if self._weight else None,
        )


def _is_list(kind: pa.DataType) -> bool:
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _is_string(kind: pa.DataType) -> bool:
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _value_type(kind: pa.DataType) -> pa.DataType:
    """The type of the values inside all lists; a dictionary of plain values counts as its values."""
    while _is_list(kind):
        kind = kind.value_type
    return kind.value_type if types.is_dictionary(kind) and not _is_list(kind.value_type) else kind


def _dtype_name(kind: pa.DataType) -> str:
    kind = _value_type(kind)
    return STRING if _is_string(kind) else np.dtype(kind.to_pandas_dtype()).name


def _plain(array: pa.Array) -> pa.Array:
    """Values as `values.to_arrow` stores them: bool as uint8, strings with 64-bit offsets."""
    if types.is_boolean(array.type):
        return array.cast(pa.uint8())
    return array.cast(pa.large_string()) if _is_string(array.type) else array


def _check_type(kind: pa.DataType, name: str, *, allow_strings: bool) -> None:
    value = _value_type(kind)
    if types.is_boolean(value) or types.is_integer(value) or types.is_floating(value):
        return
    if _is_string(value):
        if allow_strings:
            return
        raise DataError(
            f"column {name!r} is a string; labels and weights must be numbers: encode them first, "
            "e.g. with StringIndexer"
        )
    raise DataError(f"column {name!r} is of type {kind}, which cannot be trained on; {_hint(value)}")


def _hint(kind: pa.DataType) -> str:
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind):
        return "decode the bytes (an image, for example) into an array of numbers first"
    if types.is_struct(kind):
        return "if it is a Spark ML vector, turn it into an array with pyspark.ml.functions.vector_to_array first"
    if types.is_decimal(kind):
        return "cast it to double first"
    if types.is_temporal(kind):
        return "turn dates and times into numbers first, for example with unix_timestamp"
    return "expected numbers, bool, strings, or (nested) arrays of one of them"


def _pieces(batch: pa.RecordBatch, limit_bytes: int) -> Iterator[Any]:
    """Cut a large batch, so that its blocks do not become larger than they should."""
    step = max(1, batch.num_rows * limit_bytes // max(1, batch.nbytes))
    for start in range(0, batch.num_rows, step):
        yield batch.slice(start, step)
