"""Arrow record batches of a DataFrame -> blocks: what a Spark map task runs under `mapInArrow`. No loop over rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pyarrow as pa

from allreduce_spark.data.blocks import BLOCK_BYTES, BlockDealer, merge_batches, schema_of
from allreduce_spark.data.columns import check_columns, read_columns
from allreduce_spark.data.flat import RowError, Values
from allreduce_spark.data.forms import ArrayForm, TableForm
from allreduce_spark.data.spec import LeafSpec, NestSpec, RowSpec, Structure
from allreduce_spark.data.values import fixed_size_lists
from allreduce_spark.errors import DataError

__all__ = ["table_to_blocks"]


def table_to_blocks(
    batches: Iterable[pa.RecordBatch],
    form: TableForm,
    *,
    partition: int,
    role: str,
    num_shards: int,
    block_bytes: int = BLOCK_BYTES,
) -> Iterator[tuple[int, bytes]]:
    """Turn the record batches of one partition into blocks for the shards.

    Args:
        batches: The rows of the partition; all batches have the same schema.
        form: What to make of the columns.
        partition: Index of the partition among all partitions of this role.
        role: "train" or "validation".
        num_shards: How many shards there are, one per rank.
        block_bytes: How large a block should be.

    Yields:
        (shard, block): every row in exactly one block, dealt out as `BlockDealer` says. If a column cannot be trained
        on, the last block is an error block and no more batches are read. What `batches` raises passes through.
    """
    dealer = BlockDealer(partition=partition, role=role, num_shards=num_shards, block_bytes=block_bytes)
    reader = _TableReader(form, dealer.buffer_bytes)
    waiting: list[pa.RecordBatch] = []
    waiting_bytes = 0
    for batch in batches:
        pieces = reader.read(batch)
        while True:
            try:
                piece = next(pieces, None)
            except RowError as error:
                yield dealer.refuse(str(error), error.row)
                return
            except DataError as error:
                yield dealer.refuse(str(error), None)
                return
            if piece is None:
                break
            waiting.append(piece)
            waiting_bytes += piece.nbytes
            if waiting_bytes >= dealer.buffer_bytes:
                yield from dealer.deal(merge_batches(waiting), reader.spec)
                waiting, waiting_bytes = [], 0
    if waiting:
        yield from dealer.deal(merge_batches(waiting), reader.spec)


class _TableReader:
    """Reads batch after batch into the columns of a spec, which the first rows define."""

    def __init__(self, form: TableForm, limit_bytes: int) -> None:
        self._form, self._limit_bytes = form, limit_bytes
        self._known: dict[str, Values] = {}
        self._spec: RowSpec | None = None
        self._rows = 0

    @property
    def spec(self) -> RowSpec:
        assert self._spec is not None  # for mypy: asked for only after a batch with rows
        return self._spec

    def read(self, batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
        """The rows of a batch, in pieces that are not much larger than a block should be.

        Only the first row tells how large rows are: a sparse vector, for example, may be far larger than it looks.
        """
        if self._rows == 0:
            check_columns(batch.schema, self._form)
        start = 0
        while start < batch.num_rows:
            rows = 1 if self._spec is None else max(1, self._limit_bytes // max(1, self._spec.row_bytes))
            piece = batch.slice(start, rows)
            start += piece.num_rows
            yield from self._read(piece)

    def _read(self, piece: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
        try:
            kept, columns = read_columns(piece, self._form, self._known)
        except RowError as error:
            raise RowError(str(error), self._rows + error.row) from None
        self._rows += piece.num_rows
        if kept.num_rows == 0:
            return
        if self._spec is None:
            self._spec = _spec_of(self._form, columns)
        arrays = [
            fixed_size_lists(values.arrow(), kept.num_rows, leaf)
            for values, leaf in zip(columns, self._spec.leaves, strict=True)
        ]
        yield pa.RecordBatch.from_arrays(arrays, schema=schema_of(self._spec))


def _spec_of(form: TableForm, columns: list[Values]) -> RowSpec:
    found = dict(zip(form.arrays, columns, strict=True))

    def part(root: str, forms: tuple[ArrayForm, ...]) -> Structure:
        if len(forms) == 1:
            return leaf(root, forms[0])
        keys = tuple(sorted(array.key for array in forms))
        by_key = {array.key: array for array in forms}
        return NestSpec(root, "dict", keys, tuple(leaf(f"{root}[{key!r}]", by_key[key]) for key in keys))

    def leaf(name: str, array: ArrayForm) -> LeafSpec:
        return LeafSpec(name, found[array].dtype, found[array].shape)

    return RowSpec(
        part("x", form.x),
        part("y", form.y) if form.y else None,
        leaf("sample_weight", form.weight) if form.weight else None,
    )
