"""Keras's loop over epochs and steps, entered where a fit is resumed: also in the middle of an epoch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import keras

from allreduce_spark.training.batches import BatchPlan
from allreduce_spark.training.state import Position

__all__ = ["Loop", "continue_logs"]


class Loop(keras.callbacks.CallbackList):
    """All callbacks of a rank, as Keras's `fit` takes them; resumes a fit, also in the middle of an epoch.

    Keras numbers the batches of every epoch from 0 and always takes all of them. In an epoch that is resumed, the callbacks are
    told the numbers that the batches have, and after the last one Keras is told to stop. The wish is taken back before the
    callbacks hear of the end of the epoch.

    Args:
        callbacks: In their order.
        plan: Of the batches to train on, which must begin at `begin` too.
        begin: Where the training begins.
        restore: Brings back the state of `begin`, and the metrics too if its argument is True. Called when all callbacks have
            set themselves up, and again when they have done so for an epoch of which a part is over. None: nothing to restore.
        model, epochs: As for Keras.
    """

    def __init__(
        self,
        callbacks: Sequence[keras.callbacks.Callback],
        plan: BatchPlan,
        begin: Position,
        restore: Callable[[bool], None] | None,
        *,
        model: keras.Model,
        epochs: int,
    ) -> None:
        super().__init__(list(callbacks), model=model, epochs=epochs, steps=plan.steps, verbose=0)
        self._steps, self._begin, self._restore = plan.steps, begin, restore
        self._first_step, self._has_cut = 0, False

    def on_train_begin(self, logs: Any = None) -> None:
        super().on_train_begin(logs)
        if self._restore:
            self._restore(False)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        super().on_epoch_begin(epoch, logs)
        self._first_step = self._begin.step if epoch == self._begin.epoch else 0
        if self._first_step and self._restore:
            self._restore(True)

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        super().on_train_batch_begin(batch + self._first_step, logs)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        step = batch + self._first_step
        super().on_train_batch_end(step, logs)
        if self._first_step and step == self._steps - 1 and not self.model.stop_training:
            self.model.stop_training = self._has_cut = True

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if self._has_cut:
            self.model.stop_training = self._has_cut = False
        super().on_epoch_end(epoch, logs)


def continue_logs(callbacks: Iterable[keras.callbacks.Callback], epoch: int) -> None:
    """Make the callbacks that write a log go on with it: the file keeps what is older than `epoch`, which comes next."""
    for callback in callbacks:
        if isinstance(callback, keras.callbacks.CSVLogger):
            callback.append = True
            path = Path(callback.filename)
            if not path.exists():
                continue
            lines = path.read_bytes().splitlines(keepends=True)
            if lines and not lines[-1].endswith(b"\n"):
                lines.pop()  # whoever wrote it died meanwhile
            # From behind, and only as far as the epochs fall: above them may be those of an earlier fit.
            below = math.inf
            while len(lines) > 1 and epoch <= (number := int(lines[-1].split(callback.sep.encode())[0])) < below:
                below = number
                lines.pop()
            path.write_bytes(b"".join(lines))
