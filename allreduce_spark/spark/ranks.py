"""Work for ranks, from the first barrier stage to the result: what a fit and a function of the user's own have in common.

One stage does, unless machines are lost: then another one goes on with the slots that are left.
"""

from __future__ import annotations

import logging
import math
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from pyspark import RDD, SparkContext
from pyspark.resource import ResourceProfile

from allreduce_spark.checkpoint.coordinator import Coordinator
from allreduce_spark.checkpoint.manifest import Manifest
from allreduce_spark.config import Recovery, Timeouts
from allreduce_spark.rendezvous.group import Failure, Join
from allreduce_spark.rendezvous.protocol import Phase
from allreduce_spark.rendezvous.recovery import Restarts, place_of
from allreduce_spark.rendezvous.server import Rendezvous
from allreduce_spark.spark.cluster import count_slots, driver_addresses, wait_for_slots
from allreduce_spark.spark.hosting import rendezvous_for
from allreduce_spark.spark.shards import shards_for
from allreduce_spark.spark.stage import StageTask, error_of, run_stage
from allreduce_spark.training.backends import environment

__all__ = ["Spectator", "Work", "check_restart", "run_work", "warn_of_restart"]

log = logging.getLogger(__name__)

LOOK_S = 2.0  # at the slots


class Spectator(Protocol):
    """Whoever wants to see how the work goes on."""

    def show_phase(self, phase: Phase) -> None: ...

    def report(self, fields: dict[str, Any]) -> None:
        """Progress; called in the rendezvous thread. What it raises ends the work.

        An epoch ends once, also where ranks that were started again have trained it a second time.
        """

    def draw(self) -> None:
        """Called many times a second, in the thread of the caller."""


@dataclass(frozen=True)
class Work:
    """What all barrier stages have in common.

    Attributes:
        shards: Pairs (number of the shard, block), one partition per shard.
        num_shards: How many, and so ranks while no machine is lost.
        files: For every rank, by name.
        backend: What the ranks are to reduce by, as `config.BACKENDS` names it.
        store: Where checkpoints are kept; None where they stay on the executors.
        approve: See `Hooks`.
        coordinator: Knows what another generation goes on from.
        recovery: How much misfortune the work is to survive.
        results: The folder where what rank r sends becomes the file `result-r`.
        resources: What each task asks of Spark; None for what the application's settings say.
        on_progress: See `Hooks`.
    """

    context: SparkContext
    shards: RDD[tuple[int, bytes]]
    num_shards: int
    files: dict[str, bytes]
    timeouts: Timeouts
    backend: str
    store: str | None
    approve: Callable[[Sequence[Join]], dict[str, Any]]
    coordinator: Coordinator
    recovery: Recovery
    spectator: Spectator
    results: Path
    resources: ResourceProfile | None = None
    on_progress: Callable[[dict[str, Any]], None] = lambda fields: None


def run_work(work: Work) -> None:
    """Return once the work is done and its result is there.

    Raises:
        AllReduceSparkError, KeyboardInterrupt: What ended it.
    """
    least, restarts = work.recovery.min_ranks, Restarts(work.recovery.max_restarts)
    num_ranks, slots = work.num_shards, partial(count_slots, work.context, work.resources)
    if least is not None:
        num_ranks = wait_for_slots(slots, work.num_shards, least, work.timeouts.slots_s)
    while (why := _run_stage(work, restarts, num_ranks)) is not None:
        work.coordinator.fall_back()
        num_ranks = wait_for_slots(slots, work.num_shards, least or 1, work.timeouts.slots_s)
        warn_of_restart(work.coordinator.newest, num_ranks, work.num_shards, why)


def warn_of_restart(newest: Manifest | None, num_ranks: int, num_shards: int, why: str) -> None:
    """Log that another barrier stage goes on.

    Args:
        newest: The checkpoint that it goes on from; None for the beginning.
        why: For people.
    """
    place = f"epoch {newest.epoch}, step {newest.step}" if newest else "the beginning"
    log.warning("another barrier stage goes on from %s with %d of %d ranks: %s", place, num_ranks, num_shards, why)


def check_restart(restarts: Restarts, lost: Failure, place: tuple[int, int]) -> None:
    """Make sure that another barrier stage may follow the one that was lost.

    Args:
        place: As for `Restarts.refusal`.

    Raises:
        AllReduceSparkError: The failure, where none may.
    """
    refusal = restarts.refusal([lost], place)
    if refusal is not None:
        raise error_of(replace(lost, cause=f"{lost.cause}\n({refusal})") if refusal else lost)


def _run_stage(work: Work, restarts: Restarts, num_ranks: int) -> str | None:
    """Bring up the rendezvous and run one barrier stage.

    Returns:
        Why another stage is to go on, for people; None where the work is done.
    """
    key = secrets.token_bytes(32)
    listen_host, reachable_host = driver_addresses(work.context)
    with rendezvous_for(
        num_ranks,
        key,
        work.timeouts,
        approve=work.approve,
        coordinator=work.coordinator,
        restarts=restarts,
        results=work.results,
        on_progress=work.on_progress,
    ) as rendezvous:
        _, port = rendezvous.start(listen_host)
        address = (reachable_host, port)
        task = StageTask(
            num_ranks,
            work.num_shards,
            address,
            key,
            work.timeouts,
            work.files,
            work.store,
            work.backend,
            environment(),
        )
        work.spectator.show_phase(Phase.START)
        shards = shards_for(work.shards, work.num_shards, num_ranks)
        watch = partial(_watch, work, rendezvous, _Slots(work, num_ranks))
        failure = run_stage(work.context, shards, rendezvous, task, watch, work.resources)
    if failure is None:
        return "there are slots for more ranks" if rendezvous.regroups else None
    if not rendezvous.stage_is_lost:
        raise error_of(failure)
    check_restart(restarts, failure, place_of(rendezvous.stations))
    return failure.text


class _Slots:
    """Whether there are slots for more ranks than are at work: asked now and then, and only where that would be of use."""

    def __init__(self, work: Work, num_ranks: int) -> None:
        self._count = partial(count_slots, work.context, work.resources)
        self._num_ranks, self._wanted = num_ranks, work.num_shards
        self._look_at = time.monotonic() if num_ranks < self._wanted and work.store is not None else math.inf

    def are_back(self) -> bool:
        if time.monotonic() < self._look_at:
            return False
        self._look_at = time.monotonic() + LOOK_S
        return min(self._count(), self._wanted) > self._num_ranks


def _watch(work: Work, rendezvous: Rendezvous, slots: _Slots) -> None:
    """Called many times a second while a stage runs."""
    work.spectator.draw()
    if slots.are_back():
        rendezvous.regroup()
