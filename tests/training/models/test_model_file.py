"""One file with a model and its settings: what is written is read again, and what is no such file is refused."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import zipfile

import h5py
import keras
import numpy as np
import pytest
from keras.src.saving import serialization_lib

from allreduce_spark.errors import ConfigError
from allreduce_spark.training.models.model_file import read_model_file, write_model_file

X = np.random.default_rng(0).normal(size=(16, 3)).astype("float32")
Y = X.sum(axis=1, keepdims=True)
SETTINGS = {"num_ranks": 2, "foo": "bar", "nested": {"list": [1, None]}}


def trained(*, loss="mse", metrics=("mae",), layer=None) -> keras.Model:
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((3,)), layer or keras.layers.Dense(4), keras.layers.Dense(1)])
    model.compile("adam", loss, metrics=list(metrics))
    model.fit(X, Y, epochs=2, batch_size=4, verbose=0)
    return model


@keras.saving.register_keras_serializable(package="tests")
def own_loss(y_true, y_pred):
    return keras.ops.mean((y_true - y_pred) ** 4, axis=-1)


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
@pytest.mark.parametrize(
    ("loss", "metrics"),
    [
        ("mse", ["mae"]),
        ("mean_squared_error", []),
        (keras.losses.Huber(delta=0.5), [keras.metrics.RootMeanSquaredError(), "mean_absolute_error"]),
        (own_loss, ["mse"]),
    ],
)
def test_weights_settings_and_optimizer_state_come_back(tmp_path, suffix, loss, metrics):
    model, path = trained(loss=loss, metrics=metrics), tmp_path / f"model{suffix}"
    write_model_file(path, model, "SparkModel", SETTINGS)
    assert model._compile_config.config["optimizer"] is not None  # Keras takes it out where it writes HDF5
    back = read_model_file(path)
    assert (back.class_name, back.settings) == ("SparkModel", SETTINGS)
    assert back.model.optimizer.iterations == 8
    for ours, theirs in zip(back.model.optimizer.variables, model.optimizer.variables, strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy())
    for each in (model, back.model):
        each.fit(X, Y, batch_size=4, shuffle=False, verbose=0)
    np.testing.assert_array_equal(back.model.predict(X, verbose=0), model.predict(X, verbose=0))
    assert back.model.evaluate(X, Y, verbose=0, return_dict=True) == model.evaluate(X, Y, verbose=0, return_dict=True)


def test_an_hdf5_file_keeps_an_optimizer_whose_names_do_not_fit_in_one_attribute(tmp_path):
    long = "a_layer_with_a_name_of_some_length_" * 20
    model = keras.Sequential([keras.Input((1,)), *(keras.layers.Dense(1, name=f"{long}{i}") for i in range(30))])
    model.compile("adam", "mse")
    model.fit(X[:, :1], Y, verbose=0)
    write_model_file(tmp_path / "model.h5", model, "SparkModel", {})
    with h5py.File(tmp_path / "model.h5") as file:
        assert "weight_names1" in file["optimizer_weights"].attrs  # HDF5 holds 64 KiB in one
    back = read_model_file(tmp_path / "model.h5").model
    for ours, theirs in zip(back.optimizer.variables, model.optimizer.variables, strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy())


def test_an_hdf5_file_keeps_a_metric_that_wraps_a_function_of_the_user(tmp_path):
    def own_mean(y_true, y_pred):
        return keras.ops.mean(y_true - y_pred, axis=-1)

    model = trained(metrics=[keras.metrics.MeanMetricWrapper(own_mean, name="mine")])
    write_model_file(tmp_path / "model.h5", model, "SparkModel", {})
    back = read_model_file(tmp_path / "model.h5", {"own_mean": own_mean}).model
    assert back.evaluate(X, Y, verbose=0, return_dict=True) == model.evaluate(X, Y, verbose=0, return_dict=True)


def test_plain_keras_reads_what_we_write_and_we_read_what_it_writes(tmp_path):
    model = trained(loss="mean_squared_error", metrics=[])
    write_model_file(tmp_path / "ours.keras", model, "SparkModel", SETTINGS)
    model.save(tmp_path / "theirs.keras")
    model.save(tmp_path / "theirs.h5")
    expected = model.predict(X, verbose=0)
    theirs = keras.saving.load_model(tmp_path / "ours.keras")
    np.testing.assert_array_equal(theirs.predict(X, verbose=0), expected)
    for name in ("theirs.keras", "theirs.h5"):
        back = read_model_file(tmp_path / name)
        assert (back.class_name, back.settings) == (None, {})
        np.testing.assert_array_equal(back.model.predict(X, verbose=0), expected)


def test_the_content_decides_not_the_name(tmp_path):
    write_model_file(tmp_path / "model.keras", trained(), "SparkModel", {})
    shutil.move(tmp_path / "model.keras", tmp_path / "model.h5")
    assert read_model_file(tmp_path / "model.h5").class_name == "SparkModel"


def pickled() -> bytes:
    return pickle.dumps(io.BytesIO)  # of a class: reading it would import and look up code


def zipped(entries: dict[str, str]) -> bytes:
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as archive:
        for name, text in entries.items():
            archive.writestr(name, text)
    return memory.getvalue()


@pytest.mark.parametrize("name", ["model.keras", "model.h5"])
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "it is empty"),
        (pickled(), "is a pickle"),
        (pickle.dumps([1], protocol=2), "is a pickle"),
        (b"GIF89a\x00\x00\x00", "begins with b'GIF89a"),
        (zipped({"readme.txt": "hello"}), "a zip file, but no Keras model: it lacks"),
        (b"PK\x03\x04 and no more", "is damaged, or was not written to its end"),
        (b"\x89HDF\r\n\x1a\n and no more", "is damaged, or was not written to its end"),
    ],
)
def test_what_is_no_model_file_is_refused_by_its_content(tmp_path, name, content, says):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=says) as refused:
        read_model_file(path)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_a_truncated_file_is_refused(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    write_model_file(path, trained(), "SparkModel", {})
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="is damaged, or was not written to its end"):
        read_model_file(path)


def test_a_flipped_bit_is_found(tmp_path):
    path = tmp_path / "model.keras"
    write_model_file(path, trained(), "SparkModel", {})
    with zipfile.ZipFile(path) as archive:
        weights = archive.getinfo("model.weights.h5")
    content = bytearray(path.read_bytes())
    content[weights.header_offset + weights.compress_size // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"damaged.*'model.weights.h5'"):
        read_model_file(path)


def test_an_hdf5_file_without_a_model_is_refused(tmp_path):
    with h5py.File(tmp_path / "data.h5", "w") as file:
        file["x"] = X
    with pytest.raises(ConfigError, match="an HDF5 file, but no Keras model"):
        read_model_file(tmp_path / "data.h5")


def test_a_file_of_a_newer_version_is_refused(tmp_path):
    path = tmp_path / "model.keras"
    trained().save(path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("allreduce_spark.json", json.dumps({"format_version": 99, "surprise": True}))
    with pytest.raises(ConfigError, match=r"newer version of allreduce-spark \(format 99; this one reads up to 1\)"):
        read_model_file(path)


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_bytecode_in_a_file_runs_only_if_the_user_says_so(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    model = trained(layer=keras.layers.Lambda(lambda x: 2 * x, output_shape=(3,)))
    write_model_file(path, model, "SparkModel", {})
    with pytest.raises(ConfigError, match="safe_mode=False"):
        read_model_file(path)
    with serialization_lib.SafeModeScope(False):  # what keras.config.enable_unsafe_deserialization sets for good
        assert read_model_file(path).class_name == "SparkModel"
    back = read_model_file(path, safe_mode=False).model
    np.testing.assert_allclose(back.predict(X, verbose=0), model.predict(X, verbose=0), rtol=1e-6)


class OwnLayer(keras.layers.Dense):
    """Not registered with Keras."""


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_a_class_that_is_not_there_is_named(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    write_model_file(path, trained(layer=OwnLayer(4)), "SparkModel", {})
    with pytest.raises(ConfigError, match=r"(?s)OwnLayer.*pass custom_objects"):
        read_model_file(path)
    assert read_model_file(path, {"OwnLayer": OwnLayer}).model.optimizer.iterations == 8


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [("model", {}, "must end in .keras"), ("model.keras", {"a": object()}, "a setting of SparkModel cannot be saved")],
)
def test_what_cannot_be_written_is_refused(tmp_path, name, settings, says):
    with pytest.raises(ConfigError, match=says):
        write_model_file(tmp_path / name, trained(), "SparkModel", settings)
    assert not (tmp_path / name).exists()
