"""Numpy arrays on the driver -> blocks, dealt out row by row: an unshuffled fit has the global batches that Keras has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from allreduce_spark.data.blocks import BLOCK_BYTES, BlockDealer, batch_of
from allreduce_spark.data.spec import LeafSpec, RowSpec, describe
from allreduce_spark.data.values import as_array, check_label, leaf_of
from allreduce_spark.errors import DataError

__all__ = ["arrays_to_blocks"]


def arrays_to_blocks(
    x: Any,
    y: Any = None,
    sample_weight: Any = None,
    *,
    role: str,
    num_shards: int,
    block_bytes: int = BLOCK_BYTES,
) -> Iterator[tuple[int, bytes]]:
    """Turn arrays into blocks for the shards. Wrong arrays are refused at once, before the first block is asked for.

    Args:
        x: An array whose first axis is the rows, or a structure of such arrays (see `spec`).
        y: The same for the labels; None where there are none.
        sample_weight: The same for the weights of the rows; None where there are none.
        role: "train" or "validation".
        num_shards: How many shards there are, one per rank.
        block_bytes: How large a block should be.

    Returns:
        An iterator of (shard, block), dealt out as `BlockDealer` says: row i goes to shard i % num_shards.

    Raises:
        DataError: The arrays have no rows or different numbers of rows, or hold what cannot be trained on.
    """
    columns: list[np.ndarray] = []

    def leaf_of_column(value: Any, name: str) -> LeafSpec:
        array = as_array(value, name)
        if array.ndim == 0:
            raise DataError(f"{name} is a single value, not an array of rows")
        leaf = leaf_of(array, name, array.shape[1:])
        check_label(leaf)
        columns.append(array)
        return leaf

    parts = {"x": x, "y": y, "sample_weight": sample_weight}
    if x is None:
        raise DataError("x is None; expected an array of rows, or a structure of such arrays")
    described = {name: None if part is None else describe(part, name, leaf_of_column) for name, part in parts.items()}
    spec = RowSpec(**described)  # type: ignore[arg-type]  # x is never None here
    rows = _common_length(spec, columns)
    return _blocks(spec, columns, rows, role, num_shards, block_bytes)


def _common_length(spec: RowSpec, columns: list[np.ndarray]) -> int:
    rows = len(columns[0])
    for leaf, column in zip(spec.leaves, columns, strict=True):
        if len(column) != rows:
            raise DataError(
                f"{spec.leaves[0].name} has {rows} rows, but {leaf.name} has {len(column)}; "
                "all arrays need the same length of their first axis"
            )
    if rows == 0:
        raise DataError("the arrays have 0 rows: there is nothing to train on")
    return rows


def _blocks(
    spec: RowSpec, columns: list[np.ndarray], rows: int, role: str, num_shards: int, block_bytes: int
) -> Iterator[tuple[int, bytes]]:
    dealer = BlockDealer(partition=0, role=role, num_shards=num_shards, block_bytes=block_bytes)
    text_bytes = sum(len(text) for column in columns if column.dtype.kind == "O" for text in column.flat)
    step = max(1, dealer.buffer_bytes // max(1, spec.row_bytes + text_bytes // rows))
    for start in range(0, rows, step):
        yield from dealer.deal(batch_of(spec, [column[start : start + step] for column in columns]), spec)
