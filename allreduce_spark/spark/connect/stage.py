"""The barrier stage of a fit or a function under Spark Connect, as the client sees it: submit it, wait, be interrupted.

The client hears nothing of the ranks until the stage has ended.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from pyspark.sql import DataFrame, SparkSession

from allreduce_spark.errors import ConfigError
from allreduce_spark.spark.connect.driver import OUTCOME, Order, Outcome
from allreduce_spark.spark.connect.operation import Operation, running
from allreduce_spark.spark.connect.session import count_slots
from allreduce_spark.spark.connect.task import be_rank
from allreduce_spark.spark.connect.transfer import SCHEMA
from allreduce_spark.spark.stage import failure_of_job

__all__ = ["outcome_of", "run_stage"]

POLL_S = 0.05


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
    for old in (folder / OUTCOME, *folder.glob("result-*")):
        old.unlink(missing_ok=True)
    with running(Operation(session, stage, partial(_append, folder)), order.timeouts.teardown_s) as operation:
        while operation.is_alive():
            operation.join(POLL_S)
            on_wait()
            if operation.idle_s > order.timeouts.slots_s:
                raise _no_slots(session, order)
    return outcome_of(folder / OUTCOME, operation.error)


def outcome_of(said: Path, error: Exception | None) -> Outcome:
    """What came of a stage that has ended.

    Args:
        said: Where the ranks' driver has written it, if it came so far. A failure that it names counts for more than what
            Spark says of it, which comes later; a success does not, because results may be missing.
        error: What Spark says; None after a success.
    """
    outcome = Outcome.from_json(said.read_bytes()) if said.exists() else None
    if outcome is not None and (error is None or outcome.failure is not None):
        return outcome
    failure = failure_of_job(error)
    return Outcome(failure, failure.stage_lost)


def _append(folder: Path, name: str, piece: bytes) -> None:
    with (folder / Path(name).name).open("ab") as file:
        file.write(piece)


def _no_slots(session: SparkSession, order: Order) -> ConfigError:
    slots = count_slots(session)
    return ConfigError(
        f"num_ranks={order.num_ranks} needs {order.num_ranks} free slots at once, and for {order.timeouts.slots_s:g} s no task "
        f"ran: the Spark application has {slots or 'an unknown number'} in all, and others may use them, or Spark still "
        "planned how to read the rows. A barrier stage starts all its ranks at once or none: lower num_ranks, or wait longer. "
        "Setting: Timeouts.slots_s"
    )
