"""SparkModel.extract_features: what a layer makes of the rows, wherever they are."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from pyspark.sql import SparkSession

from allreduce_spark import SparkModel
from allreduce_spark.errors import ConfigError

pytestmark = pytest.mark.spark

X = np.random.default_rng(0).normal(size=(21, 5)).astype("float32")


def test_the_output_of_a_layer_for_arrays_tables_and_several_inputs_in_order(spark: SparkSession) -> None:
    keras.utils.set_random_seed(0)
    layers = [
        keras.layers.Reshape((5, 1)),
        keras.layers.Conv1D(3, 2, name="maps"),
        keras.layers.Flatten(),
        keras.layers.Dense(1),
    ]
    sequential = keras.Sequential([keras.Input((5,)), *layers])
    sequential.compile("sgd", lambda y, p: (y - p) ** 2)
    expected = keras.Model(sequential.inputs, sequential.get_layer("maps").output).predict(X, verbose=0)
    assert expected.shape == (21, 4, 3)
    frame = spark.createDataFrame([(row.tolist(),) for row in X], "pixels array<double>").coalesce(1)
    ours = SparkModel(sequential)
    for found in (
        ours.extract_features(X, "maps"),
        ours.extract_features(frame, "maps", batch_size=4, features_col="pixels"),
        ours.extract_features(spark.sparkContext.parallelize(list(X), 5), layer="maps"),
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)

    inputs = {"right": keras.Input((2,), name="r"), "left": keras.Input((3,), name="l")}
    both = keras.layers.Concatenate(name="both")([inputs["right"], inputs["left"]])
    named = keras.Model(inputs, {"out": keras.layers.Dense(1)(both)})
    named.compile("sgd", "mse")
    found = SparkModel(named).extract_features({"right": X[:, 3:], "left": X[:, :3]}, "both")
    np.testing.assert_allclose(found, X[:, [3, 4, 0, 1, 2]], rtol=1e-6)


class Subclassed(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.last = keras.layers.Dense(1)

    def call(self, x: Any) -> Any:
        return self.last(x)


def shared() -> keras.Model:
    layer, inputs = keras.layers.Dense(5, name="twice"), keras.Input((5,))
    return keras.Model(inputs, layer(layer(inputs)))


def subclassed() -> keras.Model:
    model = Subclassed()
    model(X)
    return model


@pytest.mark.parametrize(
    ("model", "layer", "words"),
    [
        (keras.Sequential([keras.Input((5,)), keras.layers.Dense(1, name="last")]), "lost", ["'lost'", "['last']"]),
        (shared(), "twice", ["'twice' has 2 outputs"]),
        (subclassed(), "last", ["functional and Sequential", "Subclassed"]),
        (keras.Sequential([keras.layers.Dense(1, name="last")]), "last", ["no weights yet"]),
    ],
)  # fmt: skip
def test_a_layer_that_cannot_be_had_is_refused(model: keras.Model, layer: str, words: list[str]) -> None:
    model.compile("sgd", "mse")
    with pytest.raises(ConfigError) as caught:
        SparkModel(model).extract_features(X, layer)
    for word in words:
        assert word in str(caught.value)
