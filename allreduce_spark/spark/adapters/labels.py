"""Labels that are classes: whole numbers from 0 to num_classes - 1, and the one-hot vectors that stand for them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from allreduce_spark.errors import ConfigError, DataError

__all__ = ["check_labels", "check_num_classes", "label_problem", "num_classes_for", "one_hot"]


def check_num_classes(num_classes: Any) -> None:
    """Accept a positive integer, or None where the number is still to be found.

    Raises:
        ConfigError: It is something else.
    """
    whole = isinstance(num_classes, (int, np.integer)) and not isinstance(num_classes, bool)
    if num_classes is not None and not (whole and num_classes >= 1):
        raise ConfigError(f"num_classes must be a positive integer or None, got {num_classes!r}.")


def label_problem(label: float, num_classes: int | None) -> str | None:
    """Why this label cannot be used, or None where it can. Without num_classes any number can that is not NaN."""
    if math.isnan(label):
        return "the label is NaN; drop such rows or fill in a value first"
    if num_classes is None or (0 <= label < num_classes and float(label).is_integer()):
        return None
    if math.isfinite(label) and not float(label).is_integer():
        return f"the label is {label}, but classes are whole numbers; train on it as a number with categorical=False"
    return (
        f"the label is {label}, but the classes are 0 to {num_classes - 1} (num_classes={num_classes}); "
        "give the right num_classes, or number the classes from 0"
    )


def check_labels(labels: np.ndarray, num_classes: int | None, place: str = "in row {}", first_row: int = 0) -> None:
    """Refuse the first label that cannot be used; as `label_problem`, for an array of shape (rows, ...).

    Args:
        place: How to say where it is; takes the row, which counts from `first_row`.

    Raises:
        DataError: There is one; names its row and value.
    """
    good = labels == labels  # NaN is not
    if num_classes is not None:
        good &= (labels >= 0) & (labels < num_classes) & (labels == np.floor(labels))
    if not good.all():
        first = tuple(np.argwhere(~good)[0])
        raise DataError(f"{place.format(first_row + first[0])}, {label_problem(labels[first].item(), num_classes)}")


def num_classes_for(largest: float | None) -> int:
    """How many classes there are if the largest label is this; None where there are no labels.

    Raises:
        DataError: There are none, or it is no class.
    """
    if largest is None:
        raise DataError("there are no rows, so the number of classes cannot be found: give num_classes")
    problem = label_problem(largest, num_classes=2**31)
    if problem is not None:
        raise DataError(f"the number of classes cannot be found: {problem}")
    return int(largest) + 1


def one_hot(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Classes of shape (rows,), checked before, -> float64 of shape (rows, num_classes)."""
    encoded = np.zeros((len(labels), num_classes))
    encoded[np.arange(len(labels)), labels.astype(np.int64)] = 1
    return encoded
