"""Saving and loading a SparkModel: training goes on where it was."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from allreduce_spark import SparkModel
from allreduce_spark.errors import ConfigError

X = np.random.default_rng(0).normal(size=(48, 4)).astype("float32")
Y = (X[:, 0] > X[:, 1]).astype("int64")


def compiled(**arguments) -> SparkModel:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, "relu"), keras.layers.Dense(2, "softmax")])
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return SparkModel(model, **arguments)


@pytest.mark.spark
@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_a_loaded_model_goes_on_training_as_the_saved_one_would(spark, tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    first = compiled(num_ranks=2, sync_every="epoch")
    first.fit((X, Y), epochs=2, batch_size=8, verbose=0, seed=1)
    first.save(path)
    second = SparkModel.load(path)
    assert (second.num_ranks, second.sync_every) == (2, "epoch")
    assert second.model.optimizer.iterations == first.model.optimizer.iterations == 6
    ours, theirs = (each.fit((X, Y), epochs=1, batch_size=8, verbose=0, seed=2) for each in (first, second))
    assert ours.history == theirs.history
    np.testing.assert_array_equal(first.predict(X), second.predict(X))


def test_a_file_that_exists_is_replaced_only_on_request(tmp_path):
    path, spark_model = tmp_path / "model.keras", compiled()
    spark_model.save(path)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="exists already; pass overwrite=True"):
        spark_model.save(str(path))
    assert path.read_bytes() == before
    spark_model.save(path.as_uri(), overwrite=True)
    assert SparkModel.load(path.as_uri()).num_ranks is None


def test_what_cannot_be_saved_or_loaded_is_said(tmp_path):
    with pytest.raises(ConfigError, match=r"must end in \.keras"):
        compiled().save(tmp_path / "model.pt")
    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    with pytest.raises(ConfigError, match="has no weights yet"):
        SparkModel(model).save(tmp_path / "model.keras")
    with pytest.raises(ConfigError, match="there is no such file"):
        SparkModel.load(tmp_path / "model.keras")
    keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)]).save(tmp_path / "plain.keras")
    with pytest.raises(ConfigError, match="is not compiled"):
        SparkModel.load(tmp_path / "plain.keras")


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (0, "at least 1"),
        (1.5, "an integer"),
        ("batch", "'epoch', got 'batch'"),
        (True, "integer"),
        (None, "integer"),
    ],
)
def test_a_sync_every_that_makes_no_sense_is_refused(value, says):
    with pytest.raises(ConfigError, match=f"sync_every must be .*{says}"):
        compiled(sync_every=value)
