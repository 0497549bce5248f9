"""JAX: steps are pure functions, compiled as a whole; numpy code within them is an ordered callback."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import keras
import numpy as np
from jax.experimental import io_callback

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

COMPILES_CALLS = True
IS_STATELESS = True
SPARSE = ()

_raised: list[Exception] = []  # by numpy code in the steps of this process: JAX keeps but the text of what it raises


class ProgramOrder:
    """See `Order`."""

    def call(
        self, function: Callable[..., Sequence[Any]], inputs: Sequence[Any], results: Sequence[tuple[Any, Any]]
    ) -> list[Any]:
        expected = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in results]

        def on_host(*arrays: Any) -> list[np.ndarray]:
            try:
                values = function(*map(np.asarray, arrays))
            except Exception as error:
                _raised.append(error)
                raise
            return [np.asarray(value, result.dtype) for value, result in zip(values, expected, strict=True)]

        return list(io_callback(on_host, expected, *inputs, ordered=True))


def runs_at_once() -> bool:
    return False  # seldom, and arrays may be shared then


def widest_float() -> str:
    return "float64" if jax.config.jax_enable_x64 else "float32"


def view(variable: keras.Variable) -> np.ndarray:
    return np.asarray(variable.value)


def build_metrics(model: keras.Model, batch: tuple[Any, ...]) -> None:
    model._symbolic_build(data_batch=batch)  # as `fit` does, whatever the step


def wait_for_step() -> None:
    jax.effects_barrier()  # on a GPU, a step has been asked for when it returns


@contextlib.contextmanager
def within_steps() -> Iterator[None]:
    _raised.clear()
    try:
        yield
    except Exception as error:
        if _raised and isinstance(error, RuntimeError):  # what JAX makes of it; other errors are not of this step
            raise _raised[0] from error
        raise
