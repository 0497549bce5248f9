"""Models from JSON text and optimizers from settings, of Keras 3 and of Keras 2."""

from __future__ import annotations

import json
from typing import Any

import keras
import numpy as np
import pytest

from allreduce_spark.errors import ConfigError
from allreduce_spark.training.models.architecture import compile_model, model_from_json, optimizer_of, settings_of


def dense(name: str, units: int, source: str, **more: Any) -> dict[str, Any]:
    """A layer as tf.keras 2.15 wrote it, in a module that is gone."""
    return {
        "module": "keras.src.layers",
        "class_name": "Dense",
        "registered_name": None,
        "build_config": {"input_shape": [None, 3]},
        "config": {"name": name, "units": units, "activation": "relu", **more},
        "name": name,
        "inbound_nodes": [[[source, 0, 0, {}]]],
    }


def test_a_functional_model_of_keras_2_is_built() -> None:
    given = {
        "class_name": "InputLayer",
        "config": {"batch_input_shape": [None, 3], "dtype": "float32", "sparse": False, "ragged": False, "name": "in"},
        "name": "in",
        "inbound_nodes": [],
    }
    layers = [given, dense("hidden", 4, "in", batch_input_shape=[None, 3]), dense("out", 2, "hidden")]
    config = {
        "class_name": "Functional",
        "config": {"name": "m", "layers": layers, "input_layers": [["in", 0, 0]], "output_layers": [["out", 0, 0]]},
        "keras_version": "2.15.0",
    }
    model = model_from_json(json.dumps(config))
    assert (model.input_shape, model.output_shape) == ((None, 3), (None, 2))
    assert [weight.shape for weight in model.get_weights()] == [(3, 4), (4,), (4, 2), (2,)]


def test_a_model_with_own_parts_comes_back_as_it_was() -> None:
    def own(x: Any) -> Any:
        return x * 2.0

    def own_loss(y: Any, p: Any) -> Any:
        return keras.ops.mean((y - p) ** 2, axis=-1)

    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1, activation=own)])
    model.compile(keras.optimizers.Adam(0.25, beta_1=0.5), own_loss, metrics=["mae"])
    settings = settings_of(model)
    parts = {"own": own, "own_loss": own_loss}
    again = model_from_json(settings["keras_model_config"], parts)
    again.set_weights(model.get_weights())
    compile_model(again, settings["optimizer_config"], "own_loss", settings["metrics"], parts)
    x, y = np.ones((2, 3)), np.ones((2, 1))
    assert again.evaluate(x, y, verbose=0) == model.evaluate(x, y, verbose=0)
    assert again.optimizer.get_config() == model.optimizer.get_config()


@pytest.mark.parametrize("text", ["{}", "no JSON", '{"class_name": "Sequential", "config": {"layers": [{}]}}', "[]"])
def test_what_is_no_model_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="Keras cannot build a model from"):
        model_from_json(text)


@pytest.mark.parametrize(
    ("identifier", "name", "rate"),
    [
        (None, "RMSprop", 0.001),
        ("sgd", "SGD", 0.01),
        (keras.optimizers.Adam(0.5), "Adam", 0.5),
        (keras.optimizers.serialize(keras.optimizers.Adam(0.5)), "Adam", 0.5),
        (keras.optimizers.Adagrad(0.5).get_config(), "Adagrad", 0.5),
        ({"name": "adam_12", "learning_rate": 0.5}, "Adam", 0.5),
        ({"name": "RMSprop", "lr": 0.5, "rho": 0.9, "epsilon": 1e-6}, "RMSprop", 0.5),
        (
            {
                "module": "keras.optimizers.legacy",
                "class_name": "Adam",
                "config": {"learning_rate": 0.5, "decay": 0.0, "is_legacy_optimizer": True, "epsilon": None},
            },
            "Adam",
            0.5,
        ),
    ],
)
def test_an_optimizer_is_found_in_whatever_form_it_is_named(identifier: Any, name: str, rate: float) -> None:
    optimizer = optimizer_of(identifier)
    assert type(optimizer).__name__ == name
    assert float(optimizer.learning_rate) == pytest.approx(rate)


@pytest.mark.parametrize("identifier", ["none such", {"name": "none such"}, {}, 3, {"name": "SGD", "speed": 3}])
def test_what_is_no_optimizer_is_refused(identifier: Any) -> None:
    with pytest.raises(ConfigError, match="Keras knows no optimizer"):
        optimizer_of(identifier)


def test_a_model_that_is_not_compiled_has_no_settings() -> None:
    with pytest.raises(ConfigError, match="not compiled"):
        settings_of(keras.Sequential([keras.layers.Dense(1)]))
