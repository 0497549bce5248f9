"""The writing half of a shard: `ShardWriter` spools decoded blocks to a local Arrow file that `shard.Shard` reads.

The file is an Arrow IPC file of few large record batches, the chunks. The writer holds about two chunks in memory, so a
shard can be larger than memory. Blocks come out of Spark's shuffle in any order, while training must not depend on it:
every chunk notes in its metadata which blocks it holds, and the reader numbers the rows by (partition, sequence).
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa

from allreduce_spark.data.blocks import Block, ErrorBlock, cast_batch, merge_batches, schema_of
from allreduce_spark.data.spec import RowSpec, common_spec
from allreduce_spark.errors import ConfigError

__all__ = ["CHUNK_BYTES", "ShardWriter"]

CHUNK_BYTES = 64 << 20

SPEC_KEY = b"allreduce_spark.shard"  # in the metadata of the schema: the spec as JSON, or "" for a shard without blocks
BLOCKS_KEY = b"allreduce_spark.blocks"  # in the metadata of each chunk: [[partition, sequence, rows], ...] as they lie


class ShardWriter:
    """Writes the shard file of one rank and one role. The file appears at `path` when the `with` block ends well.

    Attributes:
        rows: Rows written so far.
        spec: What they look like; None before the first block.
    """

    def __init__(self, path: str | os.PathLike[str], *, chunk_bytes: int = CHUNK_BYTES) -> None:
        self.rows = 0
        self.spec: RowSpec | None = None
        self._path = Path(path)
        self._partial = Path(f"{path}.partial")
        self._chunk_bytes = chunk_bytes
        self._waiting: list[Block] = []
        self._waiting_bytes = 0
        self._first: Block | None = None
        self._file: _ChunkFile | None = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                with self._naming_the_disk():
                    self._finish()
        finally:
            if self._file is not None:
                self._file.discard()
            self._partial.unlink(missing_ok=True)

    def write(self, block: Block | ErrorBlock) -> None:
        """Add a decoded block; the order in which blocks come does not matter.

        Raises:
            DataError: It is an error block, or its rows do not look like those of the blocks before it.
            ConfigError: The disk does not take it. So may the end of the `with` block say.
        """
        if isinstance(block, ErrorBlock):
            raise block.error
        if self.spec is None or self._first is None:
            self.spec, self._first = block.spec, block
        elif block.role != self._first.role:
            raise ValueError(f"a {block.role!r} block came to the shard of the {self._first.role!r} rows")
        elif block.spec != self.spec:
            names = (f"partition {self._first.partition}", f"partition {block.partition}")
            with self._naming_the_disk():
                self._widen(common_spec(self.spec, block.spec, names))
        self._waiting.append(block)
        self._waiting_bytes += block.batch.nbytes
        self.rows += len(block)
        if self._waiting_bytes >= self._chunk_bytes:
            with self._naming_the_disk():
                self._write_chunk()

    @contextlib.contextmanager
    def _naming_the_disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigError(
                f"the rows cannot be written to {str(self._path.parent)!r} on {socket.gethostname()}: {error}. Each host needs "
                "room for the shards of its ranks on the local disk that Spark uses: see spark.local.dir, or SPARK_LOCAL_DIRS."
            ) from error

    def _write_chunk(self) -> None:
        assert self.spec is not None  # for mypy: blocks wait, so there was a first
        if self._file is None:
            self._file = _ChunkFile(self._partial, self.spec)
        merged = merge_batches([cast_batch(block.batch, block.spec, self.spec) for block in self._waiting])
        blocks = [(block.partition, block.sequence, len(block)) for block in self._waiting]
        self._file.write(merged, {BLOCKS_KEY: json.dumps(blocks)})
        self._waiting, self._waiting_bytes = [], 0

    def _widen(self, wider: RowSpec) -> None:
        """Bring the rows so far to the spec they share with a new block: int64 becomes float64, once per column."""
        narrow, self.spec = self.spec, wider
        if narrow is None or narrow == wider or self._file is None:
            return
        self._file.close()
        old = Path(f"{self._path}.narrow")
        os.replace(self._partial, old)
        try:
            self._file = _ChunkFile(self._partial, wider)
            with pa.memory_map(str(old)) as source:
                for batch, metadata in read_chunks(pa.ipc.open_file(source)):
                    self._file.write(cast_batch(batch, narrow, wider), metadata)
        finally:
            old.unlink()

    def _finish(self) -> None:
        if self._waiting:
            self._write_chunk()
        if self._file is None:
            self._file = _ChunkFile(self._partial, None)
        self._file.close()
        os.replace(self._partial, self._path)


class _ChunkFile:
    """An Arrow IPC file open for writing, and the file below it."""

    def __init__(self, path: Path, spec: RowSpec | None) -> None:
        schema = pa.schema([]) if spec is None else schema_of(spec)
        schema = schema.with_metadata({SPEC_KEY: "" if spec is None else spec.to_json()})
        self._sink = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._sink, schema)

    def write(self, batch: pa.RecordBatch, metadata: Any) -> None:
        self._writer.write_batch(batch, custom_metadata=metadata)

    def close(self) -> None:
        """Write the footer, without which the file cannot be opened. A second call does nothing."""
        if not self._sink.closed:
            self._writer.close()
            self._sink.close()

    def discard(self) -> None:
        """Close it as it is: it will not be read. A second call, or one after `close`, does nothing."""
        self._sink.close()


def read_chunks(reader: pa.ipc.RecordBatchFileReader) -> Iterator[tuple[pa.RecordBatch, Any]]:
    """The chunks of an open shard file, each with its metadata."""
    return (reader.get_batch_with_custom_metadata(index) for index in range(reader.num_record_batches))
