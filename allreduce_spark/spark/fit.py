"""One fit, once its arguments are checked and its rows divided: the way of `SparkModel.fit`, and of every trial of a search."""

from __future__ import annotations

import contextlib
import logging
import math
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pyspark import RDD, SparkContext

from allreduce_spark.checkpoint.coordinator import Coordinator
from allreduce_spark.checkpoint.manifest import Manifest
from allreduce_spark.checkpoint.store import Store
from allreduce_spark.config import FitConfig, Timeouts
from allreduce_spark.launch.scratch import scratch_folder
from allreduce_spark.rendezvous.controller import Hooks
from allreduce_spark.rendezvous.group import Failure, Join
from allreduce_spark.rendezvous.protocol import Phase
from allreduce_spark.rendezvous.recovery import Restarts, place_of
from allreduce_spark.rendezvous.server import Rendezvous
from allreduce_spark.spark.approval import approve, choose_backend
from allreduce_spark.spark.cluster import count_slots, driver_addresses, wait_for_slots
from allreduce_spark.spark.recovery import Safety, check_resumable, coordinate, fingerprint_of_joins
from allreduce_spark.spark.shards import shards_for
from allreduce_spark.spark.slots import hold_slots
from allreduce_spark.spark.stage import StageTask, error_of, run_stage
from allreduce_spark.training.checks import warn_if_diverged
from allreduce_spark.training.job import Job, make_job
from allreduce_spark.training.result import take_over

if TYPE_CHECKING:
    import keras

__all__ = ["Rows", "Spectator", "run_fit"]

log = logging.getLogger(__name__)

LOOK_S = 2.0  # at the slots


@dataclass(frozen=True)
class Rows:
    """The rows of a fit.

    Attributes:
        shards: Pairs (number of the shard, block), one partition per shard.
        num_ranks: How many shards, and so ranks, while no machine is lost.
        with_validation: Whether there are rows of the role "validation" among them.
    """

    shards: RDD[tuple[int, bytes]]
    num_ranks: int
    with_validation: bool


class Spectator(Protocol):
    """Whoever wants to see how a fit goes on."""

    def show_phase(self, phase: Phase) -> None: ...

    def report(self, fields: dict[str, Any]) -> None:
        """Progress; called in the rendezvous thread. What it raises ends the fit.

        An epoch ends once, also where ranks that were started again have trained it a second time.
        """

    def draw(self) -> None:
        """Called many times a second, in the thread of the fit."""


def run_fit(
    context: SparkContext,
    model: keras.Model,
    rows: Rows,
    config: FitConfig,
    *,
    callbacks: Sequence[keras.callbacks.Callback],
    custom_objects: Mapping[str, Any],
    timeouts: Timeouts,
    spectator: Spectator,
    safety: Safety,
    backend: str = "mpi",
) -> keras.callbacks.History:
    """Train `model` on the ranks of barrier stages, and bring the trained state back into it.

    One stage does, unless machines are lost: then another one goes on with the slots that are left.

    Raises:
        ConfigError, DataError: Something about the model or the rows cannot work; no rank has started.
        RankFailedError, CancelledError, KeyboardInterrupt: What ended the fit.
    """
    job = make_job(model, custom_objects, callbacks, config, timeouts, safety.saves)
    least = safety.recovery.min_ranks
    with (
        scratch_folder() as folder,  # which the next fit here removes if this driver is killed
        hold_slots(rows.num_ranks, partial(count_slots, context)),
        coordinate(safety, job.model) as coordinator,
    ):

        def approval(joins: Sequence[Join]) -> dict[str, Any]:
            approved = approve(joins, model=model, config=config, with_validation_data=rows.with_validation)
            fingerprint = fingerprint_of_joins(model, config, callbacks, joins, approved["spec"])
            if coordinator.newest:
                check_resumable(coordinator.newest, fingerprint, of_this_fit=coordinator.has_begun)
            coordinator.begin(fingerprint)
            return {**approved, "backend": choose_backend(backend, joins)}

        result = folder / "result"
        restarts, on_progress = Restarts(safety.recovery.max_restarts), _EachEpochOnce(spectator.report)
        fit = _Fit(context, rows, job, approval, restarts, coordinator, spectator, on_progress, result, backend)
        num_ranks = rows.num_ranks if least is None else wait_for_slots(context, rows.num_ranks, least, timeouts)
        while (why := _train(fit, num_ranks)) is not None:
            coordinator.fall_back()
            num_ranks = wait_for_slots(context, rows.num_ranks, least or 1, timeouts)
            log.warning(
                "another barrier stage goes on from %s with %d of %d ranks: %s",
                _place_of(coordinator.newest), num_ranks, rows.num_ranks, why,
            )  # fmt: skip
        history = take_over(model, result)
    warn_if_diverged(model)
    return history


@dataclass(frozen=True)
class _Fit:
    """What all barrier stages of one fit have in common."""

    context: SparkContext
    rows: Rows
    job: Job
    approval: Callable[[Sequence[Join]], dict[str, Any]]
    restarts: Restarts
    coordinator: Coordinator
    spectator: Spectator
    on_progress: Callable[[dict[str, Any]], None]
    result: Path
    backend: str


class _EachEpochOnce:
    """Passes progress on, but for that of epochs which were over before the ranks had to go back behind their end."""

    def __init__(self, report: Callable[[dict[str, Any]], None]) -> None:
        self._report, self._last_over = report, -1

    def __call__(self, fields: dict[str, Any]) -> None:
        if "epoch" in fields:
            if fields["epoch"] <= self._last_over:
                return
            if fields["epoch_done"]:
                self._last_over = fields["epoch"]
        self._report(fields)


def _place_of(checkpoint: Manifest | None) -> str:
    return f"epoch {checkpoint.epoch}, step {checkpoint.step}" if checkpoint else "the beginning"


def _train(fit: _Fit, num_ranks: int) -> str | None:
    """Bring up the rendezvous, run one barrier stage, and leave what the root sends in the file `result`.

    Returns:
        Why another stage is to go on, for people; None where the training is complete.
    """
    key, job, rows = secrets.token_bytes(32), fit.job, fit.rows
    listen_host, reachable_host = driver_addresses(fit.context)
    with fit.result.open("wb") as file:

        def forget_result(cause: Failure) -> None:
            file.seek(0)
            file.truncate()

        hooks = Hooks(
            approve=fit.approval,
            resume=lambda joins: fit.coordinator.resume([join.saved for join in joins]),
            on_progress=fit.on_progress,
            on_result=file.write,
            on_saved=fit.coordinator.note,
            on_restart=forget_result,
        )
        with contextlib.closing(Rendezvous(num_ranks, key, job.timeouts, hooks, fit.restarts)) as rendezvous:
            _, port = rendezvous.start(listen_host)
            store = Store(job.checkpoint.path).path if job.checkpoint and job.checkpoint.path else None
            address = (reachable_host, port)
            task = StageTask(num_ranks, rows.num_ranks, address, key, job.timeouts, job.files(), store, fit.backend)
            fit.spectator.show_phase(Phase.START)
            shards = shards_for(rows.shards, rows.num_ranks, num_ranks)
            watch = partial(_watch, fit, rendezvous, _Slots(fit.context, num_ranks, rows.num_ranks, store))
            failure = run_stage(fit.context, shards, rendezvous, task, watch)
    if failure is None:
        return "there are slots for more ranks" if rendezvous.regroups else None
    if not rendezvous.stage_is_lost:
        raise error_of(failure)
    refusal = fit.restarts.refusal([failure], place_of(rendezvous.stations))
    if refusal is not None:
        raise error_of(replace(failure, cause=f"{failure.cause}\n({refusal})") if refusal else failure)
    return failure.text


class _Slots:
    """Whether there are slots for more ranks than are training: asked now and then, and only where that would be of use."""

    def __init__(self, context: SparkContext, num_ranks: int, wanted: int, store: str | None) -> None:
        self._context, self._num_ranks, self._wanted = context, num_ranks, wanted
        self._look_at = time.monotonic() if num_ranks < wanted and store is not None else math.inf

    def are_back(self) -> bool:
        if time.monotonic() < self._look_at:
            return False
        self._look_at = time.monotonic() + LOOK_S
        return min(count_slots(self._context), self._wanted) > self._num_ranks


def _watch(fit: _Fit, rendezvous: Rendezvous, slots: _Slots) -> None:
    """Called many times a second while a stage runs."""
    fit.spectator.draw()
    if slots.are_back():
        rendezvous.regroup()
