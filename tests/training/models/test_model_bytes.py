"""A model arrives on another machine as it was: code, weights, compile settings, optimizer state; and comes back trained."""

from __future__ import annotations

import subprocess
import sys

import cloudpickle
import keras
import numpy as np
import pytest

from allreduce_spark.config import FitConfig, Timeouts
from allreduce_spark.errors import ConfigError
from allreduce_spark.training.job import Job, check_arrival, make_job
from allreduce_spark.training.models.model_bytes import (
    custom_objects_of,
    load_model,
    load_state,
    model_and_code,
    model_to_bytes,
    read_about,
    save_state,
)


class Doubling(keras.layers.Layer):
    """A layer that is registered nowhere."""

    def call(self, x):
        return 2 * x


def own_loss(y_true, y_pred):
    return keras.ops.mean(keras.ops.abs(y_true - y_pred), axis=-1)


def own_metric(y_true, y_pred):
    return keras.ops.max(y_pred, axis=-1)


def own_start(shape, dtype=None):
    return keras.ops.ones(shape, dtype)


class OwnDecay(keras.optimizers.schedules.LearningRateSchedule):
    def __call__(self, step):
        return 0.1

    def get_config(self):
        return {}


def custom_model():
    model = keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(4, kernel_initializer=own_start),
            Doubling(),
            keras.layers.Lambda(lambda x: x + 1),
            keras.layers.Dense(1),
        ]
    )
    model.compile(keras.optimizers.SGD(OwnDecay()), own_loss, metrics=[own_metric, "mae"])
    return model


CHILD = """
import sys, pathlib, cloudpickle, numpy, keras
from allreduce_spark.training.job import Job
from allreduce_spark.training.models.model_bytes import load_model
job = Job.read(pathlib.Path(sys.argv[1]))
objects, callbacks = cloudpickle.loads(job.objects)
model = load_model(job.model_path, objects)
prediction = model.predict(numpy.ones((1, 3)), verbose=0).tolist()
print(model.compiled, prediction, job.config == %r, [type(c).__name__ for c in callbacks])
print(model.train_on_batch(numpy.ones((2, 3)), numpy.ones((2, 1)))[0] > 0)
"""


def test_code_that_is_registered_nowhere_travels_with_the_model(tmp_path):
    model = custom_model()
    assert {"Doubling", "own_loss", "own_metric", "own_start", "OwnDecay"} <= set(custom_objects_of(model))
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # as if it were the user's __main__
    try:
        job = make_job(
            model, {}, [keras.callbacks.TerminateOnNaN()], FitConfig(epochs=3, class_weight={1: 2.0}), Timeouts()
        )
    finally:
        cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    for name, content in job.files().items():
        (tmp_path / name).write_bytes(content)
    assert Job.read(tmp_path).config == job.config
    code = "from allreduce_spark.config import FitConfig\n" + CHILD.replace("%r", repr(job.config))
    child = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, timeout=120)
    expected = model.predict(np.ones((1, 3)), verbose=0).tolist()
    assert child.stdout.splitlines() == [f"True {expected} True ['TerminateOnNaN']", "True"], child.stderr


def test_of_what_is_registered_with_keras_only_what_the_model_names_or_the_script_defines_travels():
    def registered(name, module):
        code = type(name, (keras.losses.MeanSquaredError,), {"__module__": module})
        return keras.saving.register_keras_serializable("test_model_bytes")(code)

    used, unused = registered("Used", "a_package"), registered("Unused", "a_package_that_executors_lack")
    own = registered("Own", "__main__")
    try:
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
        model.compile("sgd", used())
        _, code = model_and_code(model)
        assert code["test_model_bytes>Used"] is used
        assert code["test_model_bytes>Own"] is own  # its name may stand in the code of the script, where none can look
        assert unused not in code.values()
        assert model_and_code(model, {"test_model_bytes>Used": unused})[1]["test_model_bytes>Used"] is unused
    finally:
        for name in ("Used", "Unused", "Own"):
            del keras.saving.get_custom_objects()[f"test_model_bytes>{name}"]


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda: keras.optimizers.Adam(gradient_accumulation_steps=2, use_ema=True),
        lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(momentum=0.9)),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_all_state_comes_back_to_the_bit(tmp_path, optimizer, dtype):
    def build():
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dropout(0.1), keras.layers.Dense(2, dtype=dtype)])
        model.compile(optimizer(), "mse")
        model.optimizer.build(model.trainable_variables)
        return model

    trained, fresh = build(), build()
    trained.fit(np.random.rand(16, 2), np.random.rand(16, 2), verbose=0)
    save_state(trained, tmp_path / "state", {"history": {"loss": [1.5, float("nan")]}})
    load_state(fresh, tmp_path / "state")
    assert str(read_about(tmp_path / "state")) == "{'history': {'loss': [1.5, nan]}}"
    pairs = [*zip(trained.variables, fresh.variables, strict=True)]
    pairs += zip(trained.optimizer.variables, fresh.optimizer.variables, strict=True)
    assert len(pairs) > 5
    for ours, theirs in pairs:
        assert ours.numpy().tobytes() == theirs.numpy().tobytes(), ours.path


def test_state_of_another_model_is_refused(tmp_path):
    def build(width):
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(width)])
        model.compile("sgd", "mse")
        return model

    save_state(build(3), tmp_path / "state", {})
    with pytest.raises(ConfigError, match=r"has shape \(2, 4\), but was trained as \(2, 3\)"):
        load_state(build(4), tmp_path / "state")


def test_a_model_that_keras_cannot_save_is_refused_with_keras_own_reason():
    class NoConfig(keras.layers.Layer):
        def __init__(self, function):
            super().__init__()
            self.function = function

    model = keras.Sequential([keras.Input((2,)), NoConfig(open(__file__))])  # noqa: SIM115
    model.compile("sgd", "mse")
    with pytest.raises(ConfigError, match="cannot be sent to the ranks"):
        model_to_bytes(model)


def test_a_truncated_archive_is_a_clear_error(tmp_path):
    path = tmp_path / "model.keras"
    path.write_bytes(model_to_bytes(custom_model())[:500])
    with pytest.raises(ConfigError, match="cannot be loaded on the executors"):
        load_model(path, {})


def test_two_custom_functions_of_one_name_are_refused():
    def make(scale):
        def loss(y_true, y_pred):
            return scale * own_loss(y_true, y_pred)

        return loss

    inputs = keras.Input((2,))
    model = keras.Model(inputs, [keras.layers.Dense(1)(inputs), keras.layers.Dense(1)(inputs)])
    model.compile("sgd", [make(1.0), make(100.0)])
    with pytest.raises(ConfigError, match="two different things that are both called 'loss'"):
        custom_objects_of(model)


@keras.saving.register_keras_serializable("test_model_bytes")
class Frozen(keras.Model):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.first, self.second = keras.layers.Dense(2), keras.layers.Dense(1)

    def call(self, x):
        return self.second(self.first(x))


def test_a_layer_that_the_archive_would_thaw_is_refused(tmp_path):
    model = Frozen()
    model(np.zeros((1, 2)))
    model.first.trainable = False
    model.compile("sgd", "mse")
    job = make_job(model, {}, [], FitConfig(), Timeouts())
    for name, content in job.files().items():
        (tmp_path / name).write_bytes(content)
    arrived = load_model(Job.read(tmp_path).model_path, {})
    with pytest.raises(ConfigError, match="was set after the model was made"):
        check_arrival(arrived, Job.read(tmp_path))


@pytest.fixture
def mixed_float16():
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    yield
    keras.config.set_dtype_policy(before)


@pytest.mark.parametrize("loads_with", ["float32", "mixed_float16"])
@pytest.mark.parametrize("auto_scale_loss", [True, False])
def test_the_loss_is_scaled_where_the_users_model_scales_it_and_once(
    tmp_path, mixed_float16, loads_with, auto_scale_loss
):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse", auto_scale_loss=auto_scale_loss)
    model.fit(np.full((4, 2), 0.1), np.zeros((4, 1)), verbose=0)
    (tmp_path / "model.keras").write_bytes(model_to_bytes(model))
    keras.config.set_dtype_policy(loads_with)
    arrived = load_model(tmp_path / "model.keras", {}).optimizer
    assert type(arrived) is type(model.optimizer)
    if auto_scale_loss:
        assert type(arrived) is keras.optimizers.LossScaleOptimizer
        arrived = arrived.inner_optimizer
    assert type(arrived) is keras.optimizers.SGD
    assert int(arrived.iterations.numpy()) == 1


@pytest.mark.parametrize(
    ("loss", "metric"),
    [
        (keras.losses.Huber(delta=0.25), keras.metrics.CosineSimilarity(axis=0)),
        (keras.losses.CosineSimilarity(axis=0), keras.metrics.SparseTopKCategoricalAccuracy(k=2, from_sorted_ids=True)),
    ],
)
def test_settings_that_keras_forgets_to_save_arrive(tmp_path, loss, metric):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    model.compile("sgd", loss, metrics=[metric])
    before = [loss.get_config(), metric.get_config()]
    path = tmp_path / "model.keras"
    path.write_bytes(model_to_bytes(model))
    arrived = load_model(path, {})
    assert arrived.loss._fn_kwargs == loss._fn_kwargs
    compiled = arrived._compile_config.config["metrics"][0]
    assert compiled._fn_kwargs == metric._fn_kwargs
    assert [loss.get_config(), metric.get_config()] == before  # mended for the moment of saving only


def test_a_model_that_keras_has_saved_as_h5_still_has_its_optimizer(tmp_path):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    model.compile(keras.optimizers.Adam(0.5), "mse")
    model.save(tmp_path / "model.h5")
    path = tmp_path / "model.keras"
    path.write_bytes(model_to_bytes(model))
    assert float(load_model(path, {}).optimizer.learning_rate) == 0.5
