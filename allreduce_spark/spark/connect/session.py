"""What the client can learn of the Spark application behind a Connect session: its slots, and what an executor sees."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
from pyspark.errors import PySparkException
from pyspark.resource import ResourceProfile
from pyspark.sql import DataFrame, SparkSession

from allreduce_spark.config import Timeouts
from allreduce_spark.errors import AllReduceSparkError, ConfigError
from allreduce_spark.spark.cluster import check_settings, is_local_master
from allreduce_spark.spark.connect.operation import Operation, running
from allreduce_spark.spark.connect.transfer import SCHEMA, check_answer, error_pieces, pieces_of
from allreduce_spark.spark.resources import TASK_RESOURCE, demand_of
from allreduce_spark.spark.stage import error_of_job, without_java_frames

__all__ = [
    "Profile",
    "ask_executor",
    "check_result_size",
    "check_slots",
    "count_slots",
    "register",
    "slots_of",
]

POLL_S = 0.5


@dataclass(frozen=True)
class Profile:
    """What each task asks of Spark in the place of what the settings say, as the server knows it.

    Attributes:
        id: By which `mapInArrow` names it.
        requests: Name and amount, sorted.
    """

    id: int
    requests: tuple[tuple[str, float], ...]


def register(session: SparkSession, resources: ResourceProfile | None) -> Profile | None:
    """The profile as the server knows it; None for None.

    Not by `resources.id`: that one is made, for good, in the session that is the thread's own.

    Raises:
        ConfigError: The cluster manager has no such profiles, or the executors do not have what it asks for.
    """
    if resources is None:
        return None
    from pyspark.sql.connect import proto  # needs grpc, which not everybody has

    requests = sorted((name, float(request.amount)) for name, request in resources.taskResources.items())
    tasks = {name: proto.TaskResourceRequest(resource_name=name, amount=amount) for name, amount in requests}
    try:
        number = session.client._create_profile(proto.ResourceProfile(task_resources=tasks))
    except PySparkException as error:
        raise ConfigError(
            f"Spark (master {session.conf.get('spark.master', None)}) has no tasks with these resources: "
            f"{without_java_frames(str(error))}"
        ) from error
    return Profile(number, tuple(requests))


def _settings(session: SparkSession, profile: Profile | None) -> dict[str, str]:
    """Those of the application, as if they asked for what the tasks ask for."""
    settings = session.conf.getAll
    if profile is None:
        return settings
    settings = {name: value for name, value in settings.items() if not name.startswith(TASK_RESOURCE)}
    for name, amount in profile.requests:
        settings["spark.task.cpus" if name == "cpus" else f"{TASK_RESOURCE}{name}.amount"] = f"{amount:g}"
    return settings


def count_slots(session: SparkSession, profile: Profile | None = None) -> int | None:
    """How many barrier tasks the application could run at once, at most; None where that cannot be told from here.

    Spark plans a range in as many pieces as it has cores, and says so before it runs anything.
    """
    settings = _settings(session, profile)
    if any(settings.get(f"spark.{name}") for name in ("default.parallelism", "sql.leafNodeDefaultParallelism")):
        return None
    plan = str(session.sql("EXPLAIN SELECT * FROM range(1)").collect()[0][0])
    pieces = re.search(r"splits=(?:Some\()?(\d+)", plan)
    return None if pieces is None else slots_of(int(pieces[1]), settings)


def slots_of(cores: int, settings: Mapping[str, str]) -> int | None:
    """How many tasks run at once on so many cores, by the settings of the application; None where these do not tell.

    Args:
        cores: Of all executors together, which are of one kind.
    """
    cpus = int(settings.get("spark.task.cpus", "1"))
    asked = {name.removeprefix(TASK_RESOURCE): float(settings[name]) for name in settings if _is_amount(name)}
    cores_each = settings.get("spark.executor.cores")
    if _is_local(settings) or (cores_each is None and not asked):
        return cores // cpus
    if cores_each is None:
        return None
    slots_each = [int(cores_each) // cpus]
    for name, amount in asked.items():
        amount_each = settings.get(f"spark.executor.resource.{name}")
        if amount_each is None:
            return None
        slots_each.append(_parts(int(amount_each), amount))
    return cores // int(cores_each) * min(slots_each)


def _parts(addresses: int, amount: float) -> int:
    """How many tasks get their amount of so many addresses: several may have a part of one, but none has parts of two."""
    return addresses * math.floor(1 / amount) if amount < 1 else addresses // math.ceil(amount)


def _is_amount(name: str) -> bool:
    return name.startswith(TASK_RESOURCE) and name.endswith(".amount")


def check_slots(
    session: SparkSession,
    wanted: int | None,
    timeouts: Timeouts,
    min_ranks: int | None = None,
    profile: Profile | None = None,
) -> int:
    """The number of ranks: what is asked for, or as many as there are slots; with slots for `min_ranks` of them at least.

    Raises:
        ConfigError: There are too few slots, also after `slots_s`, or their number cannot be told and none is asked for; or no
            barrier stage can run there at all.
    """
    settings = _settings(session, profile)
    _check_barriers(session, settings)
    started, needed = time.monotonic(), min_ranks or wanted or 1
    while True:
        slots, waited_s = count_slots(session, profile), time.monotonic() - started
        if slots is None and wanted is None:
            raise ConfigError(
                "how many slots this Spark application has cannot be told from here (each rank asks for "
                f"{demand_of(settings)}): pass num_ranks."
            )
        if slots is None or slots >= needed:
            return wanted or slots or needed
        if waited_s > timeouts.slots_s or _is_local(settings):
            name = "min_ranks" if min_ranks else "num_ranks"
            raise ConfigError(
                f"{name}={needed} needs {needed} slots at once, but the Spark application of this Connect session has "
                f"{slots} (master {settings.get('spark.master', 'unknown')}; {demand_of(settings)} "
                "for each). A barrier stage starts all its ranks at once or none: "
                f"lower {name} to {max(slots, 1)} or fewer, or give the server more executors."
            )
        time.sleep(POLL_S)


def check_result_size(settings: Mapping[str, str], least: int) -> None:
    """Make sure that a server takes what the ranks have trained from the one task that answers with it.

    Args:
        settings: Of the application.
        least: How many bytes it will be at least.

    Raises:
        ConfigError: It is more than the server takes.
    """
    setting = settings.get("spark.driver.maxResultSize", "1g")
    parts = re.fullmatch(r"(\d+)([kmgtp]?)b?", setting.strip().lower())
    limit = 0 if parts is None else int(parts[1]) << 10 * " kmgtp".index(parts[2] or " ")
    if 0 < limit < least:  # 0 is none
        raise ConfigError(
            f"the trained model would be lost at the end: weights and optimizer state are {least / 2**20:.0f} MiB at least, "
            f"and the Connect server takes no more than spark.driver.maxResultSize={setting} from the ranks. Start the "
            f"server with spark.driver.maxResultSize={math.ceil(1.125 * least / 2**20)}m or more (0 is no limit), and a "
            "spark.driver.memory that goes with it."
        )


def ask_executor(session: SparkSession, question: Callable[[], Any], timeouts: Timeouts) -> Any:
    """What `question`, which travels by cloudpickle, returns on some executor, as JSON values.

    Raises:
        ConfigError: No executor has been free for `slots_s`, or the one that was asked has not answered long after that.
        AllReduceSparkError: That it has raised, or the Spark job failed.
    """
    frame = session.range(0, 1, 1, 1).mapInArrow(partial(_answer, question), SCHEMA)
    answers: list[tuple[str, bytes]] = []
    patience_s = timeouts.slots_s + timeouts.checkpoint_s + timeouts.silence_s
    give_up = time.monotonic() + patience_s
    with running(Operation(session, frame, lambda *row: answers.append(row)), timeouts.teardown_s) as operation:
        while operation.is_alive():
            operation.join(POLL_S)
            if operation.idle_s > timeouts.slots_s:
                raise ConfigError(
                    f"no executor of the Spark application has been free for {timeouts.slots_s:g} s, not even to look for "
                    "checkpoints. Setting: Timeouts.slots_s"
                )
            if time.monotonic() > give_up:
                raise ConfigError(
                    f"an executor of the Spark application was to look for checkpoints, and has not answered for "
                    f"{patience_s:g} s. Setting: Timeouts.checkpoint_s"
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


def _check_barriers(session: SparkSession, settings: Mapping[str, str]) -> None:
    if not hasattr(DataFrame, "repartitionById") or _version(session.version) < (4, 1):
        raise ConfigError(
            f"with Spark Connect, ranks need Spark 4.1 or newer at both ends; the server has {session.version}."
        )
    check_settings(settings.get("spark.master", ""), settings)


def _is_local(settings: Mapping[str, str]) -> bool:
    return is_local_master(settings.get("spark.master", ""))


def _version(text: str) -> tuple[int, int]:
    numbers = re.match(r"(\d+)\.(\d+)", text)
    return (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
