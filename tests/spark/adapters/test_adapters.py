"""Arrays to what Spark holds, and back: nothing lost, nothing out of order, nothing bad let through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyspark.ml.linalg as ml
import pyspark.mllib.linalg as mllib
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from pyspark import SparkContext
from pyspark.errors import PySparkException
from pyspark.mllib.regression import LabeledPoint
from pyspark.sql import SparkSession

from allreduce_spark.errors import ConfigError, DataError
from allreduce_spark.spark.adapters import (
    df_to_simple_rdd,
    encode_label,
    from_data_frame,
    from_labeled_point,
    from_matrix,
    from_vector,
    lp_to_simple_rdd,
    slices,
    to_data_frame,
    to_labeled_point,
    to_matrix,
    to_simple_rdd,
    to_vector,
)

X = np.random.default_rng(0).normal(size=(23, 3))
CLASSES = np.arange(23) % 4
ONE_HOT = np.eye(4)[CLASSES]
FLOATS = st.floats(allow_nan=False, width=64)


@given(arrays(np.float64, array_shapes(max_dims=1), elements=FLOATS))
def test_a_vector_comes_back_as_it_was(array: np.ndarray) -> None:
    vector = to_vector(array)
    assert isinstance(vector, mllib.DenseVector)
    np.testing.assert_array_equal(from_vector(vector), array)
    np.testing.assert_array_equal(from_vector(vector.asML()), array)


@given(arrays(np.float64, array_shapes(min_dims=2, max_dims=2), elements=FLOATS))
def test_a_matrix_comes_back_as_it_was(array: np.ndarray) -> None:
    matrix = to_matrix(array)
    assert isinstance(matrix, mllib.DenseMatrix)
    assert matrix[array.shape[0] - 1, 0] == array[-1, 0]  # as Spark reads it, not only as we do
    for form in (matrix, matrix.asML(), matrix.toSparse(), matrix.toSparse().asML()):
        np.testing.assert_array_equal(from_matrix(form), array)


@pytest.mark.parametrize("linalg", [mllib, ml])
def test_sparse_and_transposed_forms_are_read_in_place(linalg: Any) -> None:
    np.testing.assert_array_equal(from_vector(linalg.SparseVector(4, [1, 3], [5.0, 7.0])), [0, 5, 0, 7])
    expected = [[1, 2, 3], [4, 5, 6]]
    np.testing.assert_array_equal(from_matrix(linalg.DenseMatrix(2, 3, [1, 4, 2, 5, 3, 6])), expected)
    np.testing.assert_array_equal(from_matrix(linalg.DenseMatrix(2, 3, [1, 2, 3, 4, 5, 6], True)), expected)
    by_column = linalg.SparseMatrix(2, 3, [0, 1, 1, 2], [1, 0], [8, 9])
    by_row = linalg.SparseMatrix(2, 3, [0, 1, 2], [2, 0], [9, 8], True)
    for sparse in (by_column, by_row):
        np.testing.assert_array_equal(from_matrix(sparse), [[0, 0, 9], [8, 0, 0]])


@given(st.data())
def test_a_label_is_one_in_its_own_place_alone(data: st.DataObject) -> None:
    num_classes = data.draw(st.integers(1, 50))
    label = data.draw(st.integers(0, num_classes - 1))
    for form in (label, float(label), np.int32(label), np.array([float(label)])):
        encoded = encode_label(form, num_classes)
        assert encoded.shape == (num_classes,)
        assert (encoded[label], encoded.sum()) == (1.0, 1.0)


@pytest.mark.parametrize("label", [3, -1, 0.5, float("nan"), float("inf"), "1", None, [0, 1], np.eye(3)[0]])
def test_what_is_no_class_is_not_encoded(label: Any) -> None:
    with pytest.raises(DataError, match="label"):
        encode_label(label, 3)


@pytest.mark.parametrize("num_classes", [0, -1, 2.5, True, "3"])
def test_a_number_of_classes_must_be_one(num_classes: Any) -> None:
    with pytest.raises(ConfigError, match="num_classes must be a positive integer"):
        encode_label(0, num_classes)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: to_vector(X), r"shape \(23, 3\).*an MLlib Vector needs numbers in 1 dimension:"),
        (lambda: to_vector(["a"]), "object.*needs numbers"),
        (lambda: to_matrix(X[0]), r"shape \(3,\).*an MLlib Matrix needs numbers in 2 dimensions:"),
        (lambda: from_vector(X[0]), "expected a vector.*ndarray"),  # type: ignore[arg-type]
        (lambda: from_matrix(to_vector(X[0])), "expected a matrix.*DenseVector"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_vector_or_matrix_is_refused(call: Callable[[], Any], says: str) -> None:
    with pytest.raises(DataError, match=says):
        call()


@pytest.mark.spark
def test_pairs_keep_order_dtype_and_structure(spark: SparkSession) -> None:
    sc = spark.sparkContext
    rdd = to_simple_rdd(sc, X.astype("float32"), CLASSES)
    assert rdd.getNumPartitions() == sc.defaultParallelism
    x, y = zip(*rdd.collect(), strict=True)
    np.testing.assert_array_equal(x, X.astype("float32"))
    np.testing.assert_array_equal(y, CLASSES)
    assert (x[0].dtype, y[0].dtype) == (np.dtype("float32"), CLASSES.dtype)

    features = {"left": X, "text": np.array([["a\0", f"{row}"] for row in range(23)])}
    several = to_simple_rdd(sc, features, [CLASSES, ONE_HOT]).collect()
    assert [row[0]["text"].tolist()[1] for row in several] == [f"{row}" for row in range(23)]
    np.testing.assert_array_equal([row[0]["left"] for row in several], X)
    np.testing.assert_array_equal([row[1][1] for row in several], ONE_HOT)
    assert {type(row[1]) for row in several} == {list}

    one = to_simple_rdd(sc, X[:1], CLASSES[:1]).collect()  # fewer rows than partitions
    assert len(one) == 1


@pytest.mark.spark
def test_the_driver_makes_slices_and_no_rows(spark: SparkSession, monkeypatch: pytest.MonkeyPatch) -> None:
    """200 MB in half a million rows: what is handed to Spark is counted, and must not copy the array."""
    handed_over: list[list[np.ndarray]] = []
    partitions: list[int] = []
    sc = spark.sparkContext
    real = SparkContext.parallelize

    def parallelize(self: SparkContext, elements: Any, count: int | None = None) -> Any:
        handed_over.extend(elements)
        partitions.append(count or 0)
        return real(self, [])

    monkeypatch.setattr(SparkContext, "parallelize", parallelize)
    features, labels = np.zeros((500_000, 100), "float32"), np.zeros(500_000, "int64")
    size = features.nbytes + labels.nbytes
    for adapter in (to_simple_rdd, to_labeled_point, to_data_frame):
        handed_over.clear(), partitions.clear()
        adapter(sc, features, labels)
        assert len(handed_over) <= 2 * size / slices.BLOCK_BYTES
        assert sum(len(columns[0]) for columns in handed_over) == 500_000
        assert all(np.shares_memory(columns[0], features) for columns in handed_over)
        assert size / partitions[0] <= slices.PARTITION_BYTES  # what Spark takes in one task
        assert len(handed_over) % partitions[0] == 0  # equally many each


@pytest.mark.spark
def test_arrays_beyond_the_heap_of_the_jvm_are_refused_before_it_breaks(spark: SparkSession) -> None:
    rows = np.broadcast_to(np.zeros(1, "int8"), (2**45, 1))  # 32 TiB by its shape, one byte in memory
    with pytest.raises(ConfigError, match=r"32768.0 GiB.*driver-memory"):
        slices.slices_of(spark.sparkContext, [rows])


@pytest.mark.spark
@pytest.mark.parametrize("to", [to_labeled_point, to_data_frame])
def test_points_and_frames_hold_the_rows_in_order(to: Any, spark: SparkSession) -> None:
    back = from_labeled_point if to is to_labeled_point else from_data_frame
    sc = spark.sparkContext
    many = np.arange(3 * 40_000.0).reshape(-1, 3)
    features, labels = back(to(sc, many, np.arange(40_000)))
    np.testing.assert_array_equal(features, many)
    np.testing.assert_array_equal(labels, np.arange(40_000))
    assert (features.dtype, labels.dtype) == (np.float64, np.int64)

    one_hot = to(sc, X, ONE_HOT, categorical=True)
    np.testing.assert_array_equal(back(one_hot)[1], CLASSES)
    np.testing.assert_array_equal(back(one_hot, True)[1], ONE_HOT)
    np.testing.assert_array_equal(back(one_hot, True, 6)[1], np.eye(6)[CLASSES])
    np.testing.assert_array_equal(
        back(to(sc, X, X[:, :1]))[1], X[:, 0]
    )  # a regression's labels are not cut to integers


@pytest.mark.spark
def test_a_frame_has_columns_that_spark_ml_takes(spark: SparkSession) -> None:
    frame = to_data_frame(spark.sparkContext, X.astype("float32"), CLASSES)
    assert frame.dtypes == [("features", "vector"), ("label", "double")]
    row = frame.first()
    assert row is not None
    assert isinstance(row.features, ml.DenseVector)
    assert "temp_table" not in [table.name for table in spark.catalog.listTables()]


@pytest.mark.spark
def test_pairs_of_points_and_of_frames_are_the_rows(spark: SparkSession) -> None:
    sc = spark.sparkContext
    points = to_labeled_point(sc, X, CLASSES)
    sparse = sc.parallelize([LabeledPoint(1, mllib.SparseVector(3, [2], [5.0]))])
    frame = to_data_frame(sc, X, CLASSES)
    old = spark.createDataFrame(points).selectExpr("features as `my x`", "label as `my.y`")
    for rdd in (
        lp_to_simple_rdd(points, True),
        lp_to_simple_rdd(points, True, 4),
        df_to_simple_rdd(frame, True),
        df_to_simple_rdd(frame, True, 4),
        df_to_simple_rdd(old, True, features_col="my x", label_col="my.y"),
    ):
        x, y = zip(*rdd.collect(), strict=True)
        np.testing.assert_array_equal(x, X)
        np.testing.assert_array_equal(y, ONE_HOT)
    for rdd in (lp_to_simple_rdd(points), df_to_simple_rdd(frame)):
        assert [label for _, label in rdd.collect()] == CLASSES.tolist()
    np.testing.assert_array_equal(lp_to_simple_rdd(sparse).first()[0], [0, 0, 5])
    assert "temp_table" not in [table.name for table in spark.catalog.listTables()]

    parts = spark.createDataFrame([(1.5, [2.0], "a", True)], "a double, b array<float>, c string, label boolean")
    (x, y), *_ = df_to_simple_rdd(parts, features_col=["a", "b", "c"]).collect()
    assert (x["a"], x["b"].tolist(), x["c"], y) == (1.5, [2.0], "a", True)


def holes() -> np.ndarray:
    labels = CLASSES.astype(float)
    labels[5] = np.nan
    return labels


BAD = {
    "arrays of different length": (lambda s: to_simple_rdd(s.sparkContext, X, CLASSES[:9]), "features has 23.*labels.* 9"),
    "several arrays of different length": (
        lambda s: to_simple_rdd(s.sparkContext, [X, X[:4]], CLASSES),
        r"features has 23 rows, but features\[1\] has 4",
    ),
    "no rows": (lambda s: to_simple_rdd(s.sparkContext, X[:0], CLASSES[:0]), "0 rows"),
    "a NaN among labels": (lambda s: to_simple_rdd(s.sparkContext, X, holes()), "in row 5, the label is NaN"),
    "a NaN in a label of a row": (lambda s: to_simple_rdd(s.sparkContext, X, np.c_[CLASSES, holes()]), "in row 5"),
    "strings as labels": (lambda s: to_labeled_point(s.sparkContext, X, ["a"] * 23), "must be numbers: encode them"),
    "labels that are None": (lambda s: to_simple_rdd(s.sparkContext, X, None), "labels is None"),
    "features of three dimensions": (lambda s: to_data_frame(s.sparkContext, X[:, None], CLASSES), r"\(23, 1, 3\)"),
    "one-hot labels that are not said to be": (
        lambda s: to_labeled_point(s.sparkContext, X, ONE_HOT),
        r"\(23, 4\); expected \(rows,\), or categorical=True",
    ),
    "classes that are said to be one-hot": (lambda s: to_labeled_point(s.sparkContext, X, CLASSES, True), "one-hot"),
    "a one-hot label of zeros": (lambda s: to_data_frame(s.sparkContext, X, ONE_HOT * 0, True), "in row 0.*no class"),
    "rows that are no points": (
        lambda s: from_labeled_point(s.sparkContext.parallelize([(1, 2)], 1)),
        "in row 0 of partition 0, there is a <class 'tuple'>",
    ),
    "no RDD": (lambda s: lp_to_simple_rdd([LabeledPoint(1, [1.0])]), "expected an RDD of LabeledPoints.*list"),  # type: ignore[arg-type]
    "no points": (lambda s: from_labeled_point(s.sparkContext.emptyRDD()), "no rows"),
    "no points to find the classes in": (
        lambda s: lp_to_simple_rdd(s.sparkContext.emptyRDD(), True),
        "no rows.*give num_classes",
    ),
    "vectors of different length": (
        lambda s: from_labeled_point(s.sparkContext.parallelize([LabeledPoint(0, [1.0]), LabeledPoint(0, [1.0, 2.0])])),
        r"\(1,\).*\(2,\)",
    ),
    "a NaN in a point": (
        lambda s: from_labeled_point(s.sparkContext.parallelize([LabeledPoint(np.nan, [1.0])], 1)),
        "in row 0 of partition 0, the label is NaN",
    ),
    "a label outside the classes": (
        lambda s: from_labeled_point(to_labeled_point(s.sparkContext, X, CLASSES), True, 3),
        r"in row 3, the label is 3.0, but the classes are 0 to 2",
    ),
    "a negative label": (lambda s: from_data_frame(to_data_frame(s.sparkContext, X, -CLASSES), True), "row 1.*-1.0"),
    "a label between classes": (
        lambda s: lp_to_simple_rdd(to_labeled_point(s.sparkContext, X, CLASSES + 0.5), True),
        "the label is 3.5, but classes are whole numbers",
    ),
    "a NaN among which the classes are to be found": (
        lambda s: df_to_simple_rdd(s.createDataFrame([([1.0], float("nan"))], "features array<double>, label double"), True),
        "NaN",
    ),
    "a missing column": (
        lambda s: df_to_simple_rdd(to_data_frame(s.sparkContext, X, CLASSES), label_col="y"),
        r"no column 'y'; its columns are \['features', 'label'\]",
    ),
    "a null in a frame": (
        lambda s: from_data_frame(s.createDataFrame([([1.0], None)], "features array<double>, label double")),
        "'label' has a null",
    ),
}  # fmt: skip


@pytest.mark.spark
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name: str, spark: SparkSession) -> None:
    call, says = BAD[name]
    with pytest.raises(DataError, match=says):
        call(spark)


@pytest.mark.spark
def test_what_is_refused_while_spark_reads_names_value_row_and_partition(spark: SparkSession) -> None:
    sc = spark.sparkContext
    for rdd in (
        lp_to_simple_rdd(to_labeled_point(sc, X, CLASSES).coalesce(1), True, 3),
        df_to_simple_rdd(to_data_frame(sc, X, CLASSES).coalesce(1), True, 3),
    ):
        with pytest.raises(PySparkException, match=r"DataError: in row 3 of partition 0, the label is 3.0"):
            rdd.collect()


@pytest.mark.spark
def test_as_the_first_call_of_a_session_they_run_this_python(
    spark: SparkSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    sc = spark.sparkContext
    points = sc.parallelize([LabeledPoint(label, [1.0]) for label in range(4)])
    frame = spark.createDataFrame([([1.0], 0.0)], "features array<double>, label double")
    monkeypatch.delenv("PYSPARK_PYTHON", raising=False)
    calls: list[Callable[[], Any]] = [
        lambda: to_simple_rdd(sc, np.ones((4, 1)), np.arange(4)).count(),
        lambda: len(from_labeled_point(points)[1]),
        lambda: lp_to_simple_rdd(points).count(),
        lambda: 4 * len(from_data_frame(frame)[1]),
        lambda: 4 * df_to_simple_rdd(frame).count(),
    ]
    for call in calls:
        monkeypatch.setattr(sc, "pythonExec", "python3-of-another-environment")
        assert call() == 4


@pytest.mark.spark
def test_a_label_that_is_infinite_is_no_whole_number(spark: SparkSession) -> None:
    points = spark.sparkContext.parallelize([LabeledPoint(float("inf"), [1.0]), LabeledPoint(2.0, [2.0])])
    np.testing.assert_array_equal(from_labeled_point(points)[1], [np.inf, 2.0])
