"""What a fit is a fit of, in a form that can be compared with what a checkpoint was saved of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import keras

from allreduce_spark.checkpoint.fingerprint import Fingerprint
from allreduce_spark.config import FitConfig
from allreduce_spark.training.models.model_bytes import compile_arguments

__all__ = ["fingerprint_of"]


def fingerprint_of(
    model: keras.Model,
    config: FitConfig,
    callbacks: Sequence[keras.callbacks.Callback],
    *,
    data_schema: str = "",
    rows: tuple[int, ...] = (),
    validation_rows: int = 0,
) -> Fingerprint:
    """The fingerprint of a fit.

    Names that Keras made up count for nothing: a second model from the same code, in the same process, has others.

    Args:
        model: Compiled; it need not be built.
        config: The settings of the fit.
        callbacks: The user's.
        data_schema: What a row looks like, as JSON; "" while that is not known.
        rows: Training rows per shard.
        validation_rows: Rows to validate on, of all shards.
    """
    return Fingerprint(
        model=hashlib.sha256(_architecture(model).encode()).hexdigest(),
        layers=len(list(model._flatten_layers(include_self=False))),
        parameters=model.count_params() if model.built else 0,
        optimizer=_optimizer(model.optimizer),
        loss=_compiled_with(model, "loss", "loss_weights"),
        metrics=_compiled_with(model, "metrics", "weighted_metrics"),
        callbacks=tuple(type(callback).__name__ for callback in callbacks),
        data_schema=data_schema,
        rows=rows,
        validation_rows=validation_rows,
        seed=config.seed,
        shuffle=config.shuffle,
        global_batch_size=config.batch_size * len(rows),
        class_weight=json.dumps(config.to_json()["class_weight"]),
        sync_every=config.sync_every,
    )


def _architecture(model: keras.Model) -> str:
    """The configuration of a model, precision included, with numbers in place of the names of its layers."""
    try:
        config = keras.saving.serialize_keras_object(model)["config"]
    except (NotImplementedError, TypeError):  # a class that does not say what it is made of: its name must do
        return f"{type(model).__module__}.{type(model).__qualname__} {model.dtype_policy.name}"
    text = json.dumps(config, sort_keys=True, default=str)
    for number, layer in enumerate(model._flatten_layers()):
        text = text.replace(json.dumps(layer.name), f'"#{number}"')
    return text


def _optimizer(optimizer: keras.optimizers.Optimizer) -> str:
    return json.dumps(
        {"class_name": type(optimizer).__name__, "config": _settings(optimizer)}, sort_keys=True, default=str
    )


def _compiled_with(model: keras.Model, *names: str) -> str:
    given = {name: value for name, value in compile_arguments(model).items() if name in names and value is not None}
    return json.dumps(given, sort_keys=True, default=_by_name)


def _by_name(part: Any) -> Any:
    """A loss or metric, for people: a function by its name, an object by its class and settings."""
    if not isinstance(part, (keras.losses.Loss, keras.metrics.Metric)):
        return getattr(part, "__name__", type(part).__name__)
    try:
        return {type(part).__name__: {**_settings(part), **(getattr(part, "_fn_kwargs", None) or {})}}
    except Exception:  # noqa: BLE001 - `get_config` may be the user's
        return type(part).__name__


def _settings(part: Any) -> dict[str, Any]:
    return {name: value for name, value in part.get_config().items() if name != "name"}
