"""One array for models with several inputs or outputs: Elephas cuts it into equal parts, one for each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from allreduce_spark.errors import DataError

if TYPE_CHECKING:
    import keras

__all__ = ["parts_of", "split", "split_one", "split_pair"]


def parts_of(model: keras.Model) -> tuple[int, int]:
    """(number of inputs, number of outputs) by position; 1 where they have names, or the model does not say."""

    def count(name: str) -> int:
        tensors = getattr(model, name, None)
        return len(tensors) if isinstance(tensors, (list, tuple)) else 1

    return (count("input"), count("output")) if getattr(model, "inputs", None) else (1, 1)


def split(parts: int, array: Any, axis: int) -> Any:
    """One array -> `parts` equal arrays along `axis`; whatever is no array, or has one part, as it is."""
    if parts == 1 or not isinstance(array, np.ndarray):
        return array
    if array.ndim <= axis or array.shape[axis] % parts:
        raise DataError(
            f"the model has {parts} inputs or outputs, and an array of shape {array.shape} cannot be cut into as many equal "
            f"parts along axis {axis}. Give a tuple of arrays, one for each."
        )
    return tuple(np.split(array, parts, axis))


def split_pair(inputs: int, outputs: int, pair: Any) -> Any:
    """`split` for x and y of one row, (x, y) or (x, y, sample_weight)."""
    return (split(inputs, pair[0], 0), split(outputs, pair[1], 0), *pair[2:])


def split_one(inputs: int, x: Any) -> Any:
    """`split` for the x of one row, as a row without a label."""
    return (split(inputs, x, 0),)
