"""A query of a Connect session, in a thread of its own: to be watched, interrupted, and given up where nothing of it moves.

Of a query the client hears, every two seconds, how many tasks run, and how many of each stage have ended. That is enough to
tell one that gets no slots, for which Spark itself would wait ten minutes, or for ever, and one whose tasks do not end.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pyspark.sql import DataFrame, SparkSession

from allreduce_spark.spark.connect.transfer import rows_of

__all__ = ["Operation", "Stage", "running"]

log = logging.getLogger(__name__)

CANCEL_S = 1.0
REPORTS_S = 10.0  # a report that is older says nothing of the present


@dataclass(frozen=True)
class Stage:
    """What Spark reports of one stage: its number, how many tasks it has, how many have ended, and whether that were all."""

    number: int
    tasks: int
    ended: int
    is_done: bool


class Operation(threading.Thread):
    """The query.

    Args:
        frame: Of rows (name string, piece binary).
        on_row: Called with each, in this thread.

    Attributes:
        error: What ended it, once it has ended; None after a success.
        stages: As they were last reported, the newest last.
    """

    def __init__(self, session: SparkSession, frame: DataFrame, on_row: Callable[[str, bytes], None]) -> None:
        super().__init__(name="allreduce-spark-connect", daemon=True)
        self._tag = f"allreduce_spark-{secrets.token_hex(4)}"
        self._session, self._frame, self._on_row = session, frame, on_row
        self._tags = {self._tag, *session.getTags()}  # the caller's, too: who interrupts by them means this as well
        self._idle_since: float | None = None
        self._reported_at = self._moved_at = 0.0
        self._tasks_run = False
        self.stages: tuple[Stage, ...] = ()
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            for tag in self._tags:
                self._session.addTag(tag)
            self._session.registerProgressHandler(self._note)  # type: ignore[arg-type]  # an ABC is asked for, a function will do
            try:
                for name, piece in rows_of(self._frame):
                    self._on_row(name, piece)
            finally:
                self._session.removeProgressHandler(self._note)  # type: ignore[arg-type]
        except Exception as error:  # noqa: BLE001 - whatever Spark raises; whoever waits reads it
            self.error = error

    def end(self, timeout_s: float) -> None:
        """Cancel it, and wait for its end, for `timeout_s` at most.

        In a thread of its own: where the server is gone, asking it takes minutes and ends with an error, neither of which is to
        hide why the query is given up.
        """
        threading.Thread(target=self._cancel, args=(time.monotonic() + timeout_s,), daemon=True).start()
        self.join(timeout_s)
        if self.is_alive():
            log.warning("the Spark job has not ended %.0f s after it was cancelled", timeout_s)

    def _cancel(self, until: float) -> None:
        try:
            while self.is_alive() and time.monotonic() < until:
                self._session.interruptTag(self._tag)  # again: the server may not have known it yet
                self.join(CANCEL_S)
        except Exception as error:  # noqa: BLE001 - whatever Spark raises; why the query was cancelled says more
            log.warning("the Spark job could not be cancelled: %s", error)

    @property
    def idle_s(self) -> float:
        """For how long none of its tasks has run, as far as Spark's reports tell. While it is planned, none runs either."""
        since, now = self._idle_since, time.monotonic()
        return 0.0 if since is None or now - self._reported_at > REPORTS_S else now - since

    @property
    def still_s(self) -> float:
        """For how long no stage and no task has begun or ended, as far as Spark's reports tell."""
        now = time.monotonic()
        return 0.0 if now - self._reported_at > REPORTS_S else now - self._moved_at

    def _note(self, stages: Any, inflight_tasks: int, operation_id: Any, done: bool) -> None:
        """A progress handler of the session. It is called for all its operations, each in the thread that waits for it."""
        if done or threading.current_thread() is not self:
            return
        self._reported_at = time.monotonic()
        self._idle_since = None if inflight_tasks else self._idle_since or self._reported_at
        reported = [Stage(each.stage_id, each.num_tasks, each.num_completed_tasks, each.done) for each in stages]
        now = tuple(sorted(reported, key=lambda stage: stage.number))
        if (now, bool(inflight_tasks)) != (self.stages, self._tasks_run):
            self.stages, self._tasks_run, self._moved_at = now, bool(inflight_tasks), self._reported_at


@contextmanager
def running(operation: Operation, teardown_s: float) -> Iterator[Operation]:
    """Start the operation; whatever is raised meanwhile cancels it."""
    operation.start()
    try:
        yield operation
    except BaseException:
        operation.end(teardown_s)
        raise
