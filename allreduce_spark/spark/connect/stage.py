"""The barrier stage of a fit or a function under Spark Connect, as the client sees it: submit it, wait, be interrupted.

The client hears nothing of the ranks until the stage has ended; of Spark it hears, every two seconds, how many tasks run. That
is enough to tell a stage that gets no slots, for which Spark itself would wait ten minutes.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pyspark.sql import DataFrame, SparkSession

from allreduce_spark.errors import ConfigError
from allreduce_spark.spark.connect.driver import OUTCOME, Order, Outcome
from allreduce_spark.spark.connect.session import count_slots
from allreduce_spark.spark.connect.task import be_rank
from allreduce_spark.spark.connect.transfer import SCHEMA, rows_of
from allreduce_spark.spark.stage import failure_of_job

__all__ = ["run_stage"]

log = logging.getLogger(__name__)

POLL_S = 0.05
CANCEL_S = 1.0
REPORTS_S = 10.0  # a report that is older says nothing of the present


def run_stage(
    session: SparkSession, shards: DataFrame | None, order: Order, sent: str, folder: Path, on_wait: Callable[[], None]
) -> Outcome:
    """Run one agent per rank until Spark has the outcome.

    Args:
        shards: (shard int, block binary), in any partitions; None where there are no rows.
        order, sent: For the tasks: see `be_rank`.
        folder: Where what ranks send becomes the files `result-<rank>`.
        on_wait: Called many times a second, in this thread.

    Raises:
        ConfigError: The stage got no slots within `slots_s`.
        KeyboardInterrupt: Ctrl-C. The Spark job is cancelled by then.
    """
    # One empty block for each, too: what has no rows at all, Spark optimizes away, ranks and all.
    rows = session.range(0, order.num_ranks, 1, 1).selectExpr("CAST(id AS INT) AS shard", "X'' AS block")
    if shards is not None:
        rows = shards.union(rows)  # in this order: the number of a partition says which shards its rows go to
    stage = rows.repartitionById(order.num_ranks, "shard").mapInArrow(
        partial(be_rank, order, sent), SCHEMA, barrier=True
    )
    with _running(_Operation(session, stage, folder), order.timeouts.teardown_s) as operation:
        while operation.is_alive():
            operation.join(POLL_S)
            on_wait()
            if operation.idle_s > order.timeouts.slots_s:
                raise _no_slots(session, order)
    return operation.outcome()


class _Operation(threading.Thread):
    """The Spark job, in a thread of its own: so the caller's can draw, and be interrupted."""

    def __init__(self, session: SparkSession, stage: DataFrame, folder: Path) -> None:
        super().__init__(name="allreduce-spark-connect", daemon=True)
        self._tag = f"allreduce_spark-{secrets.token_hex(4)}"
        self._session, self._stage, self._folder = session, stage, folder
        self._tags = {self._tag, *session.getTags()}  # the caller's, too: who interrupts by them means this as well
        self._idle_since: float | None = None
        self._reported_at = 0.0
        self._error: Exception | None = None

    def run(self) -> None:
        for old in (self._folder / OUTCOME, *self._folder.glob("result-*")):
            old.unlink(missing_ok=True)
        for tag in self._tags:
            self._session.addTag(tag)
        self._session.registerProgressHandler(self._note)  # type: ignore[arg-type]  # an ABC is asked for, a function will do
        try:
            for name, piece in rows_of(self._stage):
                with (self._folder / Path(name).name).open("ab") as file:
                    file.write(piece)
        except Exception as error:  # noqa: BLE001 - whatever Spark raises; `failure_of_job` reads it
            self._error = error
        finally:
            self._session.removeProgressHandler(self._note)  # type: ignore[arg-type]

    def cancel(self) -> None:
        self._session.interruptTag(self._tag)

    @property
    def idle_s(self) -> float:
        """For how long none of its tasks has run, as far as Spark's reports tell."""
        since, now = self._idle_since, time.monotonic()
        return 0.0 if since is None or now - self._reported_at > REPORTS_S else now - since

    def outcome(self) -> Outcome:
        """Once it has ended. What the ranks' driver has said counts for more than what Spark says."""
        said = self._folder / OUTCOME
        if self._error is None and said.exists():
            return Outcome.from_json(said.read_bytes())
        failure = replace(failure_of_job(self._error), phase=None)  # it may have been any
        return Outcome(failure, failure.stage_lost)

    def _note(self, stages: Any, inflight_tasks: int, operation_id: Any, done: bool) -> None:
        """A progress handler of the session. It is called for all its operations, each in the thread that waits for it."""
        if done or threading.current_thread() is not self:
            return
        self._reported_at = time.monotonic()
        self._idle_since = None if inflight_tasks else self._idle_since or self._reported_at


@contextmanager
def _running(operation: _Operation, teardown_s: float) -> Iterator[_Operation]:
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
            log.warning("the Spark job of the fit has not ended %.0f s after it was cancelled", teardown_s)
        raise


def _no_slots(session: SparkSession, order: Order) -> ConfigError:
    slots = count_slots(session)
    return ConfigError(
        f"num_ranks={order.num_ranks} needs {order.num_ranks} free slots at once, and in {order.timeouts.slots_s:g} s "
        f"there were not so many: the Spark application has {slots or 'an unknown number'} in all, and others may use them. "
        "A barrier stage starts all its ranks at once or none: lower num_ranks, or wait longer. Setting: Timeouts.slots_s"
    )
