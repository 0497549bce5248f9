"""Training, evaluation and prediction through the drop-in, in the call shapes of all eras. One fit serves many assertions.

What is marked "Elephas:" does not work in Elephas 7.3.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from pyspark.mllib.linalg import Matrices, Matrix, Vector, Vectors
from pyspark.sql import SparkSession
from sklearn.datasets import load_digits

from allreduce_spark import Checkpoint
from allreduce_spark.checkpoint.store import Store
from allreduce_spark.elephas.gone import tell_about_modes
from allreduce_spark.elephas.spark_model import AsynchronousSparkModel, SparkMLlibModel, SparkModel
from allreduce_spark.elephas.utils.rdd_utils import to_labeled_point, to_simple_rdd
from allreduce_spark.errors import ConfigError, DataError

pytestmark = pytest.mark.spark


def signs(rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and whether their sum is positive."""
    x = np.random.default_rng(0).normal(size=(rows, 3)).astype("float32")
    return x, (x.sum(axis=1) > 0).astype("int64")


def binary(**arguments: Any) -> keras.Model:
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1, activation="sigmoid")])
    model.compile(keras.optimizers.Adam(0.05), "binary_crossentropy", **arguments)
    return model


def digits_model() -> keras.Model:
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(64, activation="relu"), keras.layers.Dense(10, activation="softmax")]
    model = keras.Sequential([keras.Input((64,)), *layers])
    model.compile(keras.optimizers.Adam(0.005), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def test_training_reaches_the_accuracy_of_plain_keras_on_handwritten_digits(spark: SparkSession) -> None:
    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype("float32")
    train, test = slice(0, 1400), slice(1400, None)
    plain = digits_model()
    plain.fit(x[train], y[train], epochs=8, batch_size=64, verbose=0)
    _, plain_accuracy = plain.evaluate(x[test], y[test], verbose=0)

    model = digits_model()
    spark_model = SparkModel(model, num_workers=2)
    spark_model.fit(to_simple_rdd(spark.sparkContext, x[train], y[train]), epochs=8, batch_size=32, verbose=0)

    loss, accuracy = spark_model.evaluate(x[test], y[test])
    assert accuracy > plain_accuracy - 0.02 > 0.85
    assert [loss, accuracy] == pytest.approx(model.evaluate(x[test], y[test], verbose=0), abs=1e-6)
    assert np.mean(spark_model.predict_classes(x[test]) == y[test]) == pytest.approx(accuracy, abs=1e-6)


def test_few_rows_per_worker_are_trained_on_and_the_optimizer_comes_back(spark: SparkSession, tmp_path: Path) -> None:
    # Elephas: 8 workers with 25 rows each and batch_size 64 train nothing; batch_size must be given; the optimizer's state is
    # lost.
    x, y = signs(200)
    rdd = to_simple_rdd(spark.sparkContext, x, y)
    model = binary(metrics=["acc"])
    spark_model = SparkModel(model, num_workers=8)
    before, _ = spark_model.evaluate(x, y)

    with pytest.warns(UserWarning, match="num_workers=8, but this Spark application has 2 slots: 2 ranks train"):
        history = spark_model.fit(rdd, epochs=3, batch_size=64, verbose=0, validation_split=0.1)

    after, _ = spark_model.evaluate(x, y)
    assert after < 0.95 * before
    assert spark_model.training_histories == [history.history]
    assert set(history.history) == {"loss", "acc", "val_loss", "val_acc"}
    assert len(history.history["loss"]) == 3
    assert int(spark_model.master_network.optimizer.iterations) == 3 * 2  # 90 rows a rank are two steps

    spark_model.num_workers, spark_model.batch_size = 2, 50
    spark_model.fit(rdd, verbose=0, checkpoint=Checkpoint(str(tmp_path / "store")), resume="auto", max_restarts=0)
    assert Store(tmp_path / "store").checkpoints()[-1].epoch == 1
    assert int(model.optimizer.iterations) == 6 + 2  # 100 rows a rank
    assert len(spark_model.training_histories) == 2
    assert spark_model.evaluate(x, y)[0] < after


def test_the_shapes_of_0_3_and_local_epochs_without_a_server(spark: SparkSession) -> None:
    x, y = signs(96)
    model = binary()
    spark_model = SparkModel(spark.sparkContext, model, frequency="epoch", mode="asynchronous", num_workers=2)
    before = spark_model.evaluate(x, y)
    assert isinstance(before, float)  # there are no metrics
    rdd = to_simple_rdd(spark.sparkContext, x, y)
    tell_about_modes.cache_clear()
    with pytest.warns(UserWarning, match="there is no parameter server") as caught:
        spark_model.train(rdd, nb_epoch=2, batch_size=16, verbose=0, validation_split=0.1)
    assert len([warning for warning in caught if "no parameter server" in str(warning.message)]) == 1
    (history,) = spark_model.training_histories
    assert len(history["val_loss"]) == 2
    assert spark_model.evaluate(x, y) < before
    assert spark_model.sync_every == "epoch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tell_about_modes()  # it has been said


def test_several_inputs_and_outputs_are_parts_of_one_array(spark: SparkSession) -> None:
    left, right = keras.Input((2,)), keras.Input((2,))
    joined = keras.layers.Concatenate()([left, right])
    model = keras.Model(
        [left, right], [keras.layers.Dense(1, name="a")(joined), keras.layers.Dense(1, name="b")(joined)]
    )
    model.compile("sgd", ["mse", "mse"], metrics=[["mae"], ["mae"]])
    x = np.random.default_rng(0).normal(size=(32, 4)).astype("float32")
    y = x[:, :2]
    spark_model = AsynchronousSparkModel(model, 2, frequency="batch", parameter_server_mode="socket", port=4001)
    before = spark_model.evaluate(x, y)
    assert before == pytest.approx(model.evaluate(np.hsplit(x, 2), np.hsplit(y, 2), verbose=0), rel=1e-5)

    spark_model.fit(to_simple_rdd(spark.sparkContext, x, y), epochs=2, batch_size=8, verbose=0)

    assert spark_model.sync_every == 1
    assert spark_model.evaluate(x, y)[0] < before[0]
    for predictions in (spark_model.predict(x), spark_model.predict(spark.sparkContext.parallelize(list(x), 3))):
        for mine, theirs in zip(predictions, model.predict(np.hsplit(x, 2), verbose=0), strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)
    with pytest.raises(DataError, match=r"shape \(4, 3\) cannot be cut into"):
        spark_model.predict(np.ones((4, 3)))


def test_area_under_the_curve_is_that_of_one_process(spark: SparkSession) -> None:
    # Elephas: metrics are averaged over partitions, which is wrong for all that are no mean over rows.
    x, y = signs(301)
    y[::7] = 1 - y[::7]
    model = binary(metrics=[keras.metrics.AUC(name="auc"), "acc"])
    spark_model = SparkModel(model, num_workers=2)
    assert spark_model.evaluate(x, y, verbose=0) == pytest.approx(model.evaluate(x, y, verbose=0), abs=1e-6)
    weights = np.linspace(0, 1, len(x))
    named = spark_model.evaluate(x, y, sample_weight=weights, batch_size=7, return_dict=True)
    assert named == pytest.approx(model.evaluate(x, y, sample_weight=weights, verbose=0, return_dict=True), abs=1e-6)


def test_predictions_are_a_list_of_rows_in_order_however_few_there_are(spark: SparkSession) -> None:
    # Elephas: two rows for four workers fail.
    x, _ = signs(23)
    model = binary()
    spark_model = SparkModel(model, num_workers=4)
    whole = model.predict(x, verbose=0)
    for rows in (2, 23):
        for data in (x[:rows], spark.sparkContext.parallelize(list(x[:rows]), 4)):
            predictions = spark_model.predict(data)
            assert isinstance(predictions, list)
            assert all(isinstance(row, np.ndarray) and row.shape == (1,) for row in predictions)
            np.testing.assert_allclose(predictions, whole[:rows], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(spark_model.predict_classes(x), whole > 0.5)


def test_labeled_points_are_trained_on_and_vectors_and_matrices_predicted(spark: SparkSession) -> None:
    # Elephas: predict of a Matrix or a Vector always fails.
    x, y = signs(64)
    one_hot = np.eye(2)[y]
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, activation="softmax")])
    model.compile(keras.optimizers.Adam(0.05), "categorical_crossentropy", metrics=["acc"])
    spark_model = SparkMLlibModel(model, num_workers=2, mode="synchronous")
    before, _ = spark_model.evaluate(x, one_hot)
    points = to_labeled_point(spark.sparkContext, x, one_hot, categorical=True)

    spark_model.train(points, epochs=2, batch_size=16, verbose=0, validation_split=0.1, categorical=True, nb_classes=2)

    assert len(spark_model.training_histories[0]["val_acc"]) == 2
    assert spark_model.evaluate(x, one_hot)[0] < before
    expected = model.predict(x[:4], verbose=0)
    matrix = spark_model.predict(Matrices.dense(4, 3, x[:4].ravel(order="F").astype("float64")))
    assert isinstance(matrix, Matrix)
    np.testing.assert_allclose(matrix.toArray(), expected, rtol=1e-5)
    vector = spark_model.predict(Vectors.dense(x[0]))
    assert isinstance(vector, Vector)
    np.testing.assert_allclose(vector.toArray(), expected[0], rtol=1e-5)
    np.testing.assert_allclose(spark_model.predict(x[:4]), expected, rtol=1e-5)


def test_keyword_arguments_of_keras_are_passed_on_and_unknown_ones_are_refused(spark: SparkSession) -> None:
    x, y = signs(32)
    spark_model = SparkModel(binary(), num_workers=2)
    rdd = to_simple_rdd(spark.sparkContext, x, y)
    with pytest.raises(TypeError, match="steps_per_epoch"):
        spark_model.fit(rdd, steps_per_epoch=3)
    with pytest.raises(ConfigError, match="batch_size must be at least 1"):
        spark_model.fit(rdd, nb_epoch=2, batch_size=0)
    with pytest.raises(TypeError, match="steps"):
        spark_model.evaluate(x, y, steps=3)
