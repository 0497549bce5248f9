"""Which epoch the weights are of that a fit leaves behind."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import keras

__all__ = ["epoch_of_weights"]


def epoch_of_weights(
    model: keras.Model, callbacks: Sequence[keras.callbacks.Callback], history: Mapping[str, Sequence[Any]]
) -> int:
    """The index, in the columns of `history`, of the epoch whose weights `model` has after the fit.

    It is the last one, unless an `EarlyStopping(restore_best_weights=True)` went back to another. What that callback has seen
    on the ranks does not come back from there, so a copy of it is shown the history again.
    """
    epochs = max(map(len, history.values()))
    kept = epochs - 1
    for callback in callbacks:
        if isinstance(callback, keras.callbacks.EarlyStopping) and callback.restore_best_weights:
            stopping, wish = copy.copy(callback), model.stop_training
            stopping.set_model(model)
            stopping.on_train_begin()
            for epoch in range(epochs):
                stopping.on_epoch_end(epoch, {name: column[epoch] for name, column in history.items()})
            model.stop_training = wish
            if stopping.best_weights is not None:
                kept = stopping.best_epoch
    return kept
