"""Keras's settings on their way: what a model is loaded with, in a process that goes on afterwards as it was."""

from __future__ import annotations

import threading

import keras
import numpy as np
import pytest

from allreduce_spark.config import FitConfig, Timeouts
from allreduce_spark.data import arrays_to_blocks
from allreduce_spark.errors import ConfigError
from allreduce_spark.training.inference import predict_rows
from allreduce_spark.training.job import Job, check_arrival, load_job, make_job
from allreduce_spark.training.scoring import Scorer, pack
from allreduce_spark.training.settings import KerasSettings


@pytest.fixture(autouse=True)
def settings():
    """Those that there were come back after the test."""
    before = KerasSettings.here()
    yield before
    before.set()


class Inner(keras.Model):
    """Makes its layers in the constructor, of whatever type is the usual one where it is called."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.dense, self.convolution = keras.layers.Dense(3), keras.layers.Conv1D(2, 3)

    def call(self, x):
        return self.convolution(self.dense(x))


def inner():
    model = Inner()
    model.compile("sgd", "mse")
    model(np.zeros((1, 6, 2)))
    return model


def test_settings_are_those_that_were_set_and_come_back_after_a_while(settings):
    keras.config.set_floatx("float64")
    keras.config.set_epsilon(1e-4)
    keras.config.set_image_data_format("channels_first")
    keras.config.set_dtype_policy("mixed_bfloat16")
    those = KerasSettings.from_json(KerasSettings.here().to_json())
    settings.set()
    with those.in_force():
        assert KerasSettings.here() == those
        assert (keras.config.floatx(), keras.config.epsilon()) == ("float64", 1e-4)
        assert (keras.config.image_data_format(), keras.layers.Dense(1).compute_dtype) == ("channels_first", "bfloat16")
    assert KerasSettings.here() == settings


def test_where_no_policy_was_set_layers_go_by_floatx():
    found = []

    def in_a_thread_of_its_own():
        keras.config.set_floatx("float64")
        found.append(KerasSettings.here())
        with found[0].in_force():
            found.append(keras.layers.Dense(1).dtype)

    thread = threading.Thread(target=in_a_thread_of_its_own)
    thread.start()
    thread.join()
    assert (found[0].policy, found[1]) == (None, "float64")


def test_a_model_is_loaded_with_its_own_policy_also_by_a_thread_that_has_another(settings, tmp_path):
    keras.config.set_dtype_policy("mixed_bfloat16")
    model, jobs = inner(), []
    thread = threading.Thread(target=lambda: jobs.append(make_job(model, {}, [], FitConfig(), Timeouts())))
    thread.start()
    thread.join()
    for name, content in jobs[0].files().items():
        (tmp_path / name).write_bytes(content)
    settings.set()
    job = Job.read(tmp_path)
    arrived, _ = load_job(job)
    check_arrival(arrived, job)
    assert arrived.dense.compute_dtype == "bfloat16"


def test_layers_that_would_be_made_with_another_policy_are_refused(settings, tmp_path):
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = Inner(dtype="float32")  # its layers are of mixed_bfloat16
    model(np.zeros((1, 6, 2)))
    model.compile("sgd", "mse")
    job = make_job(model, {}, [], FitConfig(), Timeouts())
    for name, content in job.files().items():
        (tmp_path / name).write_bytes(content)
    arrived, _ = load_job(Job.read(tmp_path))
    with pytest.raises(ConfigError, match=r"kernel \(float32 in float32, there float32 in mixed_bfloat16\)"):
        check_arrival(arrived, job)


def test_a_worker_computes_as_the_driver_does_and_goes_on_as_it_was(settings, tmp_path):
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    model = inner()
    x = np.random.default_rng(0).normal(size=(5, 6, 2))
    expected, packed = model.predict(x, verbose=0), pack(model)
    settings.set()
    blocks = [block for _, block in arrays_to_blocks(x, role="train", num_shards=1)]
    outputs = predict_rows(packed, 2, blocks, tmp_path)
    scorer = Scorer(packed, "", with_outputs=True)
    assert KerasSettings.here() == settings
    (scored,), _ = scorer({"x": x})
    assert KerasSettings.here() == settings
    assert outputs.dtype == scored.dtype == np.float64
    np.testing.assert_allclose(outputs, expected, rtol=1e-12)
    np.testing.assert_allclose(scored, expected, rtol=1e-12)
