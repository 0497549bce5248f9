"""Batches for the backends that read them through Python, in the thread that trains: the rows are mapped, so they are there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras

__all__ = ["dataset"]


def dataset(read: Callable[[int], tuple[Any, ...]], steps: int) -> keras.utils.PyDataset:
    """See `KerasBackend`."""
    return _Batches(read, steps)


class _Batches(keras.utils.PyDataset):
    def __init__(self, read: Callable[[int], tuple[Any, ...]], steps: int) -> None:
        super().__init__()
        self._read, self._steps = read, steps

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, step: int) -> tuple[Any, ...]:
        return self._read(step)
