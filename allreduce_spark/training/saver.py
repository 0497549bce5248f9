"""When a checkpoint is taken, and the taking: all ranks at the same step, the step waiting for one copy in memory alone.

The root decides, because clocks differ. Asking it after every step would cost a collective each, so with every answer the ranks
learn how many steps to take before they ask again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import numpy as np

from allreduce_spark.checkpoint.shares import ShareWriter
from allreduce_spark.communicator.base import Communicator, ReduceOp
from allreduce_spark.config import Checkpoint
from allreduce_spark.errors import CheckpointError
from allreduce_spark.rendezvous.protocol import Phase
from allreduce_spark.rendezvous.status import StatusPage
from allreduce_spark.training.local_steps import LocalSteps
from allreduce_spark.training.state import Position, RankState

__all__ = ["Saver", "Schedule"]

_log = logging.getLogger(__name__)

OVERHEAD = 0.02  # the share of the time that checkpoints may cost where the user says nothing
AUTOMATIC_S = 10.0  # the least time from one to the next then; also to the first one, of which the cost is not known


class Schedule:
    """When the next checkpoint is due. It knows no clock: whoever asks says what time it is.

    Args:
        config: The user's wish.
        now: Seconds, on any clock.
        steps: Steps that the fit has taken.
    """

    def __init__(self, config: Checkpoint, now: float, steps: int) -> None:
        self._config, self._cost_s, self._step_s = config, 0.0, 0.0
        self._asked_at, self._asked_steps = now, steps
        self.saved(now, steps)

    def saved(self, now: float, steps: int) -> None:
        """One was taken."""
        self._saved_at, self._saved_steps = now, steps

    def is_due(self, now: float, steps: int, cost_s: float) -> bool:
        """Whether one should be taken now.

        Args:
            cost_s: What the last one cost the rank to which it cost most; 0 where there was none.
        """
        self._cost_s = cost_s
        if steps > self._asked_steps:
            self._step_s = (now - self._asked_at) / (steps - self._asked_steps)
        self._asked_at, self._asked_steps = now, steps
        if self._config.every_steps is not None:
            return steps >= self._next_steps
        return now - self._saved_at >= self._interval_s

    def steps_to_wait(self) -> int:
        """Steps to take before asking again, counted from where `is_due` or `saved` was told last.

        Half of what the time left is good for, so that steps which become slower, or faster, do no harm.
        """
        if self._config.every_steps is not None:
            return max(self._next_steps - self._asked_steps, 1)
        left_s = self._saved_at + self._interval_s - self._asked_at
        return max(int(left_s / self._step_s / 2), 1) if self._step_s else 1

    @property
    def _next_steps(self) -> int:
        """The multiple that comes after the last one: the same steps, however often the fit was resumed."""
        every = self._config.every_steps or 1
        return (self._saved_steps // every + 1) * every

    @property
    def _interval_s(self) -> float:
        if self._config.every_s is not None:
            return self._config.every_s
        return max(AUTOMATIC_S, self._cost_s / OVERHEAD)


class Saver:
    """Takes checkpoints on one rank. All ranks must call it at the same steps; every call but `close` may wait for the others.

    Args:
        config: The user's wish.
        state: What is saved.
        writer: Where to.
        communicator: The group.
        local: Where ranks take steps alone: a checkpoint is taken when they have combined what they learnt.
        begin: Where the training begins.
        steps: Of one epoch.
        epochs: Index of the last epoch, plus one.
        announce: Called by a thread with "saved" or "save_failed", and what there is to say. It returns when the store has it.
        status: Told when the training waits for that.
        timeout_s: How long it does.
    """

    def __init__(
        self,
        config: Checkpoint,
        state: RankState,
        writer: ShareWriter,
        communicator: Communicator,
        *,
        local: LocalSteps | None,
        begin: Position,
        steps: int,
        epochs: int,
        announce: Callable[[str, dict[str, Any]], None],
        status: StatusPage,
        timeout_s: float,
    ) -> None:
        self._config, self._state, self._writer, self._communicator = config, state, writer, communicator
        self._local, self._steps, self._epochs, self._announce = local, steps, epochs, announce
        self._status, self._timeout_s = status, timeout_s
        self._schedule = Schedule(config, time.monotonic(), self._taken(begin))
        self._countdown, self._cost_s = 1, 0.0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def after_step(self, position: Position) -> None:
        """A step was taken, and not the last one of its epoch."""
        self._countdown -= 1
        if self._countdown <= 0 and (self._local is None or self._local.is_combined):
            self._decide(position, {})

    def after_epoch(
        self, position: Position, logs: Mapping[str, Any], *, has_stopped: bool, must: bool = False
    ) -> None:
        """An epoch is over, its validation and callbacks as well.

        One is taken here, due or not, if it must, where the best epoch is to be kept, and where a store shall hold the end of
        the training.
        """
        is_end = has_stopped or position.epoch >= self._epochs
        must = must or self._config.keep_best is not None or (is_end and self._config.path is not None)
        if must:
            self._await_writing()
        self._decide(position, logs, must=must)

    def close(self) -> None:
        """Wait until what was saved last is written and announced."""
        self._await_writing()
        self._is_busy()
        self._thread.shutdown(wait=False)

    def _decide(self, position: Position, logs: Mapping[str, Any], *, must: bool = False) -> None:
        """Ask the root, and whether all ranks have written down the one before."""
        steps, now = self._taken(position), time.monotonic()
        costs = np.array([self._is_busy(), 1e9 * self._cost_s], np.int64)
        self._communicator.allreduce(costs, ReduceOp.MAX)
        answer = np.zeros(2, np.int64)
        if self._communicator.rank == 0:
            is_due = self._schedule.is_due(now, steps, costs[1] / 1e9)
            answer[0] = (is_due or must) and not costs[0]
            if answer[0]:
                self._schedule.saved(now, steps)
            answer[1] = self._schedule.steps_to_wait()
        self._communicator.broadcast(answer)
        self._countdown = int(answer[1])
        if answer[0]:
            self._save(position, logs)

    def _save(self, position: Position, logs: Mapping[str, Any]) -> None:
        began = time.perf_counter()
        self._writer.copy(position.id, *self._state.collect(position))
        self._cost_s = time.perf_counter() - began
        numbers = {name: float(value) for name, value in logs.items() if np.ndim(value) == 0}
        fields = {"id": position.id, "epoch": position.epoch, "step": position.step, "logs": numbers}
        self._writing = self._thread.submit(self._write, fields)

    def _write(self, fields: dict[str, Any]) -> None:
        began = time.thread_time()
        try:
            saved = self._writer.finish()
        except CheckpointError as error:
            _log.warning("The checkpoint %s could not be saved; training goes on. %s", fields["id"], error)
            self._announce("save_failed", {"id": fields["id"], "cause": str(error)})
        else:
            written = {"file": str(saved.path), "bytes": saved.bytes, "checksum": saved.checksum}
            self._announce("saved", {**fields, **written})
        # On a machine without a free core, the training has to wait for this too.
        self._cost_s += time.thread_time() - began

    def _await_writing(self) -> None:
        """Wait until what was saved last is where it belongs, `timeout_s` at most."""
        if self._writing is None or self._writing.done():
            return
        phase, epoch, step = self._status.read()
        self._status.write(Phase.CHECKPOINT, epoch, step)
        if not wait([self._writing], self._timeout_s).done:
            _log.warning(
                "The training has waited %g s for the last checkpoint to come to its store, and goes on without it. "
                "Setting: Timeouts.checkpoint_s",
                self._timeout_s,
            )
        self._status.write(phase, epoch, step)

    def _is_busy(self) -> bool:
        if self._writing and self._writing.done():
            self._writing.result()  # whatever went wrong there is to be seen
            self._writing = None
        return self._writing is not None

    def _taken(self, position: Position) -> int:
        return position.epoch * self._steps + position.step
