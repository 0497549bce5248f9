"""One fit, once its arguments are checked and its rows divided: the way of `SparkModel.fit`, and of every trial of a search."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from pyspark import RDD, SparkContext
from pyspark.resource import ResourceProfile

from allreduce_spark.checkpoint.store import Store
from allreduce_spark.config import FitConfig, Timeouts
from allreduce_spark.launch.scratch import scratch_folder
from allreduce_spark.rendezvous.group import Join
from allreduce_spark.spark.approval import approve, check_gpus, choose_backend
from allreduce_spark.spark.cluster import count_slots
from allreduce_spark.spark.ranks import Spectator, Work, run_work
from allreduce_spark.spark.recovery import Safety, check_resumable, coordinate, fingerprint_of_joins
from allreduce_spark.spark.slots import hold_slots
from allreduce_spark.training.backends import ours
from allreduce_spark.training.checks import warn_if_diverged
from allreduce_spark.training.job import make_job
from allreduce_spark.training.result import take_over

if TYPE_CHECKING:
    import keras

__all__ = ["Rows", "run_fit"]

log = logging.getLogger(__name__)


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
    resources: ResourceProfile | None = None,
    ranks_per_gpu: int = 1,
) -> keras.callbacks.History:
    """Train `model` on the ranks of barrier stages, and bring the trained state back into it.

    Raises:
        ConfigError, DataError: Something about the model or the rows cannot work; no rank has started.
        RankFailedError, CancelledError, KeyboardInterrupt: What ended the fit.
    """
    if model.jit_compile and not ours.COMPILES_CALLS:
        log.info("the ranks train without jit_compile: compiled code would know no way out to the other ranks")
    job = make_job(model, custom_objects, callbacks, config, timeouts, safety.saves)
    with (
        scratch_folder() as folder,  # which the next fit here removes if this driver is killed
        hold_slots(rows.num_ranks, partial(count_slots, context, resources), kind=resources and resources.id),
        coordinate(safety, job.model, timeouts.checkpoint_s) as coordinator,
    ):

        def approval(joins: Sequence[Join]) -> dict[str, Any]:
            check_gpus(joins, ranks_per_gpu, gpus_per_rank=1)
            approved = approve(joins, model=model, config=config, with_validation_data=rows.with_validation)
            fingerprint = fingerprint_of_joins(model, config, callbacks, joins, approved["spec"])
            if coordinator.newest:
                check_resumable(coordinator.newest, fingerprint, of_this_fit=coordinator.has_begun)
            coordinator.begin(fingerprint)
            return {**approved, "backend": choose_backend(backend, joins)}

        store = None if job.checkpoint is None or job.checkpoint.path is None else Store(job.checkpoint.path).path
        run_work(
            Work(
                context=context,
                shards=rows.shards,
                num_shards=rows.num_ranks,
                files=job.files(),
                timeouts=timeouts,
                backend=backend,
                store=store,
                approve=approval,
                coordinator=coordinator,
                recovery=safety.recovery,
                spectator=spectator,
                on_progress=_EachEpochOnce(spectator.report),
                results=folder,
                resources=resources,
            )
        )
        history = take_over(model, folder / "result-0")
    warn_if_diverged(model)
    return history


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
