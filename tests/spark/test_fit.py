"""fit, evaluate and predict on a real Spark session: whatever form the data has, the result is a trained Keras model.

That it is exactly the model one process would have trained is shown in tests/training; here it is what surrounds this.
Each fit takes seconds, because ranks import TensorFlow: one fit serves several assertions where that stays readable.
"""

from __future__ import annotations

import csv
import logging
import sys
from pathlib import Path
from typing import Any

import cloudpickle
import keras
import numpy as np
import pytest
from pyspark import cloudpickle as spark_cloudpickle
from pyspark.ml.linalg import Vectors
from pyspark.sql import SparkSession

from allreduce_spark import SparkModel

pytestmark = pytest.mark.spark

# pytest loads this file under a name that executors cannot import, so what it defines travels as code. (In a script
# that is so by itself.)
for pickler in (cloudpickle, spark_cloudpickle):
    pickler.register_pickle_by_value(sys.modules[__name__])


def line(rows: int, features: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a linear function, which any optimizer finds quickly."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(rows, features)).astype("float32")
    return x, x.sum(axis=1, keepdims=True)


def regression(features: int = 4, optimizer: Any = "sgd", **arguments: Any) -> keras.Model:
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((features,)), keras.layers.Dense(1)])
    model.compile(optimizer, "mse", **arguments)
    return model


def plain(x: Any, y: Any, batch_size: int, **arguments: Any) -> keras.Model:
    """What one process makes of the same rows."""
    model = regression()
    model.fit(x, y, batch_size=batch_size, shuffle=False, verbose=0, **arguments)
    return model


def assert_same_weights(model: keras.Model, other: keras.Model) -> None:
    for mine, theirs in zip(model.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)


# Arrays


def test_fit_on_arrays_gives_the_history_and_the_state_that_plain_keras_gives(
    spark: SparkSession, caplog: pytest.LogCaptureFixture
) -> None:
    x, y = line(64)
    model = regression(optimizer=keras.optimizers.Adam(0.01), metrics=["mae"])
    model.jit_compile = True  # as Keras has it on a GPU
    spark_model = SparkModel(model, num_ranks=2)

    with caplog.at_level(logging.INFO, "allreduce_spark"):
        history = spark_model.fit((x, y), epochs=2, batch_size=8, shuffle=False, validation_split=0.25, verbose=0)
    assert len([record for record in caplog.records if "train without jit_compile" in record.message]) == 1
    assert model.jit_compile

    expected_model = regression(optimizer=keras.optimizers.Adam(0.01), metrics=["mae"])
    expected = expected_model.fit(x, y, epochs=2, batch_size=16, shuffle=False, validation_split=0.25, verbose=0)
    assert isinstance(history, keras.callbacks.History)
    assert model.history is history
    assert history.epoch == [0, 1]
    assert history.params["epochs"] == 2
    assert set(history.history) == {"loss", "mae", "val_loss", "val_mae"}
    assert_same_weights(model, expected_model)
    for name, values in expected.history.items():
        np.testing.assert_allclose(history.history[name], values, rtol=1e-4, err_msg=name)
    assert int(model.optimizer.iterations) == int(expected_model.optimizer.iterations) == 6

    # A second fit goes on where the first ended, moments of Adam included.
    history = spark_model.fit((x, y), epochs=3, initial_epoch=2, batch_size=8, shuffle=False, verbose=0)
    expected_model.fit(x, y, epochs=3, initial_epoch=2, batch_size=16, shuffle=False, verbose=0)
    assert history.epoch == [2]
    assert int(model.optimizer.iterations) == 10
    assert_same_weights(model, expected_model)


def test_dicts_and_tuples_of_arrays_feed_models_with_several_inputs_and_outputs(spark: SparkSession) -> None:
    x, y = line(32)
    left, right = keras.Input((3,), name="left"), keras.Input((1,), name="right")
    joined = keras.layers.Concatenate()([left, right])
    total = keras.layers.Dense(1, name="total")(joined)
    sign = keras.layers.Dense(1, activation="sigmoid", name="sign")(joined)
    model = keras.Model({"left": left, "right": right}, {"total": total, "sign": sign})
    model.compile(
        "sgd",
        {"total": "mse", "sign": "binary_crossentropy"},
        loss_weights={"total": 1.0, "sign": 0.5},
        metrics={"total": ["mae"], "sign": ["accuracy"]},
    )
    spark_model = SparkModel(model, num_ranks=2)
    inputs = {"left": x[:, :3], "right": x[:, 3:]}
    outputs = {"total": y, "sign": (y > 0).astype("float32")}

    history = spark_model.fit((inputs, outputs), epochs=1, batch_size=8, verbose=0)

    assert {"loss", "total_loss", "sign_loss", "total_mae", "sign_accuracy"} <= set(history.history)
    predictions = spark_model.predict(inputs)
    expected = model.predict(inputs, verbose=0)
    assert set(predictions) == {"total", "sign"}
    for name in predictions:
        np.testing.assert_allclose(predictions[name], expected[name], rtol=1e-5, atol=1e-6)
    evaluation = spark_model.evaluate((inputs, outputs))
    for name, value in model.evaluate(inputs, outputs, return_dict=True, verbose=0).items():
        assert evaluation[name] == pytest.approx(value, rel=1e-4), name


def test_tuples_of_arrays_and_sample_weights_as_the_third_element(spark: SparkSession) -> None:
    x, y = line(32)
    first, second = keras.Input((2,)), keras.Input((2,))
    output = keras.layers.Dense(1)(keras.layers.Concatenate()([first, second]))
    model = keras.Model([first, second], output)
    model.compile("sgd", "mse", weighted_metrics=["mae"])
    weights = np.linspace(0, 2, 32).astype("float32")
    start = model.get_weights()

    history = SparkModel(model, num_ranks=2).fit(
        ((x[:, :2], x[:, 2:]), y, weights), batch_size=4, shuffle=False, verbose=0
    )

    trained = model.get_weights()
    model.set_weights(start)
    model.compile("sgd", "mse", weighted_metrics=["mae"])
    expected = model.fit([x[:, :2], x[:, 2:]], y, sample_weight=weights, batch_size=8, shuffle=False, verbose=0)
    for mine, theirs in zip(trained, model.get_weights(), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)
    assert history.history["mae"] == pytest.approx(expected.history["mae"], rel=1e-4)


# RDDs


def test_an_rdd_with_uneven_partitions_is_trained_on_to_the_last_row(spark: SparkSession) -> None:
    x, y = line(50)
    rows = list(zip(x, y, strict=True))
    # One large partition, a small one, and empty ones: 5 in all, for 2 ranks.
    rdd = spark.sparkContext.parallelize(range(5), 5).flatMap(lambda i: {1: rows[:47], 3: rows[47:]}.get(i, []))
    model = regression()

    # One batch holds all rows, so the order of the rows does not matter for the weights.
    history = SparkModel(model, num_ranks=2).fit(
        rdd, epochs=2, batch_size=50, validation_data=(x[:10], y[:10]), verbose=0
    )

    expected = plain(x, y, 50, epochs=2)
    assert_same_weights(model, expected)
    assert history.history["val_loss"][-1] == pytest.approx(expected.evaluate(x[:10], y[:10], verbose=0), rel=1e-4)


def test_fewer_rows_than_ranks_leave_a_rank_without_rows_and_still_train(spark: SparkSession) -> None:
    x, y = line(1)
    model = regression()
    SparkModel(model, num_ranks=2).fit(spark.sparkContext.parallelize([(x[0], y[0])], 4), epochs=2, verbose=0)
    assert_same_weights(model, plain(x, y, 1, epochs=2))


def test_one_rank_is_plain_keras(spark: SparkSession) -> None:
    x, y = line(20)
    model = regression()
    rdd = spark.sparkContext.parallelize(list(zip(x, y, strict=True)), 3)
    SparkModel(model, num_ranks=1).fit(rdd, batch_size=4, shuffle=False, verbose=0)
    assert_same_weights(model, plain(x, y, 4))


# DataFrames


def test_a_data_frame_of_arrays_with_weights_and_an_rdd_to_validate_on(spark: SparkSession) -> None:
    x, y = line(24)
    weights = np.linspace(0.5, 1.5, 24)
    rows = [(a.tolist(), float(b[0]), float(w)) for a, b, w in zip(x, y, weights, strict=True)]
    frame = spark.createDataFrame(rows, "pixels array<float>, target float, importance double").repartition(3)
    model = regression()

    history = SparkModel(model, num_ranks=2).fit(
        frame,
        features_col="pixels",
        label_col="target",
        weight_col="importance",
        batch_size=24,
        validation_data=spark.sparkContext.parallelize(list(zip(x, y, strict=True)), 2),
        verbose=0,
    )

    assert_same_weights(model, plain(x, y, 24, sample_weight=weights))
    assert history.history["val_loss"] == pytest.approx([model.evaluate(x, y, verbose=0)], rel=1e-4)


def test_a_data_frame_of_vectors_dense_and_sparse(spark: SparkSession) -> None:
    x, y = line(24)
    x[::2, 1:] = 0
    y = x.sum(axis=1)
    vectors = [Vectors.sparse(4, {0: float(a[0])}) if i % 2 == 0 else Vectors.dense(a) for i, a in enumerate(x)]
    rows = [(vector, float(b)) for vector, b in zip(vectors, y, strict=True)]
    frame = spark.createDataFrame(rows, ["features", "label"])
    model = regression()
    spark_model = SparkModel(model, num_ranks=2)

    spark_model.fit(frame, batch_size=24, verbose=0)

    assert_same_weights(model, plain(x, y, 24))
    np.testing.assert_allclose(spark_model.predict(frame), model.predict(x, verbose=0), rtol=1e-5, atol=1e-6)
    assert spark_model.evaluate(frame)["loss"] == pytest.approx(model.evaluate(x, y, verbose=0), rel=1e-4)


def test_several_feature_columns_are_the_inputs_of_their_names(spark: SparkSession) -> None:
    x, y = line(24)
    a, b = keras.Input((), name="a"), keras.Input((2,), name="b")
    joined = keras.layers.Concatenate()([keras.layers.Reshape((1,))(a), b])
    model = keras.Model({"a": a, "b": b}, keras.layers.Dense(1)(joined))
    model.compile("sgd", "mse")
    rows = [(float(r[0]), r[1:3].tolist(), float(t[0])) for r, t in zip(x, y, strict=True)]
    frame = spark.createDataFrame(rows, "a float, b array<float>, label float")
    spark_model = SparkModel(model, num_ranks=2)
    before = spark_model.evaluate(frame, features_col=["a", "b"])["loss"]

    spark_model.fit(frame, features_col=["a", "b"], epochs=3, batch_size=4, verbose=0)

    assert spark_model.evaluate(frame, features_col=["a", "b"])["loss"] < before
    inputs = {"a": x[:, 0], "b": x[:, 1:3]}
    np.testing.assert_allclose(
        spark_model.predict(frame, features_col=["b", "a"]), model.predict(inputs, verbose=0), rtol=1e-5, atol=1e-6
    )


# Models


class Scale(keras.layers.Layer):
    def __init__(self, factor: float = 2.0, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.factor = factor

    def call(self, inputs: Any) -> Any:
        return inputs * self.factor

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "factor": self.factor}


class Quartic(keras.losses.Loss):
    def call(self, y_true: Any, y_pred: Any) -> Any:
        return keras.ops.mean((y_true - y_pred) ** 4, axis=-1)


class Largest(keras.metrics.Metric):
    """The number of rows with a prediction above 0: a sum over the rows, so it can be told apart from a mean over ranks."""

    def __init__(self, name: str = "above", **arguments: Any) -> None:
        super().__init__(name=name, **arguments)
        self.count = self.add_variable((), initializer="zeros", name="count")

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        self.count.assign_add(keras.ops.sum(keras.ops.cast(y_true > 0, "float32")))

    def result(self) -> Any:
        return self.count


def test_an_unbuilt_model_of_the_users_own_layers_loss_and_metric(spark: SparkSession) -> None:
    x, y = line(32)
    model = keras.Sequential([Scale(0.5), keras.layers.Dense(1)])
    model.compile("adam", Quartic(), metrics=[Largest()])
    spark_model = SparkModel(model, num_ranks=2)
    assert not model.built

    history = spark_model.fit((x, y), epochs=2, batch_size=4, verbose=0)

    assert model.built
    assert history.history["above"] == [int((y > 0).sum())] * 2
    assert int(model.optimizer.iterations) == 8
    assert spark_model.evaluate((x, y))["above"] == int((y > 0).sum())
    np.testing.assert_allclose(spark_model.predict(x), model.predict(x, verbose=0), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_model_of_thirty_million_parameters_comes_back_whole(spark: SparkSession) -> None:
    x = np.ones((8, 3000), "float32")
    model = keras.Sequential([keras.Input((3000,)), keras.layers.Dense(10_000), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    assert model.count_params() > 30_000_000
    before = model.get_weights()

    SparkModel(model, num_ranks=2).fit((x, np.zeros(8)), batch_size=4, verbose=0)

    after = model.get_weights()
    assert all(not np.array_equal(one, other) for one, other in zip(before, after, strict=True))
    model.set_weights(before)
    model.compile("sgd", "mse")
    model.fit(x, np.zeros(8), batch_size=8, verbose=0)
    np.testing.assert_allclose(after[0], model.get_weights()[0], rtol=1e-3, atol=1e-5)


# Callbacks


def test_callbacks_that_decide_decide_alike_and_those_that_write_write_once(
    spark: SparkSession, tmp_path: Path
) -> None:
    x, y = line(40)
    model = regression(optimizer=keras.optimizers.SGD(0.1))
    rates = [0.1, 0.05, 0.0, 0.0, 0.0, 0.0]
    callbacks = [
        keras.callbacks.LearningRateScheduler(rates.__getitem__),
        keras.callbacks.EarlyStopping("loss", patience=2, min_delta=1e-3, restore_best_weights=True),
        keras.callbacks.ModelCheckpoint(str(tmp_path / "epoch-{epoch}.keras")),
        keras.callbacks.CSVLogger(str(tmp_path / "log.csv")),
    ]

    history = SparkModel(model, num_ranks=2).fit((x, y), epochs=6, batch_size=5, callbacks=callbacks, verbose=0)

    # With a rate of 0 nothing improves any more: two such epochs, and EarlyStopping ends it.
    assert len(history.history["loss"]) == 5
    assert history.history["learning_rate"] == pytest.approx(rates[:5])
    assert sorted(path.name for path in tmp_path.glob("*.keras")) == [f"epoch-{n}.keras" for n in range(1, 6)]
    loaded = keras.saving.load_model(tmp_path / "epoch-3.keras")
    assert_same_weights(loaded, model)
    assert loaded.evaluate(x, y, verbose=0) < history.history["loss"][0]
    with (tmp_path / "log.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in lines] == [0, 1, 2, 3, 4]
    assert [float(row["loss"]) for row in lines] == pytest.approx(history.history["loss"])


def test_reduce_lr_on_plateau_lowers_the_rate_on_all_ranks(spark: SparkSession) -> None:
    x, y = line(16)
    model = regression(optimizer=keras.optimizers.SGD(1e-9))
    plateau = keras.callbacks.ReduceLROnPlateau("loss", factor=0.5, patience=1, min_delta=1.0)
    history = SparkModel(model, num_ranks=2).fit((x, y), epochs=3, batch_size=8, callbacks=[plateau], verbose=0)
    assert history.history["learning_rate"] == pytest.approx([1e-9, 1e-9, 5e-10])
    assert float(model.optimizer.learning_rate) == pytest.approx(2.5e-10)


def test_a_loss_of_nan_ends_the_fit_with_terminate_on_nan(spark: SparkSession) -> None:
    x, y = line(40)
    x[1] = np.nan  # on one rank only
    model = regression()
    history = SparkModel(model, num_ranks=2).fit(
        (x, y), epochs=50, batch_size=2, callbacks=[keras.callbacks.TerminateOnNaN()], verbose=0
    )
    assert len(history.history["loss"]) == 1


# predict and evaluate


def test_predict_and_evaluate_equal_plain_keras_in_order_on_all_forms_of_data(spark: SparkSession) -> None:
    keras.utils.set_random_seed(3)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, activation="sigmoid")])
    model.compile("sgd", "binary_crossentropy", metrics=[keras.metrics.AUC(name="auc"), "accuracy"])
    x, _ = line(37)
    y = (x[:, 0] + 0.5 * x[:, 1] > 0).astype("float32")
    spark_model = SparkModel(model)
    rdd = spark.sparkContext.parallelize(list(zip(x, y, strict=True)), 5)
    frame = spark.createDataFrame([(a.tolist(), float(b)) for a, b in zip(x, y, strict=True)], ["features", "label"])
    empty_partitions = rdd.zipWithIndex().filter(lambda pair: pair[1] > 30).keys()

    expected = model.predict(x, verbose=0)
    for data in (x, (x, y), rdd, rdd.keys(), frame, frame.select("features")):
        np.testing.assert_allclose(spark_model.predict(data, batch_size=8), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(spark_model.predict(empty_partitions), expected[31:], rtol=1e-5, atol=1e-6)

    wanted = model.evaluate(x, y, return_dict=True, verbose=0)
    for data in ((x, y), rdd, frame):
        result = spark_model.evaluate(data, batch_size=8)
        assert next(iter(result)) == "loss"
        assert result == pytest.approx(wanted, rel=1e-5)
