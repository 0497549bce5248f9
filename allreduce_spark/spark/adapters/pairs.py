"""LabeledPoints and blocks -> pairs (x, y) on Spark, or arrays on the driver."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial, reduce
from typing import Any

import numpy as np
import pyarrow as pa
from pyspark import RDD
from pyspark.mllib.regression import LabeledPoint

from allreduce_spark.data.blocks import Block, cast_batch, decode_block, merge_batches
from allreduce_spark.data.spec import STRING, LeafSpec, common_spec
from allreduce_spark.data.values import to_numpy
from allreduce_spark.errors import DataError
from allreduce_spark.spark.adapters.labels import check_labels, label_problem, num_classes_for, one_hot
from allreduce_spark.spark.adapters.slices import pairs_of_slice
from allreduce_spark.spark.cluster import active_context

__all__ = ["arrays_of_blocks", "largest_label", "pairs_of_blocks", "pairs_of_points"]


def pairs_of_points(rdd: Any, num_classes: int | None = None, *, encode: bool = False) -> RDD[tuple[np.ndarray, Any]]:
    """An RDD of LabeledPoints -> pairs of a float64 array and the label; what is wrong with a row shows when it is read.

    Args:
        rdd: Dense or sparse.
        num_classes: Labels must be classes of so many; None takes any number that is not NaN.
        encode: Whether to make labels one-hot vectors of `num_classes`.

    Raises:
        DataError: It is no RDD.
    """
    if not isinstance(rdd, RDD):
        raise DataError(f"expected an RDD of LabeledPoints, got {type(rdd)}; to_labeled_point makes one of arrays")
    active_context()  # on one machine, workers run this Python
    return rdd.mapPartitionsWithIndex(partial(_pairs, num_classes=num_classes, encode=encode))


def _pairs(
    partition: int, points: Iterable[Any], *, num_classes: int | None, encode: bool
) -> Iterator[tuple[np.ndarray, Any]]:
    for row, point in enumerate(points):
        if isinstance(point, LabeledPoint):
            problem = label_problem(point.label, num_classes)
        else:
            problem = f"there is a {type(point)}; expected a pyspark.mllib.regression.LabeledPoint"
        if problem is not None:
            raise DataError(f"in row {row} of partition {partition}, {problem}")
        encoded = one_hot(np.array([point.label]), num_classes)[0] if encode and num_classes else point.label
        yield point.features.toArray(), encoded


def largest_label(pairs: RDD[tuple[Any, Any]]) -> float | None:
    """The largest label of all rows; None where there are no rows.

    Raises:
        DataError: A row is refused.
    """
    results = pairs.mapPartitions(_largest_label).collect()
    for result in results:
        if isinstance(result, DataError):
            raise result
    return max(results, default=None)


def _largest_label(pairs: Iterable[tuple[Any, Any]]) -> Iterator[Any]:
    try:
        largest = max((label for _, label in pairs), default=None)
    except DataError as error:
        yield error  # as a value: Spark would run the task again, and wrap the message
    else:
        if largest is not None:
            yield largest


def pairs_of_blocks(partition: int, blocks: Iterable[bytes], *, num_classes: int | None) -> Iterator[tuple[Any, Any]]:
    """The pairs in the blocks of a partition, x and y views of the blocks; with `num_classes`, labels are made one-hot."""
    rows = 0
    for block in map(_decoded, blocks):
        columns = [_values(column, leaf) for column, leaf in zip(block.batch.columns, block.spec.leaves, strict=True)]
        if num_classes is not None:
            columns[-1] = _encoded(columns[-1], num_classes, f"in row {{}} of partition {partition}", rows)
        yield from pairs_of_slice(block.spec, columns)
        rows += len(block)


def arrays_of_blocks(blocks: RDD[bytes], categorical: bool, num_classes: int | None) -> tuple[np.ndarray, np.ndarray]:
    """The rows of all blocks, of one x and one y, as two arrays on the driver.

    Labels are one-hot where `categorical`, of `num_classes` or as many as the largest one asks for; else they are int64
    if all are whole numbers.

    Raises:
        DataError: There are no rows, rows differ, or a label is NaN or no class.
    """
    decoded = [_decoded(data) for data in blocks.collect()]
    if not decoded:
        raise DataError("there are no rows")
    spec = reduce(common_spec, (block.spec for block in decoded))
    batch = merge_batches([cast_batch(block.batch, block.spec, spec) for block in decoded])
    x, y = (_values(column, leaf) for column, leaf in zip(batch.columns, spec.leaves, strict=True))
    if categorical:
        return x, _encoded(y, num_classes_for(y.max().item()) if num_classes is None else num_classes)
    check_labels(y, None)
    return x, y.astype(np.int64) if (np.isfinite(y) & (y == np.floor(y))).all() else y


def _decoded(data: bytes) -> Block:
    block = decode_block(data)
    if not isinstance(block, Block):
        raise block.error
    return block


def _values(column: pa.Array, leaf: LeafSpec) -> np.ndarray:
    if leaf.dtype != STRING:
        return to_numpy(column, leaf)
    flat = column if leaf.shape == () else column.flatten()
    return np.asarray(flat.to_numpy(zero_copy_only=False)).reshape(len(column), *leaf.shape)


def _encoded(labels: np.ndarray, num_classes: int, place: str = "in row {}", first_row: int = 0) -> np.ndarray:
    if labels.size != len(labels):
        raise DataError(f"labels have shape {labels.shape}; only single numbers can become one-hot vectors")
    check_labels(labels, num_classes, place, first_row)
    return one_hot(labels.reshape(-1), num_classes)
