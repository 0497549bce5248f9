"""Through Spark with Keras's settings other than they are: ranks, workers and functions compute as the driver does."""

from __future__ import annotations

import sys

import cloudpickle
import keras
import numpy as np
import pytest
from pyspark import cloudpickle as spark_cloudpickle
from pyspark.sql import SparkSession

from allreduce_spark import AllReduceTransformer, Communicator, SparkModel, run
from allreduce_spark.training.settings import KerasSettings

pytestmark = pytest.mark.spark

for pickler in (cloudpickle, spark_cloudpickle):
    pickler.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture(autouse=True)
def settings(spark: SparkSession):
    before = KerasSettings.here()
    yield
    before.set()


class Own(keras.Model):
    """Makes its layers in the constructor, of whatever type is the usual one where it is called."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.hidden, self.last = keras.layers.Dense(16, "relu"), keras.layers.Dense(3, dtype=self.variable_dtype)

    def call(self, x):
        return self.last(self.hidden(x))


def rows_of(count):
    x = np.random.default_rng(0).normal(size=(count, 8))
    return x, (x[:, 0] + x[:, 1] > 0).astype("int64")


def own():
    keras.utils.set_random_seed(3)
    model = Own()
    model(np.zeros((1, 8)))
    model.compile(keras.optimizers.Adam(0.01), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def functional():
    keras.utils.set_random_seed(3)
    model = keras.Sequential(
        [keras.Input((8,)), keras.layers.Dense(16, "relu"), keras.layers.Dense(3, dtype="float32")]
    )
    model.compile(keras.optimizers.Adam(0.01), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


@pytest.mark.parametrize(
    ("build", "policy", "floatx", "relative"),
    [
        (functional, "mixed_float16", "float32", 5e-3),
        (own, "mixed_bfloat16", "float32", 2e-2),
        (own, "float64", "float64", 1e-12),
    ],
)
def test_fits_and_workers_compute_with_the_types_of_plain_keras(spark, build, policy, floatx, relative):
    keras.config.set_floatx(floatx)
    keras.config.set_dtype_policy(policy)
    x, y = rows_of(96)
    plain, ours = build(), build()
    arguments = {"epochs": 2, "shuffle": False, "verbose": 0}
    model = SparkModel(ours, num_ranks=2)
    for _ in range(2):  # the second goes on from what came back
        plain.fit(x, y, batch_size=16, **arguments)
        model.fit((x, y), batch_size=8, **arguments)
        for variable, weight, expected in zip(plain.weights, ours.get_weights(), plain.get_weights(), strict=True):
            assert weight.dtype == expected.dtype
            assert np.abs(weight - expected).max() < relative * np.abs(expected).max(), variable.path
    assert len(ours.optimizer.variables) == len(plain.optimizer.variables)
    assert ours.optimizer.iterations.numpy() == plain.optimizer.iterations.numpy()

    expected = ours.predict(x, verbose=0)
    outputs = model.predict(x)
    assert outputs.dtype == expected.dtype
    np.testing.assert_allclose(outputs, expected, rtol=relative / 10, atol=relative / 10)
    assert model.evaluate((x, y))["loss"] == pytest.approx(ours.evaluate(x, y, verbose=0), rel=max(relative / 10, 1e-6))
    frame = spark.createDataFrame([(row.tolist(),) for row in x[:20]], "features array<double>")
    transformer = AllReduceTransformer(ours, predictionCol="", probabilityCol="", rawPredictionCol="raw")
    rows = transformer.setParams(outputType="array").transform(frame).collect()
    np.testing.assert_allclose([row["raw"] for row in rows], expected[:20], rtol=relative / 10, atol=relative / 10)

    types = spark.sparkContext.parallelize(range(4), 4).map(lambda _: (keras.config.floatx(), type_of_a_layer()))
    assert types.collect() == [("float32", "float32")] * 4, "a worker goes on as it was"


def type_of_a_layer() -> str:
    return keras.layers.Dense(1).dtype_policy.name


def look_around(communicator: Communicator) -> KerasSettings:
    return KerasSettings.here()


def test_a_function_finds_the_settings_of_the_driver():
    keras.config.set_floatx("float64")
    keras.config.set_epsilon(1e-5)
    keras.config.set_image_data_format("channels_first")
    keras.config.set_dtype_policy("mixed_bfloat16")
    assert run(look_around, num_ranks=2) == [KerasSettings.here()] * 2
