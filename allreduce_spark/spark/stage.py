"""The barrier stage of a fit: submit it, wait for the outcome, and leave Spark as it was.

The stage is one Spark job, submitted from a thread of its own, so that the calling thread can show progress and be
interrupted. The outcome is known from the rendezvous, not from Spark: agents report failures to the driver and then return
normally, so Spark neither retries nor prints a page of Java for an error in the user's model.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pyspark import RDD, BarrierTaskContext, InheritableThread, SparkContext, TaskContext
from pyspark.resource import ResourceProfile

from allreduce_spark import errors
from allreduce_spark.config import Timeouts
from allreduce_spark.errors import AllReduceSparkError, CancelledError, ConfigError, RankFailedError
from allreduce_spark.launch.agent import AgentTask, run_agent
from allreduce_spark.rendezvous.group import Failure
from allreduce_spark.rendezvous.protocol import Phase
from allreduce_spark.rendezvous.server import Rendezvous

__all__ = [
    "StageTask",
    "assigned_gpus",
    "error_of",
    "error_of_job",
    "failure_of_job",
    "host_of",
    "missing_module",
    "place_of",
    "run_stage",
    "without_java_frames",
]

log = logging.getLogger(__name__)

POLL_S = 0.05
LOOK_S = 0.5  # at which stages run
LEAVE_S = 1.0  # agents kill their ranks and leave within a few milliseconds

# What an agent raises that has lost the driver; not one that never reached it, which another stage would not reach either.
_DRIVER_IS_GONE = r"RendezvousError: (the driver is gone|rank \d+ has not heard of the driver)"


@dataclass(frozen=True)
class StageTask:
    """What all barrier tasks of a stage have in common."""

    num_ranks: int
    num_shards: int
    address: tuple[str, int]
    key: bytes = field(repr=False)
    timeouts: Timeouts
    files: dict[str, bytes] = field(repr=False)
    store: str | None = None
    backend: str = "mpi"
    keras_environment: Mapping[str, str] = field(default_factory=dict)


def run_stage(
    context: SparkContext,
    shards: RDD[tuple[int, bytes]],
    rendezvous: Rendezvous,
    task: StageTask,
    on_wait: Callable[[], None],
    resources: ResourceProfile | None = None,
) -> Failure | None:
    """Run one agent per partition of `shards` until the rendezvous knows the outcome.

    Args:
        shards: Pairs (number of the shard, block), one partition per rank.
        rendezvous: Started.
        task: What the agents are told.
        on_wait: Called many times a second, in this thread; draws the progress bar.
        resources: What each task asks for; None for what the application's settings say.

    Returns:
        The first cause of a failure; `error_of` makes an exception of it. None after a success.

    Raises:
        KeyboardInterrupt: Ctrl-C. All ranks are dead by then.
    """
    tag = f"allreduce_spark-{secrets.token_hex(4)}"
    stage = shards.barrier().mapPartitions(partial(_be_agent, task))
    job = _Job(context, tag, stage if resources is None else stage.withResources(resources))
    queue, give_up_at = _Queue(context, tag), time.monotonic() + task.timeouts.spool_s
    try:
        job.start()
        while not rendezvous.wait(POLL_S):
            on_wait()
            if job.ended:
                rendezvous.fail(failure_of_job(job.error))
            elif others := queue.others():
                if time.monotonic() > give_up_at and rendezvous.wait_for_departure(0):  # no agent is there either
                    rendezvous.fail(_failure_of_queue(others, task.timeouts))
                rendezvous.begin_start()
    except BaseException as interruption:
        rendezvous.fail(Failure("Interrupted", f"interrupted on the driver: {type(interruption).__name__}"))
        rendezvous.wait(task.timeouts.teardown_s)
        raise
    finally:
        if rendezvous.failure is not None and not job.join(LEAVE_S):
            job.cancel()  # for agents that are deep in Spark, reading rows, and do not listen
        if not job.join(task.timeouts.teardown_s):
            log.warning("the Spark job of the fit has not ended %.0f s after its ranks", task.timeouts.teardown_s)
    return rendezvous.failure


def _be_agent(task: StageTask, blocks: Iterable[tuple[int, bytes]]) -> Iterator[Any]:
    """The body of a barrier task."""
    context = BarrierTaskContext.get()
    agent = AgentTask(
        **place_of(context),
        num_ranks=task.num_ranks,
        shards=tuple(range(context.partitionId(), task.num_shards, task.num_ranks)),
        address=task.address,
        key=task.key,
        timeouts=task.timeouts,
        files=task.files,
        store=task.store,
        backend=task.backend,
        keras_environment=task.keras_environment,
    )
    run_agent(agent, iter(blocks))
    return iter(())


def place_of(context: BarrierTaskContext) -> dict[str, Any]:
    """What Spark knows of a barrier task that its agent has to know; see `AgentTask`."""
    rank = context.partitionId()
    hosts = [host_of(info.address) for info in context.getTaskInfos()]
    return {
        "rank": rank,
        "local_rank": hosts[:rank].count(hosts[rank]),
        "local_size": hosts.count(hosts[rank]),
        "task_cpus": context.cpus(),
        "gpus": assigned_gpus(context),
    }


def host_of(address: str) -> str:
    """The host of an executor's `host:port`; Spark writes an IPv6 address in brackets, which are no part of it."""
    return address.rpartition(":")[0].strip("[]")


def assigned_gpus(context: TaskContext) -> tuple[str, ...] | None:
    """Addresses of the GPUs that Spark gave to a task; None where it asked for none."""
    gpus = context.resources().get("gpu")
    return tuple(gpus.addresses) if gpus else None


class _Job:
    """The Spark job of a stage, in a thread of its own. It inherits the caller's job group, so cancelling that works."""

    def __init__(self, context: SparkContext, tag: str, stage: RDD[Any]) -> None:
        self._context, self._tag, self._stage = context, tag, stage
        self._thread = InheritableThread(target=self._run, name=tag)
        self._thread.daemon = True
        self.error: Exception | None = None

    def start(self) -> None:
        self._thread.start()

    def _run(self) -> None:
        self._context.addJobTag(self._tag)
        try:
            self._stage.collect()
        except Exception as error:  # noqa: BLE001 - whatever Spark raises; `failure_of_job` reads it
            self.error = error

    @property
    def ended(self) -> bool:
        return not self._thread.is_alive()

    def cancel(self) -> None:
        if not self.ended:
            self._context.cancelJobsWithTag(self._tag)

    def join(self, timeout_s: float) -> bool:
        """Wait for its end, `timeout_s` at most; return whether it has ended."""
        self._thread.join(timeout_s)
        return self.ended


class _Queue:
    """Whether the barrier stage still waits for tasks of other stages: of those that make its rows, or of other jobs.

    That is no sign of a cluster that does not answer, however long it takes. Spark may tell of tasks that run only with the
    next heartbeat of an executor (spark.executor.heartbeatInterval, 10 s), so a `start_s` that is shorter can pass unnoticed.
    """

    def __init__(self, context: SparkContext, tag: str) -> None:
        self._tracker, self._tag = context._jsc.sc().statusTracker(), tag
        self._look_at, self._started = time.monotonic(), False

    def others(self) -> dict[int, str]:
        """The stages that it waits for, and their names, as far as is known by now.

        Spark is asked now and then, until the barrier stage has started.
        """
        if self._started or time.monotonic() < self._look_at:
            return {}
        self._look_at = time.monotonic() + LOOK_S
        infos = [self._tracker.getStageInfo(stage) for stage in self._tracker.getActiveStageIds()]
        running = {
            info.get().stageId(): str(info.get().name())
            for info in infos
            if info.isDefined() and info.get().numActiveTasks()
        }
        self._started = self._barrier_stage() in running
        return {} if self._started else running

    def _barrier_stage(self) -> int | None:
        """The last one of its job; None where Spark does not know the job yet."""
        jobs = [self._tracker.getJobInfo(job) for job in self._tracker.getJobIdsForTag(self._tag)]
        return max((stage for job in jobs if job.isDefined() for stage in job.get().stageIds()), default=None)


def failure_of_job(error: Exception | None) -> Failure:
    """What it means that the Spark job ended before the rendezvous knew the outcome."""
    if error is None:
        return Failure(
            "StageEnded", "the barrier stage ended, but not all ranks have reported that they are done", stage_lost=True
        )
    text = without_java_frames(str(error))
    cancelled = re.search(r"Job \d+ cancelled.*|\[OPERATION_CANCELED\].*", text)
    if cancelled:
        return Failure("CancelledError", f"the Spark job of the fit was cancelled: {cancelled[0]}")
    missing = missing_module(error)
    if missing is not None:
        return Failure("MissingDependencyError", missing)
    # Where a worker or an executor died, or a connection broke, the rendezvous has been told so before, with rank and step.
    died = re.search(rf"Python worker exited unexpectedly|ExecutorLostFailure|{_DRIVER_IS_GONE}", text) is not None
    return Failure(
        "SparkJobFailed", f"the Spark job failed: {text}", phase=Phase.SPOOL.value, consequence=died, stage_lost=died
    )


def _failure_of_queue(others: dict[int, str], timeouts: Timeouts) -> Failure:
    """What it means that the barrier stage has not started because tasks of other stages run."""
    named = ", ".join(f"{stage} ({name})" for stage, name in sorted(others.items()))
    return Failure(
        "RendezvousTimeoutError",
        f"the barrier stage waited {timeouts.spool_s:.0f} s for the tasks of Spark's stages {named}: they make its rows, or "
        "have the slots that it needs. Setting: Timeouts.spool_s",
        phase=Phase.START.value,
    )


def error_of_job(error: Exception) -> AllReduceSparkError:
    """What the error of a Spark job means where the job had no ranks: it was cancelled, say, or code of the user raised."""
    return error_of(failure_of_job(error))


def missing_module(error: Exception) -> str | None:
    """What to tell the user where the executors lack a module; None where this is not what is wrong."""
    missing = re.search(r"ModuleNotFoundError: No module named '([\w.]+)'", str(error))
    if missing is None:
        return None
    return (
        f"the executors' Python has no module {missing[1]!r}. Executors run the interpreter that PYSPARK_PYTHON (or "
        "spark.pyspark.python) names, `python3` by default: let it name one in which allreduce-spark and Keras are "
        "installed, with what Keras computes with. Modules of your own travel with --py-files, or SparkContext.addPyFile "
        "(with Spark Connect: SparkSession.addArtifacts(path, pyfile=True))."
    )


def without_java_frames(text: str) -> str:
    """Spark's message without the Java stack: the Python traceback in it is what a user can read."""
    text = text.partition("\n\nJVM stacktrace:\n")[0]  # of Spark Connect
    lines = [line for line in text.splitlines() if not re.match(r"\s+at [\w.$/]+\(|\s*\.\.\. \d+ more", line)]
    return "\n".join(lines).strip()


def error_of(failure: Failure) -> AllReduceSparkError:
    """The exception for a failure: errors of this library as they are, everything else as RankFailedError."""
    kind = getattr(errors, failure.error, None) if failure.error in errors.__all__ else None
    if kind in (errors.DataError, ConfigError, CancelledError, errors.MissingDependencyError):
        return kind(failure.cause)
    if kind is not None and failure.rank is None:
        return kind(failure.cause)  # no rank has failed: agents that did not come, say
    return RankFailedError(
        failure.cause,
        rank=failure.rank,
        host=failure.host,
        phase=failure.phase,
        epoch=failure.epoch,
        step=failure.step,
        log_tail=failure.log_tail,
    )
