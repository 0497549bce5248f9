"""Arithmetic on lists of arrays, as `keras.Model.get_weights` gives them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

__all__ = ["add_params", "average_and_subtract", "divide_by", "get_neutral", "subtract_params"]

Arrays: TypeAlias = Sequence[np.ndarray]


def add_params(param_list_left: Arrays, param_list_right: Arrays) -> list[np.ndarray]:
    """The sums, array by array.

    >>> add_params([np.array([1, 2])], [np.array([3, 4])])
    [array([4, 6])]
    """
    return [left + right for left, right in zip(param_list_left, param_list_right, strict=True)]


def subtract_params(param_list_left: Arrays, param_list_right: Arrays) -> list[np.ndarray]:
    """The differences, array by array."""
    return [left - right for left, right in zip(param_list_left, param_list_right, strict=True)]


def get_neutral(array_list: Arrays) -> list[np.ndarray]:
    """Zeros of the same shapes and types."""
    return [np.zeros_like(array) for array in array_list]


def divide_by(array_list: Arrays, num_workers: int) -> list[np.ndarray]:
    """Each array divided by one number."""
    return [array / num_workers for array in array_list]


def average_and_subtract(base: Arrays, deltas: Sequence[Arrays]) -> list[np.ndarray]:
    """`base` minus the mean of the deltas, array by array; a copy of `base` where there are none.

    >>> average_and_subtract([np.array([5.0])], [[np.array([1.0])], [np.array([3.0])]])
    [array([3.])]
    """
    if not deltas:
        return [np.array(array) for array in base]
    means = (np.mean(arrays, axis=0) for arrays in zip(*deltas, strict=True))
    return subtract_params(base, list(means))
