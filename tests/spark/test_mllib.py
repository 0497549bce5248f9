"""LabeledPoints, vectors and matrices through a model: the same numbers as plain Keras."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pyspark.ml.linalg as ml
import pyspark.mllib.linalg as mllib
import pytest
from pyspark import RDD
from pyspark.mllib.regression import LabeledPoint
from pyspark.sql import SparkSession

from allreduce_spark import Checkpoint
from allreduce_spark.checkpoint.store import Store
from allreduce_spark.errors import ConfigError, DataError
from allreduce_spark.rendezvous import controller, group
from allreduce_spark.spark.adapters import to_labeled_point, to_matrix, to_vector
from allreduce_spark.spark.mllib import SparkMLlibModel

pytestmark = pytest.mark.spark

GENERATOR = np.random.default_rng(0)
CLASSES = np.arange(60) % 3
X = GENERATOR.normal(size=(60, 4)) + 3 * np.eye(4)[CLASSES]
LOSSES = {True: "categorical_crossentropy", False: "sparse_categorical_crossentropy"}


def compiled(loss: Any = LOSSES[True]) -> keras.Model:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, activation="softmax")])
    model.compile(keras.optimizers.SGD(0.5), loss, metrics=["accuracy"])
    return model


def unbuilt() -> keras.Model:
    model = keras.Sequential([keras.layers.Dense(3)])
    model.compile("sgd", "mse")
    return model


def with_two_outputs() -> keras.Model:
    inputs = keras.Input((4,))
    model = keras.Model(inputs, {"one": keras.layers.Dense(1)(inputs), "two": keras.layers.Dense(2)(inputs)})
    model.compile("sgd", {"one": "mse", "two": "mse"})
    return model


@pytest.fixture
def points(spark: SparkSession) -> RDD[LabeledPoint]:
    """Dense points, and every third one sparse."""

    def mixed(point: LabeledPoint) -> LabeledPoint:
        sparse = mllib.SparseVector(4, range(4), point.features)
        return LabeledPoint(point.label, sparse) if point.label == 1 else point

    return to_labeled_point(spark.sparkContext, X, CLASSES).map(mixed)


def test_two_ranks_learn_the_classes_of_labeled_points_as_one_process_does(
    points: RDD[LabeledPoint], tmp_path: Path
) -> None:
    mllib_model, alone = SparkMLlibModel(compiled(), num_ranks=2), compiled()
    settings = {"epochs": 4, "shuffle": False, "verbose": 0}
    # Batches of all rows, so that both take the same steps whichever rank has which row.
    safety = {"checkpoint": Checkpoint(str(tmp_path / "store")), "resume": "auto", "max_restarts": 0, "min_ranks": 1}
    history = mllib_model.fit(points, categorical=True, batch_size=30, validation_data=points, **settings, **safety)
    assert Store(tmp_path / "store").checkpoints()[-1].epoch == 4
    reference = alone.fit(X, np.eye(3)[CLASSES], batch_size=60, **settings)

    np.testing.assert_allclose(history.history["loss"], reference.history["loss"], rtol=1e-5)
    np.testing.assert_allclose(mllib_model.predict(to_matrix(X)), alone.predict(X, verbose=0), rtol=1e-4)
    result = mllib_model.evaluate(points, categorical=True)
    expected = alone.evaluate(X, np.eye(3)[CLASSES], verbose=0, return_dict=True)
    assert result == pytest.approx(expected, rel=1e-4)
    assert history.history["val_loss"][-1] == pytest.approx(result["loss"], rel=1e-4)
    assert result["accuracy"] > 0.9


def test_vectors_and_matrices_of_any_kind_are_predicted_as_keras_does() -> None:
    model = compiled()
    expected = model.predict(X, verbose=0)
    mllib_model = SparkMLlibModel(model)
    row, matrix = X[7], mllib.DenseMatrix(60, 4, X.ravel(), isTransposed=True)
    for vector in (to_vector(row), ml.DenseVector(row), mllib.SparseVector(4, range(4), row), to_vector(row).asML()):
        outputs = mllib_model.predict(vector)
        assert outputs.shape == (3,)
        np.testing.assert_allclose(outputs, expected[7], rtol=1e-6)
    for form in (to_matrix(X), matrix, matrix.asML(), matrix.toSparse()):
        np.testing.assert_allclose(mllib_model.predict(form), expected, rtol=1e-6)


def test_a_vector_has_outputs_in_the_structure_of_the_model() -> None:
    model = with_two_outputs()
    outputs = SparkMLlibModel(model).predict(to_vector(X[0]))
    expected = model.predict(X[:1], verbose=0)
    assert {name: array.shape for name, array in outputs.items()} == {"one": (1,), "two": (2,)}
    np.testing.assert_allclose(outputs["two"], expected["two"][0], rtol=1e-6)


def test_rdds_of_vectors_and_of_points_are_predicted_in_order_by_one_job(
    points: RDD[LabeledPoint], spark: SparkSession
) -> None:
    model, sc = compiled(), spark.sparkContext
    expected = model.predict(X, verbose=0)
    vectors = points.map(lambda point: point.features)
    for number, rdd in enumerate((points, vectors, vectors.map(lambda vector: vector.asML()))):
        sc.setJobGroup(f"mllib-{number}", "")
        try:
            np.testing.assert_allclose(SparkMLlibModel(model).predict(rdd), expected, rtol=1e-5)
        finally:
            sc.setLocalProperty("spark.jobGroup.id", None)  # type: ignore[arg-type]
        assert len(sc.statusTracker().getJobIdsForGroup(f"mllib-{number}")) == 1


def rdd(*rows: Any) -> Callable[[SparkSession], Any]:
    return lambda spark: spark.sparkContext.parallelize(rows, 1)


GOOD = LabeledPoint(0, X[0])
# data, arguments of fit, the class of the error, what it says
BAD_FITS: dict[str, tuple[Callable[[SparkSession], Any], dict[str, Any], type[Exception], str]] = {
    "arrays": (lambda s: (X, CLASSES), {}, DataError, "expected an RDD of LabeledPoints, got <class 'tuple'>"),
    "an RDD of pairs": (rdd((X[0], 1)), {}, DataError, "row 0 of partition 0, there is a <class 'tuple'>"),
    "vectors of a wrong length": (rdd(*[LabeledPoint(0, [1.0, 2.0])] * 4), {}, DataError, r"\(2,\).*\(4,\)"),
    "a class beyond the last": (rdd(GOOD, LabeledPoint(3, X[0])), {}, DataError, "row 1 .*label is 3.0.*0 to 2"),
    "a class beyond the last, not one-hot": (
        rdd(GOOD, LabeledPoint(3, X[0])),
        {"categorical": False},
        DataError,
        "row 1 .*label is 3.0.*0 to 2",
    ),
    "a bad class among validation_data": (
        rdd(*[GOOD] * 4),
        {"validation_data": rdd(LabeledPoint(7, X[0]))},
        DataError,
        "label is 7.0",
    ),
    "a wrong number of classes": (rdd(GOOD), {"num_classes": 5}, ConfigError, "num_classes is 5.*width 3"),
    "no number of classes": (rdd(GOOD), {"num_classes": 0}, ConfigError, "positive integer"),
}


@pytest.mark.parametrize("name", BAD_FITS)
def test_what_cannot_be_fitted_is_refused_before_any_rank_starts(
    name: str, spark: SparkSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    formed: list[Any] = []
    monkeypatch.setattr(controller, "form_group", lambda *args: formed.append(args) or group.form_group(*args))
    data, arguments, kind, says = BAD_FITS[name]
    arguments = {"categorical": True, "verbose": 0} | {
        key: value(spark) if callable(value) else value for key, value in arguments.items()
    }
    model = compiled(LOSSES[arguments["categorical"]])
    with pytest.raises(kind, match=says):
        SparkMLlibModel(model, num_ranks=1).fit(data(spark), **arguments)
    assert formed == []


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (rdd(GOOD, GOOD, 1.0), "row 2 of partition 0.*float.*LabeledPoint"),
        (rdd(GOOD, LabeledPoint(0, [1.0])), r"row 1, x has shape \(1,\)"),
        (rdd(GOOD, LabeledPoint(-1, X[0])), "row 1 of partition 0, the label is -1.0"),
        (rdd(LabeledPoint(0.5, X[0])), "label is 0.5, but classes are whole numbers"),
        (rdd(LabeledPoint(np.nan, X[0])), "the label is NaN"),
        (rdd(), "no rows"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    data: Callable[[SparkSession], Any], says: str, spark: SparkSession
) -> None:
    with pytest.raises(DataError, match=says):
        SparkMLlibModel(compiled(LOSSES[False])).evaluate(data(spark))


def test_numbers_are_no_classes_and_are_not_held_to_them(spark: SparkSession) -> None:
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    numbers = to_labeled_point(spark.sparkContext, X, 10 * X[:, 0])
    expected = model.evaluate(X, 10 * X[:, 0], verbose=0)
    assert SparkMLlibModel(model).evaluate(numbers)["loss"] == pytest.approx(expected, rel=1e-5)

    ignoring = compiled(keras.losses.SparseCategoricalCrossentropy(ignore_class=-1))
    labels = np.where(CLASSES == 2, -1, CLASSES)
    result = SparkMLlibModel(ignoring).evaluate(to_labeled_point(spark.sparkContext, X, labels), batch_size=30)
    # Keras takes the mean of such a loss over the rows that count in a batch: the batches must be the same.
    assert result["loss"] == pytest.approx(ignoring.evaluate(X, labels, batch_size=30, verbose=0)[0], rel=1e-4)


@pytest.mark.parametrize(
    ("data", "kind", "says"),
    [
        (lambda s: to_vector(X[0, :3]), DataError, r"\(3,\).*\(4,\)"),
        (lambda s: to_matrix(X[:, :3]), DataError, r"\(3,\).*\(4,\)"),
        (lambda s: mllib.DenseMatrix(0, 4, []), DataError, "no rows"),
        (rdd(X[0]), DataError, "in row 0 of partition 0, there is a <class 'numpy.ndarray'>; expected a vector"),
        (rdd(to_vector(X[0, :3])), DataError, r"\(3,\).*\(4,\)"),
        (rdd(), DataError, "no rows"),
    ],
)
def test_what_cannot_be_predicted_is_refused(
    data: Callable[[SparkSession], Any], kind: type[Exception], says: str, spark: SparkSession
) -> None:
    with pytest.raises(kind, match=says):
        SparkMLlibModel(compiled()).predict(data(spark))


def test_a_model_without_weights_predicts_nothing() -> None:
    with pytest.raises(ConfigError, match="no weights yet"):
        SparkMLlibModel(unbuilt()).predict(to_vector(X[0]))
