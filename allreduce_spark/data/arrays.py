"""Numpy arrays on the driver -> blocks: each shard gets one contiguous slice, so an unshuffled fit keeps the order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from allreduce_spark.data.blocks import BLOCK_BYTES, Block, batch_of, encode_block
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
        An iterator of (shard, block). Of n rows shard s gets rows s * n // num_shards to (s + 1) * n // num_shards.

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
    text_bytes = sum(len(text) for column in columns if column.dtype.kind == "O" for text in column.flat)
    step = max(1, block_bytes // max(1, spec.row_bytes + text_bytes // rows))
    sequence = 0
    for shard in range(num_shards):
        end = (shard + 1) * rows // num_shards
        for start in range(shard * rows // num_shards, end, step):
            batch = batch_of(spec, [column[start : min(start + step, end)] for column in columns])
            yield shard, encode_block(Block(spec, role, 0, sequence, batch))
            sequence += 1
