"""One fit, once its arguments are checked and its rows divided: the way of `SparkModel.fit`, and of every trial of a search.

And one function, the way of `run`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyspark import RDD, SparkContext
from pyspark.resource import ResourceProfile

from allreduce_spark.checkpoint.coordinator import Coordinator
from allreduce_spark.checkpoint.store import Store
from allreduce_spark.config import Checkpoint, FitConfig, Recovery, Timeouts
from allreduce_spark.launch.scratch import scratch_folder
from allreduce_spark.rendezvous.group import Join
from allreduce_spark.spark.approval import approve_fit, approve_function
from allreduce_spark.spark.cluster import count_slots
from allreduce_spark.spark.hosting import EachEpochOnce
from allreduce_spark.spark.progress import Nobody
from allreduce_spark.spark.ranks import Spectator, Work, run_work
from allreduce_spark.spark.recovery import Safety, coordinate
from allreduce_spark.spark.slots import hold_slots
from allreduce_spark.training.checks import warn_if_diverged
from allreduce_spark.training.function import FunctionJob
from allreduce_spark.training.identity import fingerprint_of
from allreduce_spark.training.job import make_job
from allreduce_spark.training.result import take_over

if TYPE_CHECKING:
    import keras

__all__ = ["Rows", "run_fit", "run_function_job"]


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
    job = make_job(model, custom_objects, callbacks, config, timeouts, safety.saves)
    fingerprint = fingerprint_of(model, config, callbacks)
    with (
        scratch_folder() as folder,  # which the next fit here removes if this driver is killed
        hold_slots(rows.num_ranks, partial(count_slots, context, resources), kind=resources and resources.id),
        coordinate(safety, job.model, timeouts.checkpoint_s) as coordinator,
    ):

        def approval(joins: Sequence[Join]) -> dict[str, Any]:
            return approve_fit(
                joins,
                model=model,
                config=config,
                fingerprint=fingerprint,
                with_validation_data=rows.with_validation,
                coordinator=coordinator,
                of_this_fit=coordinator.has_begun,
                backend=backend,
                ranks_per_gpu=ranks_per_gpu,
            )

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
                on_progress=EachEpochOnce(spectator.report),
                results=folder,
                resources=resources,
            )
        )
        history = take_over(model, folder / "result-0")
    warn_if_diverged(model)
    return history


def run_function_job(
    context: SparkContext,
    job: FunctionJob,
    num_ranks: int,
    backend: str,
    max_restarts: int,
    folder: Path,
    *,
    resources: ResourceProfile | None,
    ranks_per_gpu: int,
) -> None:
    """Call a function on the ranks of barrier stages; what rank r returned becomes the file `result-r` in `folder`.

    Raises:
        RankFailedError, CancelledError, KeyboardInterrupt: What ended it.
    """
    with (
        hold_slots(num_ranks, partial(count_slots, context, resources), kind=resources and resources.id),
        contextlib.closing(Coordinator(Checkpoint())) as coordinator,
    ):
        run_work(
            Work(
                context=context,
                shards=context.parallelize([], num_ranks),
                num_shards=num_ranks,
                files=job.files(),
                timeouts=job.timeouts,
                backend=backend,
                store=None,
                approve=partial(approve_function, backend=backend, ranks_per_gpu=ranks_per_gpu),
                coordinator=coordinator,
                recovery=Recovery(max_restarts, min_ranks=num_ranks),
                spectator=Nobody(),
                results=folder,
                resources=resources,
            )
        )
