"""What differs between the libraries that Keras computes with: TensorFlow, JAX and PyTorch. `ours` is that of this process.

Keras chooses its backend once, when it is imported. All else in `training/` is written against Keras alone, and imports none of
the three before it is known which one it is; so the other two need not be installed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, cast

import keras
import numpy as np

from allreduce_spark.errors import ConfigError

__all__ = ["KERAS_BACKEND", "KerasBackend", "Order", "environment", "ours", "settle"]

KERAS_BACKEND: str = keras.backend.backend()


class Order(Protocol):
    """The way out of a training step for numpy code. All that calls collectives in the steps of one model must share one."""

    def call(
        self, function: Callable[..., Sequence[Any]], inputs: Sequence[Any], results: Sequence[tuple[Any, Any]]
    ) -> list[Any]:
        """Call `function` when the step runs, after all that was called here before it.

        Args:
            function: Takes numpy arrays, which are only to be read, and returns such.
            inputs: Tensors of the step.
            results: The (shape, type) of each array that the function returns.

        Returns:
            Its results as tensors.
        """


class KerasBackend(Protocol):
    """The names that each module of this package defines.

    Attributes:
        COMPILES_CALLS: Whether code that is compiled as a whole (`jit_compile`) can call numpy code.
        IS_STATELESS: Whether a `train_step` takes and returns the values of variables, instead of changing them. Then
            `optimizer.apply` sees nothing of what the forward pass has moved.
        SPARSE: Types of sparse gradients.
    """

    COMPILES_CALLS: bool
    IS_STATELESS: bool
    SPARSE: tuple[type[Any], ...]
    ProgramOrder: Callable[[], Order]

    def dataset(self, read: Callable[[int], tuple[Any, ...]], steps: int) -> Any:
        """What Keras's `fit` and `evaluate` take for the batches `read(0)`, ..., `read(steps - 1)`, read anew in each epoch."""

    def runs_at_once(self) -> bool:
        """Whether what is called now runs now, with tensors that are copies of arrays, rather than becoming part of a graph."""

    def widest_float(self) -> str:
        """Of the types that a tensor can have, by its name."""

    def view(self, variable: keras.Variable) -> np.ndarray:
        """A variable's value without a copy where there can be: to be read before the next step."""

    def build_metrics(self, model: keras.Model, batch: tuple[Any, ...]) -> None:
        """Make the metrics exist that Keras would make in the first step, and run nothing."""

    def wait_for_step(self) -> None:
        """Return when the step that was called last has run, and with it the numpy code in it."""

    def within_steps(self) -> AbstractContextManager[None]:
        """Let a collective that fails within a step raise what it raises outside: CollectiveError."""


if KERAS_BACKEND not in ("tensorflow", "jax", "torch"):
    raise ConfigError(
        f"Keras runs on the backend {KERAS_BACKEND!r}, which cannot train. Set KERAS_BACKEND to tensorflow, jax or "
        "torch before Keras is imported."
    )
ours = cast(KerasBackend, importlib.import_module(f"{__name__}.{KERAS_BACKEND}"))


def environment() -> dict[str, str]:
    """The variables that make Keras compute, in another process, with the library that it does here.

    They count when Keras is imported. What can be set later travels with each model and function: `settings.KerasSettings`.
    """
    variables = {"KERAS_BACKEND": KERAS_BACKEND}
    if KERAS_BACKEND == "jax":
        variables["JAX_ENABLE_X64"] = str(ours.widest_float() == "float64")
    if KERAS_BACKEND == "torch":
        # Keras asks PyTorch for GPUs when it is imported. Asked this way, CUDA is not started, so ranks can be forked.
        variables["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    return variables


def settle(model: keras.Model) -> None:
    """Call it before variables are read or changed between two steps: Keras on JAX keeps the state of an epoch elsewhere."""
    if hasattr(model, "jax_state_sync"):
        model.jax_state_sync()
