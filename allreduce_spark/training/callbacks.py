"""The callbacks that make Keras's own loop a distributed one, and which of the user's callbacks run where.

The user's callbacks stand between two of ours:

    First        knows which step this is, counts rows, combines the metrics before anybody looks at them
    ...          the user's: on every rank, with the same logs at the end of an epoch, so that they decide the same (those
                 of a batch are this rank's own); those that write files on the root only
    History      what the fit returns
    Last         makes all ranks stop where one of them wants to stop; then the state may be saved
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from allreduce_spark.communicator.base import Communicator, ReduceOp
from allreduce_spark.rendezvous.protocol import Phase
from allreduce_spark.rendezvous.status import StatusPage
from allreduce_spark.training.backends import ours
from allreduce_spark.training.batches import BatchPlan, ShardBatches
from allreduce_spark.training.local_steps import LocalSteps
from allreduce_spark.training.metrics import MetricState
from allreduce_spark.training.optimizer import StepRows
from allreduce_spark.training.saver import Saver
from allreduce_spark.training.state import Position

__all__ = ["First", "Last", "callbacks_of_rank"]

REPORT_EVERY_S = 0.2

# They write files or send messages: once is enough, and twice would spoil the file.
ROOT_ONLY = tuple(
    getattr(keras.callbacks, name)
    for name in ("ModelCheckpoint", "OrbaxCheckpoint", "CSVLogger", "TensorBoard", "RemoteMonitor")
    if hasattr(keras.callbacks, name)  # Orbax came later than the oldest Keras that will do
)


def callbacks_of_rank(
    callbacks: Sequence[keras.callbacks.Callback], is_root: bool
) -> dict[int, keras.callbacks.Callback]:
    """Those of the user's callbacks that run on this rank, by their place in the user's list.

    `root_only = True` on a callback of one's own is respected.
    """
    return {
        place: callback
        for place, callback in enumerate(callbacks)
        if is_root or not (isinstance(callback, ROOT_ONLY) or getattr(callback, "root_only", False))
    }


def acts_on_batches(callback: keras.callbacks.Callback) -> bool:
    """Whether a callback does something at the end of a batch, and so may stop the training there."""
    names = ("on_train_batch_end", "on_batch_end", "on_train_batch_begin", "on_batch_begin")
    return any(getattr(type(callback), name) is not getattr(keras.callbacks.Callback, name) for name in names) or any(
        name in vars(callback)
        for name in names  # LambdaCallback sets them on the object
    )


class First(keras.callbacks.Callback):
    """Runs before the user's callbacks.

    Args:
        communicator: The group.
        rows: Told at every step how many rows count.
        local: Told at every step that it takes; None where every step is one of all ranks.
        train, validation: This rank's batches; there may be none to validate on.
        begin: Where the training begins.
        status: Told at every step where this rank is.
        report: Called with progress for the driver now and then, on the root; None elsewhere.
    """

    def __init__(
        self,
        communicator: Communicator,
        rows: StepRows,
        local: LocalSteps | None,
        train: ShardBatches,
        validation: ShardBatches | None,
        begin: Position,
        status: StatusPage,
        report: Callable[..., None] | None,
    ) -> None:
        super().__init__()
        self._communicator, self._rows, self._local = communicator, rows, local
        self._batches, self._plan = train, train.plan
        self._validation, self._begin = None if validation is None else validation.plan, begin
        self._status, self._report, self._reported_at = status, report, 0.0
        self._epoch, self._phase = 0, Phase.FIRST_STEP
        self._share = self._validation_share = 0.0  # of this rank's rows in the last step

    def on_train_begin(self, logs: Any = None) -> None:
        self._state = MetricState(self.model, self._communicator)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._epoch = self._batches.epoch = epoch
        self._batches.first_step = self._begin.step if epoch == self._begin.epoch else 0
        self._state.begin()

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._begin_step(self._plan, batch)
        if self._local:
            self._local.begin_step(batch)
        self._status.write(self._phase, self._epoch, batch)

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        share = self._end_step(self._plan, batch)
        if self._local:
            self._local.end_step()
        self._phase, self._share = Phase.TRAIN, share
        if logs and share == 0:
            # They were read before the step was taken back: a NaN of rows that do not exist must not end the training.
            results = self.model.get_metrics_result()
            logs.update({name: float(results[name]) for name in logs.keys() & results if np.ndim(results[name]) == 0})
        if self._report and time.monotonic() - self._reported_at > REPORT_EVERY_S:
            self._report_progress(batch + 1, logs or {})

    def on_test_begin(self, logs: Any = None) -> None:
        self._status.write(Phase.VALIDATE, self._epoch, self._plan.steps)

    def on_test_batch_begin(self, batch: int, logs: Any = None) -> None:
        assert self._validation is not None
        if batch == 0:
            self._state.begin()
        self._begin_step(self._validation, batch)

    def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
        assert self._validation is not None
        self._validation_share = self._end_step(self._validation, batch)
        self._status.write(Phase.VALIDATE, self._epoch, self._plan.steps + batch + 1)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        if logs:
            self._agree_on(logs)
        if self._report:
            self._report_progress(self._plan.steps, logs or {}, epoch_done=True)

    def end_epoch_early(self, step: int) -> None:
        """All ranks have agreed to stop after `step`: what they have until now is the epoch."""
        if step != self._plan.steps - 1:
            self._state.combine()
            if self._local:
                self._local.combine()

    def _begin_step(self, plan: BatchPlan, step: int) -> None:
        self._rows.mine, self._rows.total = plan.rows_of_rank(self._communicator.rank, step), plan.total(step)
        if self._rows.mine == 0:
            self._state.keep()

    def _end_step(self, plan: BatchPlan, step: int) -> float:
        """Close a step; return this rank's share of its rows."""
        ours.wait_for_step()
        share = self._rows.share
        self._rows.mine = self._rows.total = 0
        if share == 0:
            self._state.restore()
        if step == plan.steps - 1:
            # Here, because Keras asks the metrics for the results of the epoch right after the last batch.
            self._state.combine()
        return share

    def _agree_on(self, logs: dict[str, Any]) -> None:
        """Make the logs of an epoch equal on all ranks.

        Where they are the results of the metrics, they are so already. A custom train_step may return something else; Keras
        then shows what its last step returned, which is of this rank: take the mean over the rows of that step.
        """
        metrics = set(self.model.get_metrics_result())
        validation = {name for name in logs if name.startswith("val_") and self._validation is not None}
        for names, share in ((logs.keys() - validation, self._share), (validation, self._validation_share)):
            if {name.removeprefix("val_") for name in names} == metrics:
                continue
            scalars = sorted(name for name in names if np.ndim(logs[name]) == 0)
            # A rank without rows in that step has nothing to say, and what it says may be nan.
            means = np.array([share * float(logs[name]) if share else 0.0 for name in scalars], np.float64)
            self._communicator.allreduce(means)
            logs.update(zip(scalars, means.tolist(), strict=True))

    def _report_progress(self, steps_done: int, logs: dict[str, Any], *, epoch_done: bool = False) -> None:
        assert self._report is not None
        self._reported_at = time.monotonic()
        self._report(
            epoch=self._epoch,
            steps_done=steps_done,
            steps=self._plan.steps,
            rows=self._rows_until(steps_done),
            logs={name: float(value) for name, value in logs.items() if np.ndim(value) == 0},
            epoch_done=epoch_done,
        )

    def _rows_until(self, steps: int) -> int:
        """Rows that all ranks have trained on in this epoch."""
        return sum(min(rows, steps * self._plan.batch_size) for rows in self._plan.rows)


class Last(keras.callbacks.Callback):
    """Runs after the user's callbacks: one rank that stops alone would leave the others waiting for it.

    Args:
        communicator: The group.
        first: Told where an epoch ends early.
        users: All of the user's callbacks, also those that do not run on this rank.
        plan: Of the batches to train on.
        saver: Told of every border between two steps, and of every end of an epoch; None where nothing is to be saved.
        status: Says whether the ranks are to end with an epoch, for more of them to go on.

    Attributes:
        regroups: Whether they have.
    """

    def __init__(
        self,
        communicator: Communicator,
        first: First,
        users: Sequence[keras.callbacks.Callback],
        plan: BatchPlan,
        saver: Saver | None,
        status: StatusPage,
    ) -> None:
        super().__init__()
        self._communicator, self._first, self._plan, self._saver = communicator, first, plan, saver
        # All ranks must come to the same conclusion here, so it is drawn from the user's full list on every rank.
        self._after_batches = any(acts_on_batches(callback) for callback in users)
        self._status, self._epoch, self.regroups = status, 0, False

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._epoch = epoch
        self._agree_to_stop()  # Keras would look at the wish after the first step.

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self._after_batches:
            self._agree_to_stop()
        if self._model.stop_training:  # not `self.model`, which would `settle` after every step
            self._first.end_epoch_early(batch)
        elif self._saver and batch != self._plan.steps - 1:
            self._saver.after_step(Position(self._epoch, batch + 1))

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        is_to_regroup = self._agree_to_stop() and not self.model.stop_training and epoch + 1 < self.params["epochs"]
        if self._saver:
            self._saver.after_epoch(
                Position(epoch + 1), logs or {}, has_stopped=self.model.stop_training, must=is_to_regroup
            )
            if is_to_regroup:
                self.regroups = self.model.stop_training = True

    def _agree_to_stop(self) -> bool:
        """Stop on all ranks if one of them wants to; return whether one has been told that they are to regroup."""
        wishes = np.array([bool(self.model.stop_training), self._status.is_to_regroup], np.int64)
        self._communicator.allreduce(wishes, ReduceOp.MAX)
        self.model.stop_training = bool(wishes[0])
        return bool(wishes[1])
