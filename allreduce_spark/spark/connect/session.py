"""What the client can learn of the Spark application behind a Connect session: its slots, and what an executor sees."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession

from allreduce_spark.config import Timeouts
from allreduce_spark.errors import AllReduceSparkError, ConfigError
from allreduce_spark.spark.cluster import REGROUP_S
from allreduce_spark.spark.connect.operation import Operation, running
from allreduce_spark.spark.connect.transfer import SCHEMA, check_answer, error_pieces, pieces_of
from allreduce_spark.spark.stage import error_of_job

__all__ = ["ask_executor", "check_slots", "count_slots", "setting", "wait_for_slots"]

POLL_S = 0.5


def count_slots(session: SparkSession) -> int | None:
    """How many barrier tasks the application could run at once, at most; None where that cannot be told from here.

    Spark plans a range in as many pieces as it has cores, and says so before it runs anything.
    """
    if any(setting(session, f"spark.{name}", "") for name in ("default.parallelism", "sql.leafNodeDefaultParallelism")):
        return None
    plan = str(session.sql("EXPLAIN SELECT * FROM range(1)").collect()[0][0])
    pieces = re.search(r"splits=(?:Some\()?(\d+)", plan)
    return None if pieces is None else int(pieces[1]) // int(setting(session, "spark.task.cpus", "1"))


def check_slots(session: SparkSession, wanted: int | None, timeouts: Timeouts, min_ranks: int | None = None) -> int:
    """The number of ranks: what is asked for, or as many as there are slots; with slots for `min_ranks` of them at least.

    Raises:
        ConfigError: There are too few slots, also after `slots_s`, or their number cannot be told and none is asked for; or no
            barrier stage can run there at all.
    """
    _check_barriers(session)
    started, needed = time.monotonic(), min_ranks or wanted or 1
    while True:
        slots, waited_s = count_slots(session), time.monotonic() - started
        if slots is None and wanted is None:
            raise ConfigError("how many slots this Spark application has cannot be told from here: pass num_ranks.")
        if slots is None or slots >= needed:
            return wanted or slots or needed
        if waited_s > timeouts.slots_s or _is_local(session):
            name = "min_ranks" if min_ranks else "num_ranks"
            raise ConfigError(
                f"{name}={needed} needs {needed} slots at once, but the Spark application of this Connect session has "
                f"{slots} (master {setting(session, 'spark.master', 'unknown')}, "
                f"spark.task.cpus={setting(session, 'spark.task.cpus', '1')}). A barrier stage starts all its ranks at once or "
                f"none: lower {name} to {max(slots, 1)} or fewer, or give the server more executors."
            )
        time.sleep(POLL_S)


def wait_for_slots(session: SparkSession, wanted: int, at_least: int, timeouts: Timeouts) -> int:
    """How many ranks the next stage may have, where there need not be slots for all: see `spark.cluster.wait_for_slots`.

    Raises:
        ConfigError: There are not enough.
    """
    started = time.monotonic()
    while (slots := count_slots(session)) is not None and slots < wanted:
        waited_s = time.monotonic() - started
        if slots >= at_least and waited_s > REGROUP_S:
            return slots
        if waited_s > timeouts.slots_s:
            raise ConfigError(
                f"there are {slots} slots, and at least {at_least} are needed; waited {waited_s:.0f} s for executors to come. "
                "Setting: Timeouts.slots_s"
            )
        time.sleep(POLL_S)
    return wanted


def setting(session: SparkSession, name: str, default: str) -> str:
    """A setting of the application; `default` where it is not set."""
    return session.conf.get(name, None) or default  # a default of another type than the setting would be an error


def ask_executor(session: SparkSession, question: Callable[[], Any], timeouts: Timeouts) -> Any:
    """What `question`, which travels by cloudpickle, returns on some executor, as JSON values.

    Raises:
        ConfigError: No executor has been free for `slots_s`.
        AllReduceSparkError: That it has raised, or the Spark job failed.
    """
    frame = session.range(0, 1, 1, 1).mapInArrow(partial(_answer, question), SCHEMA)
    answers: list[tuple[str, bytes]] = []
    with running(Operation(session, frame, lambda *row: answers.append(row)), timeouts.teardown_s) as operation:
        while operation.is_alive():
            operation.join(POLL_S)
            if operation.idle_s > timeouts.slots_s:
                raise ConfigError(
                    f"no executor of the Spark application has been free for {timeouts.slots_s:g} s, not even to look for "
                    "checkpoints. Setting: Timeouts.slots_s"
                )
    if operation.error is not None:
        raise error_of_job(operation.error) from operation.error
    for name, piece in answers:
        check_answer(name, piece)
    return json.loads(b"".join(piece for _, piece in answers))


def _answer(question: Callable[[], Any], batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    for _ in batches:
        pass
    try:
        answer = json.dumps(question()).encode()
    except AllReduceSparkError as error:
        yield from error_pieces(error)
    else:
        yield from pieces_of("answer", answer)


def _check_barriers(session: SparkSession) -> None:
    if not hasattr(DataFrame, "repartitionById") or _version(session.version) < (4, 1):
        raise ConfigError(
            f"with Spark Connect, ranks need Spark 4.1 or newer at both ends; the server has {session.version}."
        )
    if setting(session, "spark.dynamicAllocation.enabled", "false").lower() == "true":
        raise ConfigError(
            "spark.dynamicAllocation.enabled is true, and Spark's barrier stages do not work with it. Let the server be "
            "started with it set to false and a fixed number of executors (spark.executor.instances or spark.cores.max)."
        )


def _is_local(session: SparkSession) -> bool:
    return setting(session, "spark.master", "").split("[")[0] == "local"


def _version(text: str) -> tuple[int, int]:
    numbers = re.match(r"(\d+)\.(\d+)", text)
    return (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
