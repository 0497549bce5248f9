"""A query of a Connect session, in a thread of its own: to be watched, interrupted, and given up where none of its tasks runs.

Of a query the client hears, every two seconds, how many tasks run. That is enough to tell one that gets no slots, for which
Spark itself would wait ten minutes, or for ever.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pyspark.sql import DataFrame, SparkSession

from allreduce_spark.spark.connect.transfer import rows_of

__all__ = ["Operation", "running"]

log = logging.getLogger(__name__)

CANCEL_S = 1.0
REPORTS_S = 10.0  # a report that is older says nothing of the present


class Operation(threading.Thread):
    """The query.

    Args:
        frame: Of rows (name string, piece binary).
        on_row: Called with each, in this thread.

    Attributes:
        error: What ended it, once it has ended; None after a success.
    """

    def __init__(self, session: SparkSession, frame: DataFrame, on_row: Callable[[str, bytes], None]) -> None:
        super().__init__(name="allreduce-spark-connect", daemon=True)
        self._tag = f"allreduce_spark-{secrets.token_hex(4)}"
        self._session, self._frame, self._on_row = session, frame, on_row
        self._tags = {self._tag, *session.getTags()}  # the caller's, too: who interrupts by them means this as well
        self._idle_since: float | None = None
        self._reported_at = 0.0
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

    def cancel(self) -> None:
        self._session.interruptTag(self._tag)

    @property
    def idle_s(self) -> float:
        """For how long none of its tasks has run, as far as Spark's reports tell. While it is planned, none runs either."""
        since, now = self._idle_since, time.monotonic()
        return 0.0 if since is None or now - self._reported_at > REPORTS_S else now - since

    def _note(self, stages: Any, inflight_tasks: int, operation_id: Any, done: bool) -> None:
        """A progress handler of the session. It is called for all its operations, each in the thread that waits for it."""
        if done or threading.current_thread() is not self:
            return
        self._reported_at = time.monotonic()
        self._idle_since = None if inflight_tasks else self._idle_since or self._reported_at


@contextmanager
def running(operation: Operation, teardown_s: float) -> Iterator[Operation]:
    """Start the operation; whatever is raised meanwhile cancels it."""
    operation.start()
    try:
        yield operation
    except BaseException:
        give_up_at = time.monotonic() + teardown_s
        while operation.is_alive() and time.monotonic() < give_up_at:
            operation.cancel()  # again: the server may not have known it yet
            operation.join(CANCEL_S)
        if operation.is_alive():
            log.warning("the Spark job has not ended %.0f s after it was cancelled", teardown_s)
        raise
