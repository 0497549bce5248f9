"""What a fit is a fit of, in a form that can be compared with what a checkpoint was saved of."""

from __future__ import annotations

import hashlib
import json

import keras

from allreduce_spark.checkpoint.fingerprint import Fingerprint
from allreduce_spark.config import FitConfig

__all__ = ["fingerprint_of"]


def fingerprint_of(model: keras.Model, config: FitConfig, data_schema: str, rows: tuple[int, ...]) -> Fingerprint:
    """The fingerprint of a fit.

    Names that Keras made up count for nothing: a second model from the same code, in the same process, has others.

    Args:
        model: Compiled; it need not be built.
        config: The settings of the fit.
        data_schema: What a row looks like, as JSON.
        rows: Training rows per shard.
    """
    return Fingerprint(
        model=hashlib.sha256(_architecture(model).encode()).hexdigest(),
        layers=len(list(model._flatten_layers(include_self=False))),
        parameters=model.count_params() if model.built else 0,
        optimizer=_optimizer(model.optimizer),
        data_schema=data_schema,
        rows=rows,
        seed=config.seed,
        global_batch_size=config.batch_size * len(rows),
        sync_every=config.sync_every,
    )


def _architecture(model: keras.Model) -> str:
    """The configuration of a model with numbers in place of the names of its layers."""
    try:
        config = keras.saving.serialize_keras_object(model)["config"]
    except (NotImplementedError, TypeError):  # a class that does not say what it is made of: its name must do
        return f"{type(model).__module__}.{type(model).__qualname__}"
    text = json.dumps(config, sort_keys=True, default=str)
    for number, layer in enumerate(model._flatten_layers()):
        text = text.replace(json.dumps(layer.name), f'"#{number}"')
    return text


def _optimizer(optimizer: keras.optimizers.Optimizer) -> str:
    config = {name: value for name, value in optimizer.get_config().items() if name != "name"}
    return json.dumps({"class_name": type(optimizer).__name__, "config": config}, sort_keys=True, default=str)
