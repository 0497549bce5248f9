"""Arrays of the driver -> a few large slices on Spark -> single rows, where they are wanted. Nothing here loops over rows on
the driver, and nothing is copied there before Spark writes it out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from pyspark import RDD, SparkContext
from pyspark.mllib.regression import LabeledPoint

from allreduce_spark.data.blocks import BLOCK_BYTES
from allreduce_spark.data.spec import STRING, LeafSpec, RowSpec, Structure, describe, unflatten
from allreduce_spark.data.values import as_array, leaf_of
from allreduce_spark.errors import ConfigError, DataError
from allreduce_spark.spark.adapters.labels import check_labels
from allreduce_spark.spark.cluster import active_context

__all__ = [
    "columns_of",
    "numbers_of",
    "pairs_of_slice",
    "points_of_slice",
    "rows_of_streams",
    "slices_of",
    "stream_of_slice",
    "vectors_and_numbers",
]

# A task carries its slices with it, and Spark refuses tasks above spark.rpc.message.maxSize, 128 MiB unless it is raised.
PARTITION_BYTES = 64 << 20
# Until they are read, the slices are in the heap of the driver's JVM, which wants some of it for itself.
HEAP_SHARE = 0.8


def columns_of(features: Any, labels: Any) -> tuple[RowSpec, list[np.ndarray]]:
    """What the rows of such arrays look like, and one array of shape (rows, ...) for each leaf of that.

    Raises:
        DataError: There are no rows, the arrays are not equally long, or labels are NaN or no numbers.
    """
    columns: list[np.ndarray] = []

    def leaf_of_column(value: Any, name: str) -> LeafSpec:
        array = as_array(value, name)
        if array.ndim == 0:
            raise DataError(f"{name} is a single value, not an array of rows")
        if columns and len(array) != len(columns[0]):
            raise DataError(
                f"features has {len(columns[0])} rows, but {name} has {len(array)}; "
                "all arrays need the same length of their first axis"
            )
        columns.append(array)
        return leaf_of(array, name, array.shape[1:])

    spec = RowSpec(describe(features, "features", leaf_of_column), describe(labels, "labels", leaf_of_column))
    if len(columns[0]) == 0:
        raise DataError("the arrays have 0 rows; expected at least one")
    for column, leaf in zip(columns, spec.leaves, strict=True):
        if leaf.name.startswith("labels"):
            if leaf.dtype == STRING:
                raise DataError(f"{leaf.name} holds strings; labels must be numbers: encode them first")
            check_labels(column, None)
    return spec, columns


def vectors_and_numbers(features: Any, labels: Any, categorical: bool) -> list[np.ndarray]:
    """Features of shape (rows, length) and float64 labels of shape (rows,): what fits in vectors and LabeledPoints.

    Raises:
        DataError: As in `columns_of`; or the arrays are no numbers of such shapes, or a one-hot vector stands for no class.
    """
    spec, columns = columns_of(features, labels)
    if len(columns) != 2:
        raise DataError(f"features are {spec.x}, labels are {spec.y}; expected one array each")
    x, y = numbers_of(columns[0], 2, "a vector in each row"), columns[1]
    if not categorical:
        if y.size != len(y):
            raise DataError(f"labels have shape {y.shape}; expected (rows,), or categorical=True for one-hot vectors")
        return [x, y.reshape(-1).astype(np.float64)]
    if y.ndim != 2 or y.shape[1] < 2:
        raise DataError(f"labels have shape {y.shape}; categorical=True expects one-hot vectors, (rows, num_classes)")
    classless = y.max(axis=1) == y.min(axis=1)
    if classless.any():
        raise DataError(f"in row {np.argmax(classless)}, all values of the one-hot label are equal: it names no class")
    return [x, np.argmax(y, axis=1).astype(np.float64)]


def numbers_of(value: Any, ndim: int, goal: str) -> np.ndarray:
    """The value as an array of numbers with so many dimensions.

    Raises:
        DataError: It is none; says that `goal` needs one.
    """
    array = as_array(value, "the array")
    if array.ndim != ndim or array.dtype.kind not in "biuf":
        raise DataError(
            f"the array is of shape {array.shape} and dtype {array.dtype}; {goal} needs numbers in {ndim} "
            f"dimension{'s' if ndim > 1 else ''}: reshape or convert it first"
        )
    return array


def slices_of(sc: SparkContext, columns: list[np.ndarray]) -> RDD[list[np.ndarray]]:
    """Arrays of equally many rows -> slices of them of up to some MB, in order, equally many in every partition.

    Raises:
        ConfigError: The driver's JVM is too small for them.
    """
    active_context()  # on one machine, workers run this Python
    rows, size = len(columns[0]), sum(column.nbytes for column in columns)
    _check_heap(sc, size)
    partitions = max(sc.defaultParallelism, -(-size // PARTITION_BYTES))
    per_partition = max(1, -(-size // (partitions * BLOCK_BYTES)))
    count = min(rows, partitions * per_partition)
    bounds = [rows * index // count for index in range(count + 1)]
    slices = [[column[start:stop] for column in columns] for start, stop in pairwise(bounds)]
    return sc.parallelize(slices, partitions)


def _check_heap(sc: SparkContext, size: int) -> None:
    assert sc._jvm is not None
    heap = sc._jvm.java.lang.Runtime.getRuntime().maxMemory()
    if size > HEAP_SHARE * heap:
        raise ConfigError(
            f"the arrays have {size / 2**30:.1f} GiB, but the driver's JVM may use {heap / 2**30:.1f} GiB, and an RDD made on "
            "the driver is kept there: start Spark with a larger --driver-memory (spark.driver.memory), or write the rows "
            "to files and read them with spark.read."
        )


def pairs_of_slice(spec: RowSpec, columns: Sequence[np.ndarray]) -> Iterator[tuple[Any, Any]]:
    """(x, y) of every row, as views; one column for each leaf of the spec."""
    assert spec.y is not None  # pairs have two parts
    rest = iter(columns)
    x, y = (_values(part, [next(rest) for _ in RowSpec(part).leaves]) for part in (spec.x, spec.y))
    return zip(x, y, strict=True)


def _values(part: Structure, columns: Sequence[np.ndarray]) -> Iterable[Any]:
    if isinstance(part, LeafSpec):
        return columns[0]
    return (unflatten(part, iter(values)) for values in zip(*columns, strict=True))


def points_of_slice(columns: Sequence[np.ndarray]) -> Iterator[LabeledPoint]:
    """A slice of `vectors_and_numbers` -> its rows."""
    features, labels = columns
    return map(LabeledPoint, labels.tolist(), features.astype(np.float64))


def stream_of_slice(columns: Sequence[np.ndarray]) -> tuple[bytes]:
    """A slice of `vectors_and_numbers` -> an Arrow stream with the columns features (lists of doubles) and label (double)."""
    features, labels = columns
    rows, length = features.shape
    values = pa.array(features.astype(np.float64).reshape(-1))
    offsets = pa.array(np.arange(rows + 1, dtype=np.int32) * length)
    lists = pa.ListArray.from_arrays(offsets, values)
    batch = pa.RecordBatch.from_arrays([lists, pa.array(labels)], names=["features", "label"])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    return (sink.getvalue().to_pybytes(),)


def rows_of_streams(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Batches with one column of Arrow streams -> the batches in those streams; for `mapInArrow`."""
    for batch in batches:
        for stream in batch.column(0):
            with pa.ipc.open_stream(stream.as_buffer()) as reader:
                yield from reader
