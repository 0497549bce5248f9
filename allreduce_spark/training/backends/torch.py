"""PyTorch: steps run as they are written, so numpy code is called where it stands."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import torch

from allreduce_spark.training.backends.reading import dataset

__all__ = [
    "COMPILES_CALLS",
    "IS_STATELESS",
    "SPARSE",
    "ProgramOrder",
    "build_metrics",
    "dataset",
    "runs_at_once",
    "view",
    "wait_for_step",
    "widest_float",
    "within_steps",
]

COMPILES_CALLS = False
IS_STATELESS = False
SPARSE = ()

within_steps = contextlib.nullcontext  # errors come through as they are


class ProgramOrder:
    """See `Order`."""

    def call(
        self, function: Callable[..., Sequence[Any]], inputs: Sequence[Any], results: Sequence[tuple[Any, Any]]
    ) -> list[Any]:
        types = [keras.backend.standardize_dtype(dtype) for _, dtype in results]
        if any(tensor.is_meta for tensor in inputs):  # Keras works out shapes; no step runs
            return [keras.ops.zeros(shape, dtype) for (shape, _), dtype in zip(results, types, strict=True)]
        values = function(*map(keras.ops.convert_to_numpy, inputs))
        # A copy: what the function returns may be memory that it uses again.
        return [keras.ops.convert_to_tensor(np.array(v), dtype) for v, dtype in zip(values, types, strict=True)]


def runs_at_once() -> bool:
    return True


def widest_float() -> str:
    return "float64"


def view(variable: keras.Variable) -> np.ndarray:
    value: torch.Tensor = variable.value.detach()
    if value.dtype != torch.bfloat16 and value.device.type == "cpu":
        return value.numpy()
    return keras.ops.convert_to_numpy(value)


def build_metrics(model: keras.Model, batch: tuple[Any, ...]) -> None:
    model._symbolic_build(data_batch=batch)  # as `fit` does, whatever the step


def wait_for_step() -> None:
    """Steps have run when they return."""
