"""Between numpy and what Spark holds: RDDs of pairs, LabeledPoints, DataFrames, vectors, matrices. Plain functions.

Arrays of the driver travel as a few large slices, and become rows where rows are wanted; what comes back travels as Arrow
blocks. A label is a number, or a class: a whole number from 0 to num_classes - 1; with `categorical` its one-hot vector.

The functions that return an RDD or a DataFrame look at arrays and columns at once, but at the rows of an RDD or a
DataFrame when these are read, as is Spark's way. A bad row is then a `DataError` from the methods of `SparkModel`; from
`collect()` it is Spark's exception with the same message inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from pyspark import RDD, SparkContext
from pyspark.ml.functions import array_to_vector
from pyspark.ml.linalg import Matrix as NewMatrix
from pyspark.ml.linalg import Vector as NewVector
from pyspark.mllib.linalg import Matrices, Matrix, Vector, Vectors
from pyspark.mllib.regression import LabeledPoint
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from allreduce_spark.data.values import as_array
from allreduce_spark.errors import DataError
from allreduce_spark.spark.adapters.labels import check_num_classes, label_problem, num_classes_for, one_hot
from allreduce_spark.spark.adapters.pairs import arrays_of_blocks, largest_label, pairs_of_blocks, pairs_of_points
from allreduce_spark.spark.adapters.slices import (
    columns_of,
    numbers_of,
    pairs_of_slice,
    points_of_slice,
    rows_of_streams,
    slices_of,
    stream_of_slice,
    vectors_and_numbers,
)
from allreduce_spark.spark.cluster import active_context
from allreduce_spark.spark.shards import Columns, blocks_of

__all__ = [
    "df_to_simple_rdd",
    "encode_label",
    "from_data_frame",
    "from_labeled_point",
    "from_matrix",
    "from_vector",
    "lp_to_simple_rdd",
    "to_data_frame",
    "to_labeled_point",
    "to_matrix",
    "to_simple_rdd",
    "to_vector",
]


def to_simple_rdd(sc: SparkContext, features: Any, labels: Any) -> RDD[tuple[Any, Any]]:
    """Arrays -> an RDD of pairs (x, y), one for each row, in their order.

    Args:
        sc: The Spark context.
        features: An array of shape (rows, ...), or a dict, tuple or list of such arrays for a model with several inputs.
        labels: Likewise for the outputs.

    Returns:
        An RDD with `sc.defaultParallelism` partitions, more where a partition would hold over 64 MiB. x and y are views
        of larger arrays, in the structure of `features` and `labels`.

    Raises:
        DataError: There are no rows, the arrays are not equally long, or a label is NaN.
        ConfigError: The driver's JVM (spark.driver.memory) is too small for the arrays.
    """
    spec, columns = columns_of(features, labels)
    return slices_of(sc, columns).flatMap(partial(pairs_of_slice, spec))


def to_labeled_point(sc: SparkContext, features: Any, labels: Any, categorical: bool = False) -> RDD[LabeledPoint]:
    """Arrays -> an RDD of LabeledPoints, in the order of the rows.

    Args:
        sc: The Spark context.
        features: Shape (rows, length of a vector), numbers.
        labels: Shape (rows,) or (rows, 1); with `categorical` shape (rows, num_classes), and the class is the place of the
            largest value.
        categorical: Whether the labels are one-hot vectors (or probabilities).

    Raises:
        DataError: As in `to_simple_rdd`, or the shapes are others.
        ConfigError: As in `to_simple_rdd`.
    """
    return slices_of(sc, vectors_and_numbers(features, labels, categorical)).flatMap(points_of_slice)


def from_labeled_point(
    rdd: RDD[LabeledPoint], categorical: bool = False, num_classes: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """An RDD of LabeledPoints -> arrays on the driver, in the order of the RDD.

    Args:
        rdd: LabeledPoints with vectors of one length, dense or sparse.
        categorical: Whether to return one-hot vectors.
        num_classes: Their length; None for the largest label + 1. Only used with `categorical`.

    Returns:
        Features of shape (rows, length of a vector), float64. Labels of shape (rows,), int64 where all of them are whole
        numbers, else float64; with `categorical` shape (rows, num_classes), float64.

    Raises:
        DataError: There are no rows; an element is no LabeledPoint; the vectors differ in length; a label is NaN, or, with
            `categorical`, no class.
        ConfigError: num_classes is no positive integer.
    """
    check_num_classes(num_classes)
    pairs = pairs_of_points(rdd)
    return arrays_of_blocks(blocks_of(pairs.context, pairs, Columns(), 1), categorical, num_classes)


def lp_to_simple_rdd(
    lp_rdd: RDD[LabeledPoint], categorical: bool = False, num_classes: int | None = None
) -> RDD[tuple[np.ndarray, Any]]:
    """An RDD of LabeledPoints -> an RDD of pairs, in its order and partitions.

    Args:
        lp_rdd: LabeledPoints, dense or sparse.
        categorical: Whether to turn labels into one-hot vectors.
        num_classes: Their length; None runs a Spark job to find the largest label. Only used with `categorical`.

    Returns:
        Pairs of x, float64 of shape (length of the vector,), and y: the label as a float, or its one-hot vector, float64 of
        shape (num_classes,). Bad rows are refused when they are read.

    Raises:
        DataError: It is no RDD; num_classes is to be found, and there are no rows or a label is no class.
        ConfigError: num_classes is no positive integer.
    """
    check_num_classes(num_classes)
    if categorical and num_classes is None:
        num_classes = num_classes_for(largest_label(pairs_of_points(lp_rdd)))
    return pairs_of_points(lp_rdd, num_classes if categorical else None, encode=categorical)


def encode_label(label: Any, num_classes: int) -> np.ndarray:
    """The one-hot vector of a class: shape (num_classes,), float64.

    >>> encode_label(2, 4)
    array([0., 0., 1., 0.])

    Raises:
        DataError: The label is no whole number, or outside the classes.
        ConfigError: num_classes is no positive integer.
    """
    check_num_classes(num_classes)
    value = as_array(label, "the label")
    if value.size != 1 or value.dtype.kind not in "biuf":
        raise DataError(f"the label is {label!r}; expected one number, the class")
    problem = label_problem(value.item(), num_classes)
    if problem is not None:
        raise DataError(problem)
    return one_hot(value.reshape(1), num_classes)[0]


def to_data_frame(sc: SparkContext, features: Any, labels: Any, categorical: bool = False) -> DataFrame:
    """Arrays -> a DataFrame with the columns "features" (a Spark ML vector) and "label" (double), in the order of the rows.

    Args:
        sc, features, labels, categorical: As in `to_labeled_point`.

    Raises:
        DataError, ConfigError: As in `to_labeled_point`.
    """
    slices = slices_of(sc, vectors_and_numbers(features, labels, categorical))
    session = SparkSession.builder.getOrCreate()
    packed = session.createDataFrame(slices.map(stream_of_slice), "slice binary", verifySchema=False)
    arrays = packed.mapInArrow(rows_of_streams, "features array<double>, label double")
    return arrays.select(array_to_vector(F.col("features")).alias("features"), "label")


def from_data_frame(
    df: DataFrame, categorical: bool = False, num_classes: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The columns "features" and "label" of a DataFrame -> arrays on the driver, in the order of the rows.

    Args:
        df: "features" holds Spark ML or MLlib vectors, dense or sparse, or (nested) arrays of numbers, of one shape.
        categorical, num_classes: As in `from_labeled_point`.

    Returns:
        Features of shape (rows, ...), float64 for vectors; labels as in `from_labeled_point`.

    Raises:
        DataError: A column is missing, holds a null, or its rows differ in shape; as in `from_labeled_point`.
        ConfigError: num_classes is no positive integer.
    """
    check_num_classes(num_classes)
    blocks = blocks_of(active_context(), df, Columns(), 1)
    return arrays_of_blocks(blocks, categorical, num_classes)


def df_to_simple_rdd(
    df: DataFrame,
    categorical: bool = False,
    num_classes: int | None = None,
    features_col: str | Sequence[str] = "features",
    label_col: str = "label",
) -> RDD[tuple[Any, Any]]:
    """A DataFrame -> an RDD of pairs (x, y), in its order and partitions.

    Args:
        df: The columns may hold what `SparkModel.fit` takes: vectors, (nested) arrays, numbers.
        categorical: Whether to turn labels, which must be single numbers, into one-hot vectors.
        num_classes: Their length; None runs a Spark job to find the largest label. Only used with `categorical`.
        features_col: The column of x; several are a dict of inputs.
        label_col: The column of y.

    Returns:
        Pairs of x, an array (float64 for vectors), and y, a numpy scalar or array, or a one-hot vector, float64 of shape
        (num_classes,). Bad rows are refused when they are read.

    Raises:
        DataError: A column is missing, or of a type that cannot be trained on; num_classes is to be found, and there are no
            rows or a label is no class.
        ConfigError: num_classes is no positive integer.
    """
    check_num_classes(num_classes)
    names = (features_col,) if isinstance(features_col, str) else tuple(features_col)
    blocks = blocks_of(active_context(), df, Columns(names, (label_col,)), 1)  # refuses wrong columns
    if categorical and num_classes is None:
        largest = df.agg(F.max(df[f"`{label_col.replace('`', '``')}`"])).first()
        num_classes = num_classes_for(None if largest is None else largest[0])
    return blocks.mapPartitionsWithIndex(partial(pairs_of_blocks, num_classes=num_classes if categorical else None))


def to_vector(np_array: Any) -> Vector:
    """An array of shape (length,) -> a dense MLlib vector.

    Raises:
        DataError: It has another shape, or holds no numbers.
    """
    return Vectors.dense(numbers_of(np_array, 1, "an MLlib Vector"))


def from_vector(vector: Vector | NewVector) -> np.ndarray:
    """A vector of MLlib or Spark ML, dense or sparse -> an array of shape (length,), float64.

    Raises:
        DataError: It is no vector.
    """
    if not isinstance(vector, (Vector, NewVector)):
        raise DataError(f"expected a vector of pyspark.mllib.linalg or pyspark.ml.linalg, got {type(vector)}")
    return np.asarray(vector.toArray())


def to_matrix(np_array: Any) -> Matrix:
    """An array of shape (rows, columns) -> a dense MLlib matrix, which holds its values column by column.

    Raises:
        DataError: It has another shape, or holds no numbers.
    """
    array = numbers_of(np_array, 2, "an MLlib Matrix")
    rows, columns = array.shape
    return Matrices.dense(rows, columns, array.ravel(order="F"))


def from_matrix(matrix: Matrix | NewMatrix) -> np.ndarray:
    """A matrix of MLlib or Spark ML, dense or sparse, transposed or not -> an array of shape (rows, columns), float64.

    Raises:
        DataError: It is no matrix.
    """
    if not isinstance(matrix, (Matrix, NewMatrix)):
        raise DataError(f"expected a matrix of pyspark.mllib.linalg or pyspark.ml.linalg, got {type(matrix)}")
    return np.ascontiguousarray(matrix.toArray())
