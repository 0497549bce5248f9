"""The result of a fit: the root writes it to a file, the driver takes it over into the user's model."""

from __future__ import annotations

import math
from pathlib import Path

import keras
import numpy as np

from allreduce_spark.data.spec import RowSpec
from allreduce_spark.training.models.model_bytes import load_state, numpy_dtype, read_about, save_state

__all__ = ["build_like", "least_bytes", "take_over", "write_result"]


def write_result(model: keras.Model, history: keras.callbacks.History, spec: RowSpec, path: Path) -> None:
    """Write weights, optimizer state, random states and history."""
    values = {name: [np.asarray(value).tolist() for value in column] for name, column in history.history.items()}
    about = {"history": values, "epoch": history.epoch, "params": history.params, "spec": spec.to_json()}
    save_state(model, path, about)


def take_over(model: keras.Model, path: Path) -> keras.callbacks.History:
    """Bring what `write_result` wrote into `model`, as if it had been trained here; return the history."""
    about = read_about(path)
    build_like(model, RowSpec.from_json(about["spec"]))
    load_state(model, path)
    history = keras.callbacks.History()
    history.set_model(model)
    history.set_params({**about["params"], "verbose": 0})
    history.epoch = about["epoch"]
    # A metric such as F1Score gives one number per class: an array, as in a history of Keras's own.
    history.history = {
        name: [np.array(value) if isinstance(value, list) else value for value in column]
        for name, column in about["history"].items()
    }
    model.history = history
    return history


def build_like(model: keras.Model, spec: RowSpec) -> None:
    """Make the variables of model and optimizer exist, for rows of this kind. Their values do not matter."""
    if not model.built:
        x, _, _ = spec.zeros(1)
        model(x)
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)


def least_bytes(model: keras.Model) -> int:
    """How large the file that `write_result` writes of a model will be at least: its weights, and what the optimizer keeps.

    An optimizer that has none yet will have as many variables of the shape of each weight as a copy of it has for a small one.
    """
    variables = [*model.variables, *(model.optimizer.variables if model.optimizer.built else ())]
    total = sum(map(_bytes_of, variables))
    if not model.optimizer.built:
        copies = {ndim: _copies_of(model.optimizer, ndim) for ndim in {len(w.shape) for w in model.trainable_variables}}
        total += sum(copies[len(weight.shape)] * _bytes_of(weight) for weight in model.trainable_variables)
    return total


def _bytes_of(variable: keras.Variable) -> int:
    return math.prod(variable.shape) * numpy_dtype(variable.dtype).itemsize


def _copies_of(optimizer: keras.optimizers.Optimizer, ndim: int) -> int:
    shape = (2,) * ndim
    copied = type(optimizer).from_config(optimizer.get_config())
    copied.build([keras.Variable(np.zeros(shape, "float32"))])
    return sum(tuple(variable.shape) == shape for variable in copied.variables)
