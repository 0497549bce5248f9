"""One rank's rows: `Shard` maps the file that a `ShardWriter` spooled, and takes any rows from it for a batch.

Nothing is read into memory ahead: the pages of a mapped file belong to the page cache, so a shard can be larger than
memory, and a rank that is started again finds its rows where they were.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from allreduce_spark.data.blocks import schema_of
from allreduce_spark.data.spec import STRING, LeafSpec, RowSpec, common_spec
from allreduce_spark.data.spool import BLOCKS_KEY, SPEC_KEY, read_chunks
from allreduce_spark.data.values import cast, to_numpy
from allreduce_spark.errors import DataError

__all__ = ["Shard"]

Where = slice | np.ndarray


class Shard:
    """The rows of one rank and one role.

    Rows are numbered from 0 in the order of their partitions, and within a partition in the order they had there.
    Keep the shard open for as long as rows are taken; the arrays that `take` returns are copies and outlive it.

    Attributes:
        spec: What the rows look like; None for an empty shard that was opened without one.
    """

    def __init__(self, chunks: list[tuple[pa.RecordBatch, Any]], stored: RowSpec | None, spec: RowSpec | None) -> None:
        """Use `Shard.open`."""
        self.spec = spec
        self._widens = stored is not None and stored != spec
        self._columns = [
            [_column(batch.column(index), leaf) for batch, _ in chunks]
            for index, leaf in enumerate(stored.leaves if stored else ())
        ]
        self._chunk_starts = np.cumsum([0, *(batch.num_rows for batch, _ in chunks)], dtype=np.int64)
        self._order = _Order([block for batch, metadata in chunks for block in _blocks_in(batch, metadata)])

    @classmethod
    def open(cls, path: str | os.PathLike[str], spec: RowSpec | None = None) -> Shard:
        """Map a shard file.

        Args:
            path: What a `ShardWriter` wrote.
            spec: The spec that all ranks agreed on (see `common_spec`). An empty shard takes it as its own; where it
                has float64 and the file int64, `take` converts. None means the file's own.

        Raises:
            DataError: The file is cut off or is no shard, or its rows do not fit `spec`.
            FileNotFoundError: There is no file.
        """
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            text = (reader.schema.metadata or {})[SPEC_KEY].decode()
            stored = RowSpec.from_json(text) if text else None
            if stored is not None and reader.schema.remove_metadata() != schema_of(stored):
                raise ValueError(f"its columns are {reader.schema.names}, which do not fit its spec")
            if stored is not None and spec is not None and common_spec(stored, spec, _NAMES) != spec:
                raise ValueError("it has float64 where the other ranks have int64")
            return cls(list(read_chunks(reader)), stored, spec or stored)
        except (DataError, FileNotFoundError, MemoryError):
            raise
        except (pa.ArrowException, OSError, KeyError, ValueError, TypeError) as error:
            raise DataError(
                f"{path} is no complete shard file: {error!r}. Was its writer stopped before its end?"
            ) from error

    def __len__(self) -> int:
        return int(self._chunk_starts[-1])

    def __enter__(self) -> Shard:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file. The shard is empty from then on."""
        self._columns, self._chunk_starts = [], np.zeros(1, np.int64)

    def take(self, indices: Any) -> tuple[Any, Any, Any]:
        """Copy rows out of the shard.

        Args:
            indices: Numbers of rows, shape (n,), any integer dtype, in any order, repeated or not. Consecutive numbers
                are copied as a whole.

        Returns:
            (x, y, sample_weight) in the structure of the spec, y and sample_weight None where the rows have none. The
            arrays have shape (n, *row shape), strings have dtype object, and all are the caller's to change.

        Raises:
            IndexError: A number is negative or not below `len(self)`.
            DataError: The shard is empty and was opened without a spec.
        """
        numbers = _checked(indices, len(self))
        if self.spec is None:
            raise DataError(
                "this shard is empty and Shard.open got no spec: what its rows would look like is not known"
            )
        if len(numbers) == 0:
            return self.spec.zeros(0)
        arrays = self._gather(self._order.rows(numbers))
        if self._widens:
            pairs = zip(arrays, self.spec.leaves, strict=True)
            arrays = [cast(array, leaf.numpy_dtype, leaf.name) for array, leaf in pairs]
        return self.spec.pack(arrays)

    def _gather(self, rows: np.ndarray) -> list[np.ndarray]:
        """The rows at these places of the file, one array of shape (n, ...) per leaf."""
        pieces = list(self._pieces(rows))
        if len(pieces) == 1:
            ((chunk, _, within),) = pieces
            arrays = [_read(column[chunk], within) for column in self._columns]
            return [array.copy() for array in arrays] if isinstance(within, slice) else arrays
        arrays = []
        for column in self._columns:
            array = np.empty((len(rows), *column[0].shape[1:]), column[0].dtype)
            for chunk, places, within in pieces:
                array[places] = _read(column[chunk], within)
            arrays.append(array)
        return arrays

    def _pieces(self, rows: np.ndarray) -> Iterator[tuple[int, Where, Where]]:
        """Group rows by chunk: (chunk, their places in `rows`, their places in the chunk)."""
        starts = self._chunk_starts
        if len(starts) == 2:
            yield 0, slice(0, len(rows)), _as_slice(rows)
            return
        chunk_of = np.searchsorted(starts, rows, side="right") - 1
        places = np.argsort(chunk_of, kind="stable")
        within = (rows - starts[chunk_of])[places]
        cuts = (np.flatnonzero(np.diff(chunk_of[places])) + 1).tolist()
        chunks = chunk_of[places[[0, *cuts]]].tolist()
        for chunk, start, end in zip(chunks, [0, *cuts], [*cuts, len(rows)], strict=True):
            yield chunk, _as_slice(places[start:end]), _as_slice(within[start:end])


class _Order:
    """Where in the file the rows are that a shard numbers by the (partition, sequence) of their blocks."""

    def __init__(self, blocks: list[tuple[int, int, int]]) -> None:
        """Args: blocks: (partition, sequence, rows) of each block, as they lie in the file."""
        table = np.array(blocks, np.int64).reshape(-1, 3)
        order = np.lexsort((table[:, 1], table[:, 0]))
        partition, sequence, rows = table[order].T
        twice = np.flatnonzero((np.diff(partition) == 0) & (np.diff(sequence) == 0))
        if len(twice):
            place = f"partition {partition[twice[0]]}, sequence {sequence[twice[0]]}"
            raise DataError(f"the block of {place} is in the shard twice; its rows would count double")
        self._as_they_lie = bool(np.all(np.diff(order) == 1))
        self._starts = np.cumsum(rows) - rows
        self._shifts = (np.cumsum(table[:, 2]) - table[:, 2])[order] - self._starts

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        if self._as_they_lie:
            return numbers
        return numbers + self._shifts[np.searchsorted(self._starts, numbers, side="right") - 1]


class _StringColumn:
    """Strings of one chunk, read like a numpy array of shape (rows, *row shape) and dtype object."""

    dtype = np.dtype(object)

    def __init__(self, array: pa.Array, leaf: LeafSpec) -> None:
        self.shape = (len(array), *leaf.shape)
        self._leaf = leaf
        self._flat = array if leaf.shape == () else array.flatten()

    def __getitem__(self, where: slice) -> np.ndarray:
        return self.take(np.arange(where.start, where.stop))

    def take(self, rows: np.ndarray, axis: int = 0) -> np.ndarray:
        width = self._leaf.values_per_row
        flat = (rows[:, np.newaxis] * width + np.arange(width)).reshape(-1)
        values = self._flat.take(pa.array(flat)).to_numpy(zero_copy_only=False)
        return values.reshape(len(rows), *self._leaf.shape)


_NAMES = ("this shard", "the other ranks")


def _column(array: pa.Array, leaf: LeafSpec) -> Any:
    return _StringColumn(array, leaf) if leaf.dtype == STRING else to_numpy(array, leaf)


def _blocks_in(batch: pa.RecordBatch, metadata: Any) -> list[tuple[int, int, int]]:
    blocks = [(partition, sequence, rows) for partition, sequence, rows in json.loads(metadata[BLOCKS_KEY])]
    if sum(rows for _, _, rows in blocks) != batch.num_rows:
        raise ValueError(f"a chunk has {batch.num_rows} rows, but its blocks have {sum(rows for _, _, rows in blocks)}")
    return blocks


def _checked(indices: Any, length: int) -> np.ndarray:
    numbers = np.asarray(indices)
    if numbers.ndim != 1 or (numbers.dtype.kind not in "iu" and len(numbers)):
        raise IndexError(f"expected a vector of integers, got {numbers.dtype} of shape {numbers.shape}")
    numbers = numbers.astype(np.int64, copy=False)  # small integers would overflow in the arithmetic to come
    if len(numbers) and (numbers.min() < 0 or numbers.max() >= length):
        raise IndexError(f"rows {numbers.min()} to {numbers.max()} were asked for, but the shard has {length} rows")
    return numbers


def _as_slice(numbers: np.ndarray) -> Where:
    """A slice where the numbers are consecutive, for that is one copy of memory."""
    first, last = int(numbers[0]), int(numbers[-1])
    if last - first == len(numbers) - 1 and (last <= first + 1 or bool(np.all(np.diff(numbers) == 1))):
        return slice(first, last + 1)
    return numbers


def _read(column: Any, where: Where) -> Any:
    return column[where] if isinstance(where, slice) else column.take(where, axis=0)
