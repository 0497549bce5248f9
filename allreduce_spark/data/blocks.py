"""A block: some MB of rows as columns, in bytes that travel through Spark's shuffle to the rank that owns the rows.

A block is an Arrow IPC stream of one record batch with one column per array of a row (see `values.to_arrow`); the
metadata of its schema says the role, the partition it comes from, its place in that partition, and the `RowSpec`. An
error block carries a message instead: a row that cannot be trained on must not raise inside a Spark task, which would
run four times and bury the message in a Java trace; it travels to the agent, which raises it as a `DataError`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from allreduce_spark.data.spec import STRING, LeafSpec, RowSpec
from allreduce_spark.data.values import cast, to_arrow, to_numpy
from allreduce_spark.errors import DataError

__all__ = ["BLOCK_BYTES", "Block", "BlockDealer", "ErrorBlock", "decode_block", "encode_block", "encode_error"]

BLOCK_BYTES = 4 << 20
BUFFER_BYTES = 32 << 20  # what a map task holds back at most, whatever the number of shards

_KEY = b"allreduce_spark.block"


@dataclass(frozen=True)
class Block:
    """Rows of one partition that go to one shard.

    Attributes:
        spec: What the rows look like.
        role: "train" or "validation".
        partition: Index of the partition the rows come from.
        sequence: Place of the block in its partition; the rows of a shard are ordered by (partition, sequence).
        batch: The rows, one column per leaf of `spec`.
    """

    spec: RowSpec
    role: str
    partition: int
    sequence: int
    batch: pa.RecordBatch

    def __len__(self) -> int:
        return self.batch.num_rows


@dataclass(frozen=True)
class ErrorBlock:
    """The news that a row of a partition cannot be trained on.

    Attributes:
        message: The whole sentence for the user.
        role: "train" or "validation".
        partition: Index of the partition.
        row: Number of the row in its partition, from 0; None where no single row is to blame.
    """

    message: str
    role: str
    partition: int
    row: int | None

    @property
    def error(self) -> DataError:
        return DataError(self.message)


def encode_block(block: Block) -> bytes:
    """The bytes of a block; `decode_block` reads them."""
    header = {
        "role": block.role,
        "partition": block.partition,
        "sequence": block.sequence,
        "spec": block.spec.to_json(),
    }
    return _to_stream(block.batch.schema, header, block.batch)


def encode_error(error: ErrorBlock) -> bytes:
    """The bytes of an error block; `decode_block` reads them."""
    header = {"error": error.message, "role": error.role, "partition": error.partition, "row": error.row}
    return _to_stream(pa.schema([]), header)


def decode_block(data: Any) -> Block | ErrorBlock:
    """Read a block without copying its values: they stay alive as long as the block does.

    Args:
        data: Bytes, or anything with the buffer protocol.

    Raises:
        DataError: The bytes are cut off, or are no block.
    """
    try:
        with pa.ipc.open_stream(pa.py_buffer(data)) as stream:
            header = json.loads((stream.schema.metadata or {})[_KEY])
            if "error" in header:
                return ErrorBlock(header["error"], header["role"], header["partition"], header["row"])
            batch = stream.read_next_batch()
        batch.validate()
        spec = RowSpec.from_json(header["spec"])
        if batch.schema.remove_metadata() != schema_of(spec):
            raise ValueError(f"its columns are {batch.schema.names}, which do not fit its spec")
        return Block(spec, header["role"], header["partition"], header["sequence"], batch)
    except MemoryError:  # also an ArrowException, but not the fault of the bytes
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, StopIteration) as error:
        size = memoryview(data).nbytes
        raise DataError(f"{size} bytes are no block of rows: {error!r}. Were they cut off on their way?") from error


def schema_of(spec: RowSpec) -> pa.Schema:
    """The Arrow schema of rows of this spec, one field per leaf."""
    return pa.schema([pa.field(leaf.name, _arrow_type(leaf)) for leaf in spec.leaves])


def batch_of(spec: RowSpec, columns: Sequence[np.ndarray]) -> pa.RecordBatch:
    """One array of shape (rows, *leaf.shape) per leaf, as a record batch; not copied where contiguous."""
    arrays = [to_arrow(column, leaf) for column, leaf in zip(columns, spec.leaves, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=schema_of(spec))


def cast_batch(batch: pa.RecordBatch, spec: RowSpec, wider: RowSpec) -> pa.RecordBatch:
    """Give rows of `spec` the dtypes of `wider`, a spec that `common_spec` made of it and others."""
    if spec == wider:
        return batch
    columns = []
    for column, leaf, target in zip(batch.columns, spec.leaves, wider.leaves, strict=True):
        if leaf.dtype != target.dtype:
            column = to_arrow(cast(to_numpy(column, leaf), target.numpy_dtype, leaf.name), target)
        columns.append(column)
    return pa.RecordBatch.from_arrays(columns, schema=schema_of(wider))


def merge_batches(batches: Sequence[pa.RecordBatch]) -> pa.RecordBatch:
    """Several batches of one schema as one. The offsets of our strings have 64 bits, so one is always enough."""
    if len(batches) == 1:
        return batches[0]
    (merged,) = pa.Table.from_batches(batches).combine_chunks().to_batches()
    return merged


class BlockDealer:
    """Deals the rows of one partition out to the shards, like cards: row i goes to shard (partition + i) % num_shards.

    So of n rows every shard gets n // num_shards or one more, and who gets one more rotates with the partition. The
    caller collects `buffer_bytes` of rows at a time: enough for blocks of `block_bytes` each, if `BUFFER_BYTES` allows.
    """

    def __init__(self, *, partition: int, role: str, num_shards: int, block_bytes: int = BLOCK_BYTES) -> None:
        if num_shards < 1 or block_bytes < 1:
            raise ValueError(f"num_shards={num_shards} and block_bytes={block_bytes} must be at least 1")
        self.partition, self.role, self.num_shards = partition, role, num_shards
        self.buffer_bytes = min(num_shards * block_bytes, max(block_bytes, BUFFER_BYTES))
        self._rows = 0
        self._sequence = 0

    def deal(self, batch: pa.RecordBatch, spec: RowSpec) -> Iterator[tuple[int, bytes]]:
        """The blocks of the partition's next rows, with the shard each goes to; no block is empty."""
        first = self._rows
        self._rows += batch.num_rows
        sequence, self._sequence = self._sequence, self._sequence + 1
        for shard in range(self.num_shards):
            start = (shard - self.partition - first) % self.num_shards
            if start >= batch.num_rows:
                continue
            part = batch
            if self.num_shards > 1:
                part = batch.take(pa.array(np.arange(start, batch.num_rows, self.num_shards)))
            yield shard, encode_block(Block(spec, self.role, self.partition, sequence, part))

    def refuse(self, reason: str, row: int | None) -> tuple[int, bytes]:
        """The error block for a row that cannot be trained on; it goes where the row would have gone."""
        place = f"partition {self.partition}" + ("" if row is None else f", row {row}")
        message = f"The {self.role} rows cannot be trained on: in {place}, {reason}."
        shard = (self.partition + (row or 0)) % self.num_shards
        return shard, encode_error(ErrorBlock(message, self.role, self.partition, row))


def _arrow_type(leaf: LeafSpec) -> pa.DataType:
    if leaf.dtype == STRING:
        value = pa.large_string()
    else:
        value = pa.from_numpy_dtype(np.uint8 if leaf.dtype == "bool" else leaf.numpy_dtype)
    return value if leaf.shape == () else pa.list_(value, leaf.values_per_row)


def _to_stream(schema: pa.Schema, header: dict[str, Any], batch: pa.RecordBatch | None = None) -> bytes:
    schema = schema.with_metadata({_KEY: json.dumps(header)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as stream:
        if batch is not None:
            stream.write_batch(batch.replace_schema_metadata(schema.metadata))
    return sink.getvalue().to_pybytes()
