"""The Spark application that a fit runs in: its context, its slots, and how its executors reach the driver."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Mapping

from pyspark import SparkContext
from pyspark.resource import ResourceProfile
from pyspark.sql.utils import is_remote

from allreduce_spark.config import Timeouts
from allreduce_spark.errors import ConfigError
from allreduce_spark.spark.resources import TASK_RESOURCE, demand, demand_of

__all__ = [
    "active_context",
    "check_cluster",
    "check_settings",
    "count_slots",
    "driver_addresses",
    "is_local",
    "is_local_master",
    "wait_for_slots",
]

log = logging.getLogger(__name__)

POLL_S = 0.05
LOOK_S = 0.2  # at slots that may come back; with Spark Connect each look is a question to the server
REGROUP_S = 3.0


def active_context() -> SparkContext:
    """The Spark context of this process, ready for the library's jobs.

    Raises:
        ConfigError: There is none.
    """
    if is_remote():
        raise ConfigError(
            "this needs RDDs and a SparkContext, which a Spark Connect session has not. With one, there are fit, predict, "
            "evaluate and extract_features of SparkModel, the estimator, the transformer, and run."
        )
    context = SparkContext._active_spark_context
    if context is None:
        raise ConfigError("there is no active Spark session: make one first, with SparkSession.builder.getOrCreate()")
    _use_this_python(context)
    return context


def count_slots(context: SparkContext, resources: ResourceProfile | None = None) -> int:
    """How many barrier tasks the application could run at once, if nothing else ran.

    Args:
        resources: What each of them asks for, as `resources.register` returns it; None for what the settings say.
    """
    scala_context = context._jsc.sc()
    profile = (
        scala_context.resourceProfileManager().defaultResourceProfile()
        if resources is None
        else resources._java_resource_profile
    )
    return int(scala_context.maxNumConcurrentTasks(profile))


def check_cluster(
    context: SparkContext,
    num_ranks: int | None,
    timeouts: Timeouts,
    resources: ResourceProfile | None = None,
    min_ranks: int | None = None,
) -> int:
    """Make sure that a barrier stage of `num_ranks` tasks can run, or one of `min_ranks`, before it is submitted.

    Spark itself would say nothing for ten minutes (40 checks, 15 s apart). A young application on a cluster is given
    `slots_s` for its executors to register; in local mode the slots are known at once.

    Args:
        num_ranks: How many ranks are asked for; None for as many as there are slots.
        resources: As for `count_slots`.
        min_ranks: With how few the work may begin; None for no fewer than are asked for.

    Returns:
        The number of ranks.

    Raises:
        ConfigError: There are too few slots, dynamic allocation is on, or tasks ask for what local mode does not have.
    """
    check_settings(str(context.master), dict(context.getConf().getAll()))
    age_s = max(0.0, time.time() - context.startTime / 1000)  # a Unix time, as startTime is
    started, wait_s = time.monotonic(), 0.0 if is_local(context) else timeouts.slots_s - age_s
    needed = min_ranks or num_ranks or 1
    while (slots := count_slots(context, resources)) < needed and time.monotonic() - started < wait_s:
        time.sleep(POLL_S)
    if slots < needed:
        waited = f", {timeouts.slots_s:g} s after it began (Timeouts.slots_s)" if wait_s > 0 else ""
        executors = len(context._jsc.sc().statusTracker().getExecutorInfos()) - (0 if is_local(context) else 1)
        name = "min_ranks" if min_ranks else "num_ranks"
        raise ConfigError(
            f"{name}={needed} needs {needed} slots at once, but this Spark application has {slots}{waited} (master "
            f"{context.master}, {executors} executors; {demand(context, resources)} for each). A barrier stage starts all its "
            f"ranks at once or none: lower {name} to {max(slots, 1)} or fewer, or add executors."
        )
    return num_ranks or slots


def check_settings(master: str, settings: Mapping[str, str]) -> None:
    """Make sure that barrier stages can run with the settings of the application.

    Raises:
        ConfigError: Dynamic allocation is on, or tasks ask for what local mode does not have.
    """
    if settings.get("spark.dynamicAllocation.enabled", "false").lower() == "true":
        raise ConfigError(
            "spark.dynamicAllocation.enabled is true, and Spark's barrier stages do not work with it. Set it to false where "
            "the application, or its Connect server, is started, and give it a fixed number of executors "
            "(spark.executor.instances or spark.cores.max)."
        )
    if is_local_master(master) and any(name.startswith(TASK_RESOURCE) for name in settings):
        raise ConfigError(
            f"with master {master} Spark gives tasks no resources, and they would wait for ever for what they ask for "
            f"({demand_of(settings)}). Leave these settings out: on one machine each rank takes the GPU of its local rank."
        )


def wait_for_slots(count: Callable[[], int | None], wanted: int, at_least: int, slots_s: float) -> int:
    """How many ranks the next stage may have, where there need not be slots for all: at the start, or after machines were lost.

    A cluster manager may start executors anew; `REGROUP_S` is waited for all of the slots, `slots_s` for the least of them.

    Args:
        count: How many slots there are now; None where nobody knows, and all may be there.

    Raises:
        ConfigError: There are not enough.
    """
    started = time.monotonic()
    while (slots := count()) is not None and slots < wanted:
        waited = time.monotonic() - started
        if slots >= at_least and waited > REGROUP_S:
            return slots
        if waited > slots_s:
            raise ConfigError(
                f"there are {slots} slots, and at least {at_least} are needed; waited {waited:.0f} s for executors to come. "
                "Setting: Timeouts.slots_s"
            )
        time.sleep(LOOK_S)
    return wanted


def driver_addresses(context: SparkContext) -> tuple[str, str]:
    """(where the driver should listen, under which name executors reach it)."""
    if is_local(context):
        return "127.0.0.1", "127.0.0.1"
    settings = context.getConf()
    reachable = str(settings.get("spark.driver.host"))  # Spark sets it where the user does not
    listening = settings.get("spark.driver.bindAddress") or reachable
    # Spark writes an IPv6 address as URLs do, in brackets, which are no part of it.
    return listening.strip("[]"), reachable.strip("[]")


def _use_this_python(context: SparkContext) -> None:
    """On one machine, let workers run the Python that runs this: the `python3` of the PATH may be another environment."""
    if is_local(context) and "PYSPARK_PYTHON" not in os.environ and context.pythonExec != sys.executable:
        log.info("PYSPARK_PYTHON is not set; the workers of this session will run %s", sys.executable)
        context.pythonExec = sys.executable


def is_local(context: SparkContext) -> bool:
    """Whether driver and executors are one process."""
    return is_local_master(str(context.master))


def is_local_master(master: str) -> bool:
    """The same, for what spark.master says."""
    return master.split("[")[0] == "local"
