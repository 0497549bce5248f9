"""A copy of a compiled model, as a rank would get it: training the one leaves the other alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras

from allreduce_spark.config import FitConfig, Timeouts
from allreduce_spark.errors import ConfigError
from allreduce_spark.training.job import Job, check_arrival, precision_of, seed_variables
from allreduce_spark.training.models.model_bytes import model_and_code, model_from_bytes
from allreduce_spark.training.settings import KerasSettings

__all__ = ["copy_model", "set_learning_rate"]


def copy_model(model: keras.Model, custom_objects: Mapping[str, Any]) -> keras.Model:
    """A model with the same weights, optimizer state, compile settings and random states, and none of the same variables.

    Raises:
        ConfigError: Keras cannot save it, or load it again, or forgets something on the way.
    """
    settings = KerasSettings.of(model)
    with settings.in_force():
        copied = model_from_bytes(*model_and_code(model, custom_objects))
    trainable = [bool(weight.trainable) for weight in model.weights]
    iterations = int(model.optimizer.iterations.numpy())
    job = Job(b"", b"", FitConfig(), Timeouts(), [], trainable, iterations, settings, precision_of(model))
    check_arrival(copied, job)
    for variable, state in zip(seed_variables(copied), seed_variables(model), strict=True):
        variable.assign(state)
    return copied


def set_learning_rate(model: keras.Model, value: float) -> None:
    """Give the optimizer another learning rate.

    Raises:
        ConfigError: It follows a schedule.
    """
    try:
        model.optimizer.learning_rate = value
    except TypeError as error:  # Keras's way to say so
        raise ConfigError(
            f"learningRate={value} cannot be set: the optimizer of the model follows a learning rate schedule. Compile the "
            "model with a number, or leave learningRate out."
        ) from error
