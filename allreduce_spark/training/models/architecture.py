"""A Keras model from the JSON text of its architecture, and an optimizer from its settings, of Keras 3 or older."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import keras

from allreduce_spark.errors import ConfigError

__all__ = ["compile_model", "model_from_json", "optimizer_of", "settings_of"]

# What optimizers of Keras 2 wrote into their settings beside their hyper-parameters.
_OF_OLD_OPTIMIZERS = ("is_legacy_optimizer", "jit_compile")


def model_from_json(text: str, custom_objects: Mapping[str, Any] | None = None) -> keras.Model:
    """The model that `keras.Model.to_json` described, with fresh weights, not compiled.

    Args:
        text: Of Keras 3, or of tf.keras 2.
        custom_objects: Classes and functions, by name, that Keras needs to build it.

    Raises:
        ConfigError: The text is no model of Keras, or the model needs code that is not here.
    """
    try:
        config = json.loads(text)
        if "module" in config:
            model = keras.models.model_from_json(text, dict(custom_objects or {}))
        else:  # Keras 2 named the class alone
            kind = keras.Sequential if config["class_name"] == "Sequential" else keras.Model
            with keras.saving.custom_object_scope(dict(custom_objects or {})):
                model = kind.from_config(_without_modules(config)["config"])
    except Exception as error:
        raise ConfigError(
            f"Keras cannot build a model from {str(text)[:60]!r}...: {type(error).__name__}: {error}. It takes what "
            "`model.to_json()` returns; pass the classes and functions that are your own as custom_objects."
        ) from error
    return model


def _without_modules(config: Mapping[str, Any]) -> dict[str, Any]:
    """Layers named by their class alone, as in Keras 2's HDF5 files: so Keras 3 reads what it no longer finds by module."""
    plain = {key: value for key, value in config.items() if key not in ("module", "registered_name", "build_config")}
    plain["class_name"] = config.get("registered_name") or config["class_name"]
    plain["config"] = dict(config["config"])
    if "layers" in plain["config"]:
        plain["config"]["layers"] = layers = [_without_modules(layer) for layer in config["config"]["layers"]]
        for layer in layers[1:]:  # the first is the input, which says the shape
            layer["config"].pop("batch_input_shape", None)
    return plain


def compile_model(
    model: keras.Model, optimizer: Any, loss: Any, metrics: Any, custom_objects: Mapping[str, Any] | None = None
) -> None:
    """Compile the model with a loss and metrics that may be names among `custom_objects`, and any `optimizer_of` value."""
    own = dict(custom_objects or {})

    def resolve(part: Any) -> Any:
        return own.get(part, part) if isinstance(part, str) else part

    loss, metrics = (keras.tree.map_structure(resolve, part) for part in (loss, metrics))
    with keras.saving.custom_object_scope(own):
        model.compile(optimizer=optimizer_of(optimizer), loss=loss, metrics=metrics)


def settings_of(model: keras.Model) -> dict[str, Any]:
    """The architecture of a compiled model and how it is compiled: `model_from_json` and `compile_model` take them apart.

    Raises:
        ConfigError: The model is not compiled.
    """
    compiled = model._compile_config.config if getattr(model, "_compile_config", None) is not None else None
    if compiled is None:
        raise ConfigError("the model is not compiled. Call model.compile(optimizer, loss, metrics=[...]) first.")
    return {
        "keras_model_config": model.to_json(),
        "loss": compiled.get("loss"),
        "metrics": compiled.get("metrics") or [],
        "optimizer_config": keras.optimizers.serialize(model.optimizer),
    }


def optimizer_of(identifier: Any) -> keras.optimizers.Optimizer:
    """The optimizer that is meant.

    Args:
        identifier: An optimizer; its name; what `keras.optimizers.serialize` made of one, in Keras 3 or 2; its settings
            alone, with the "name"; or None for Keras's own default, RMSprop.

    Raises:
        ConfigError: Keras knows no such optimizer.

    >>> optimizer_of({"name": "SGD", "lr": 0.5}).get_config()["learning_rate"]
    0.5
    """
    if isinstance(identifier, Mapping):
        settings = dict(identifier.get("config", identifier))
        name = identifier.get("class_name") or re.sub(r"_\d+$", "", str(settings.pop("name", None)))
        known = {key: value for key, value in settings.items() if value is not None and key not in _OF_OLD_OPTIMIZERS}
        if not known.get("decay"):
            known.pop("decay", None)
        if "lr" in known:
            known["learning_rate"] = known.pop("lr")
        # Without the name of a module: Keras 2 wrote some that are gone.
        identifier = {"class_name": name, "config": known}
    try:
        return keras.optimizers.get("rmsprop" if identifier is None else identifier)
    except Exception as error:
        raise ConfigError(f"Keras knows no optimizer {identifier!r}: {error}") from error
