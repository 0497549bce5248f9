"""Keras's older HDF5 files, those of Keras 2 among them: reading what Keras 3 itself no longer reads as it was written.

Keras 3 does not find losses and metrics that were saved as short names ("mse"), drops the optimizer's state of a Sequential
model, and does not know settings of Keras 2's optimizers. So only the layers and weights are left to it.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np

from allreduce_spark.errors import ConfigError

__all__ = ["ATTRIBUTE", "load", "settings_of"]

log = logging.getLogger(__name__)

ATTRIBUTE = "distributed_config"
# Settings of Keras 2's optimizers that say nothing about how they step.
_FORGOTTEN = {"is_legacy_optimizer", "jit_compile", "decay"}


def settings_of(path: Path, name: str) -> tuple[str | None, dict[str, Any]]:
    """(class name, settings) that Elephas, or this library, left beside the model; (None, {}) where there are none.

    Args:
        name: What to call the file in errors.

    Raises:
        ConfigError: The file is damaged, or holds no Keras model.
    """
    try:
        with h5py.File(path) as file:
            attributes = dict(file.attrs)
    except OSError as error:
        raise ConfigError(f"{name!r} is damaged, or was not written to its end: {error}") from error
    if "model_config" not in attributes:
        raise ConfigError(f"{name!r} is an HDF5 file, but no Keras model: it has no attribute 'model_config'.")
    if ATTRIBUTE not in attributes:
        return None, {}
    about = json.loads(attributes[ATTRIBUTE])
    return about["class_name"], about["config"]


def load(path: Path, custom_objects: Mapping[str, Any], compiled: bool, safe_mode: bool) -> keras.Model:
    """Load the model of such a file.

    Args, Raises: As `keras.saving.load_model`; `compiled` is its `compile`.
    """
    with h5py.File(path) as file:
        config = _json(file.attrs["model_config"])
        training = _json(file.attrs["training_config"]) if "training_config" in file.attrs else None
        state = _optimizer_state(file)
        written_by = str(_text(file.attrs.get("keras_version", "unknown")))
    if safe_mode and _names_class(config, "Lambda"):  # not every Keras 3 looks for them in this format
        raise ValueError("the model has a Lambda layer, and safe_mode is on.")
    model = keras.saving.load_model(path, custom_objects=dict(custom_objects), compile=False, safe_mode=safe_mode)
    if compiled and training is not None:
        with keras.saving.custom_object_scope(dict(custom_objects)):
            model.compile(**_compile_arguments(training))
        model.optimizer.build(model.trainable_variables)
        _restore(model.optimizer, state, written_by)
    return model


def _compile_arguments(training: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "optimizer": _optimizer(training["optimizer_config"]),
        "loss": _revive(training.get("loss"), keras.losses.deserialize),
        "metrics": _revive(training.get("metrics"), keras.metrics.deserialize),
        "weighted_metrics": _revive(training.get("weighted_metrics"), keras.metrics.deserialize),
        "loss_weights": training.get("loss_weights"),
    }


def _optimizer(serialized: Mapping[str, Any]) -> keras.optimizers.Optimizer:
    settings = {key: value for key, value in serialized["config"].items() if key not in _FORGOTTEN}
    class_name = serialized["class_name"].rpartition(">")[2]  # "Custom>Adam" in some files of Keras 2
    return keras.optimizers.deserialize({**serialized, "class_name": class_name, "config": settings})


def _revive(saved: Any, deserialize: Callable[[Any], Any]) -> Any:
    """A loss or metric, or a structure of them, from its JSON. Names of Keras's own stay names, which `compile` knows."""
    if isinstance(saved, (list, tuple)):
        return [_revive(part, deserialize) for part in saved]
    if isinstance(saved, str):
        return keras.saving.get_registered_object(saved) or saved
    if not isinstance(saved, dict):
        return saved
    if "class_name" not in saved:
        return {key: _revive(part, deserialize) for key, part in saved.items()}
    if saved["class_name"] == "MeanMetricWrapper":  # how Keras 2 wrote a metric that was given by name
        name, function = saved["config"]["name"], saved["config"]["fn"]
        if isinstance(function, str):
            return name if name in ("acc", "accuracy", "ce", "crossentropy") else function
    return deserialize(saved)


def _optimizer_state(file: h5py.File) -> list[np.ndarray]:
    if "optimizer_weights" not in file:
        return []
    group = file["optimizer_weights"]
    return [np.asarray(group[_text(name)]) for name in _names_in(group)]


def _names_in(group: h5py.Group) -> list[Any]:
    """The attribute `weight_names`; what HDF5 cannot hold in one attribute, Keras divides among several with a number."""
    if "weight_names" in group.attrs:
        return list(group.attrs["weight_names"])
    parts = itertools.takewhile(group.attrs.__contains__, (f"weight_names{number}" for number in itertools.count()))
    return [name for part in parts for name in group.attrs[part]]


def _restore(optimizer: keras.optimizers.Optimizer, state: list[np.ndarray], written_by: str) -> None:
    variables = optimizer.variables
    shapes = [tuple(variable.shape) for variable in variables]
    # Keras 2 kept other variables, in another order.
    if written_by.startswith("2.") or [value.shape for value in state] != shapes:
        if state:
            log.warning("the state of the optimizer, written by Keras %s, does not fit: it starts anew", written_by)
        return
    for variable, value in zip(variables, state, strict=True):
        variable.assign(value)


def _names_class(config: Any, name: str) -> bool:
    """Whether a layer of this class is anywhere in the configuration of a model."""
    if isinstance(config, dict):
        return config.get("class_name") == name or any(_names_class(part, name) for part in config.values())
    return isinstance(config, list) and any(_names_class(part, name) for part in config)


def _json(attribute: Any) -> Any:
    return json.loads(_text(attribute))


def _text(attribute: Any) -> str:
    return attribute.decode() if isinstance(attribute, bytes) else str(attribute)
