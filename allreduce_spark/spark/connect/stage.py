"""The barrier stage of a fit or a function under Spark Connect, as the client sees it: submit it, wait, be interrupted.

The client hears nothing of the ranks until the task of rank 0 has ended.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from pyspark.sql import DataFrame, SparkSession

from allreduce_spark.errors import ConfigError, RendezvousTimeoutError
from allreduce_spark.spark.connect.driver import END, OUTCOME, Order, Outcome
from allreduce_spark.spark.connect.operation import Operation, Stage, running
from allreduce_spark.spark.connect.session import Profile, count_slots
from allreduce_spark.spark.connect.task import be_rank
from allreduce_spark.spark.connect.transfer import SCHEMA
from allreduce_spark.spark.stage import LEAVE_S, failure_of_job

__all__ = ["barrier_has_begun", "outcome_of", "run_stage"]

POLL_S = 0.05


def run_stage(
    session: SparkSession,
    shards: DataFrame | None,
    order: Order,
    sent: str,
    folder: Path,
    on_wait: Callable[[], None],
    profile: Profile | None = None,
) -> Outcome:
    """Run one agent per rank until the outcome is known.

    Once the task of rank 0 has answered, it is. A stage that does not end then, because another task is stuck, is cancelled.

    Args:
        shards: (shard int, block binary), in any partitions; None where there are no rows.
        order, sent: For the tasks: see `be_rank`.
        folder: Where what ranks send becomes the files `result-<rank>`.
        on_wait: Called many times a second, in this thread.
        profile: What each task asks for; None for what the application's settings say.

    Raises:
        ConfigError: The stage got no slots within `slots_s`.
        RendezvousTimeoutError: Nothing has moved for `spool_s` in the stages before it, which make its rows.
        KeyboardInterrupt: Ctrl-C. The Spark job is cancelled by then.
    """
    # One empty block for each, too: what has no rows at all, Spark optimizes away, ranks and all. In so many partitions that
    # the stage that brings the rows to the ranks has more tasks than theirs: `barrier_has_begun` tells them apart by that.
    empty = session.range(0, order.num_ranks, 1, order.num_ranks + 1)
    rows = empty.selectExpr("CAST(id AS INT) AS shard", "X'' AS block")
    if shards is not None:
        rows = shards.union(rows)  # in this order: the number of a partition says which shards its rows go to
    stage = rows.repartitionById(order.num_ranks, "shard").mapInArrow(
        partial(be_rank, order, sent),
        SCHEMA,
        barrier=True,
        profile=profile,  # type: ignore[arg-type]  # of which it reads the id alone
    )
    for old in (folder / OUTCOME, folder / END, *folder.glob("result-*")):
        old.unlink(missing_ok=True)
    timeouts, give_up_at = order.timeouts, math.inf
    with running(Operation(session, stage, partial(_append, folder)), timeouts.teardown_s) as operation:
        while operation.is_alive():
            operation.join(POLL_S)
            on_wait()
            if operation.idle_s > timeouts.slots_s:
                raise _no_slots(count_slots(session, profile), order)
            if operation.still_s > timeouts.spool_s and not barrier_has_begun(operation.stages, order.num_ranks):
                raise _no_rows(operation.stages, timeouts.spool_s)
            if give_up_at == math.inf and (folder / END).exists():
                failed = outcome_of(folder, None).failure is not None
                give_up_at = time.monotonic() + (LEAVE_S if failed else timeouts.teardown_s)
            elif time.monotonic() > give_up_at:
                operation.end(timeouts.teardown_s)
                break
    return outcome_of(folder, operation.error)


def barrier_has_begun(stages: Sequence[Stage], num_ranks: int) -> bool:
    """Whether the newest stage is the one of the ranks, whose deadlines are those of their driver.

    Spark does not name it. It has as many tasks as there are ranks, and comes after a stage with more, which has brought the
    rows to them and is done. (Adaptive execution makes a job of each shuffle, and lists what is done a second time: as a stage
    of the next job that has nothing to do.) A stage of the user's that looks the same is taken for it, and has no deadline.

    Args:
        stages: All of the query, the newest last.
    """
    *_, before, newest = [None, None, *stages]
    if before is None or newest is None or newest.tasks != num_ranks or before.tasks <= num_ranks:
        return False
    return any(stage.is_done and stage.tasks == before.tasks for stage in stages)


def outcome_of(folder: Path, error: Exception | None) -> Outcome:
    """What came of a stage.

    Args:
        folder: Where the answers of rank 0's task are, as far as they came. A failure that they name counts for more than what
            Spark says of it, which comes later; a success does, where they came to their end.
        error: What Spark says; None after a success.
    """
    said = folder / OUTCOME
    outcome = Outcome.from_json(said.read_bytes()) if said.exists() else None
    if outcome is not None and (error is None or outcome.failure is not None or (folder / END).exists()):
        return outcome
    failure = failure_of_job(error)
    return Outcome(failure, failure.stage_lost)


def _append(folder: Path, name: str, piece: bytes) -> None:
    with (folder / Path(name).name).open("ab") as file:
        file.write(piece)


def _no_slots(slots: int | None, order: Order) -> ConfigError:
    return ConfigError(
        f"num_ranks={order.num_ranks} needs {order.num_ranks} free slots at once, and for {order.timeouts.slots_s:g} s no task "
        f"ran: the Spark application has {slots or 'an unknown number'} in all, and others may use them, or Spark still "
        "planned how to read the rows. A barrier stage starts all its ranks at once or none: lower num_ranks, or wait longer. "
        "Setting: Timeouts.slots_s"
    )


def _no_rows(stages: Sequence[Stage], spool_s: float) -> RendezvousTimeoutError:
    running = ", ".join(
        f"{stage.number} ({stage.ended} of {stage.tasks} tasks done)" for stage in stages if not stage.is_done
    )
    return RendezvousTimeoutError(
        f"for {spool_s:g} s nothing has moved in Spark's stages {running}: they make the rows of the ranks, whose barrier "
        "stage has not begun. Setting: Timeouts.spool_s"
    )
