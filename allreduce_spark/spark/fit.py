"""One fit, once its arguments are checked and its rows divided: the way of `SparkModel.fit`, and of every trial of a search."""

from __future__ import annotations

import contextlib
import secrets
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pyspark import RDD, SparkContext

from allreduce_spark.config import FitConfig, Timeouts
from allreduce_spark.rendezvous.protocol import Phase
from allreduce_spark.rendezvous.server import Rendezvous
from allreduce_spark.spark.approval import approve
from allreduce_spark.spark.slots import hold_slots
from allreduce_spark.spark.stage import StageTask, count_slots, driver_addresses, run_stage
from allreduce_spark.training.checks import warn_if_diverged
from allreduce_spark.training.job import Job, make_job
from allreduce_spark.training.result import take_over

if TYPE_CHECKING:
    import keras

__all__ = ["Rows", "Spectator", "run_fit"]


@dataclass(frozen=True)
class Rows:
    """The rows of a fit.

    Attributes:
        shards: The blocks of each rank's rows, one partition per rank.
        num_ranks: How many partitions.
        with_validation: Whether there are rows of the role "validation" among them.
    """

    shards: RDD[bytes]
    num_ranks: int
    with_validation: bool


class Spectator(Protocol):
    """Whoever wants to see how a fit goes on."""

    def show_phase(self, phase: Phase) -> None: ...

    def report(self, fields: dict[str, Any]) -> None:
        """Progress; called in the rendezvous thread. What it raises ends the fit."""

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
) -> keras.callbacks.History:
    """Train `model` on the ranks of a barrier stage, and bring the trained state back into it.

    Raises:
        ConfigError, DataError: Something about the model or the rows cannot work; no rank has started.
        RankFailedError, CancelledError, KeyboardInterrupt: See `stage.run_stage`.
    """
    job = make_job(model, custom_objects, callbacks, config, timeouts)
    approval = partial(approve, model=model, config=config, with_validation_data=rows.with_validation)
    with (
        tempfile.TemporaryDirectory(prefix="allreduce_spark-") as folder,
        hold_slots(rows.num_ranks, partial(count_slots, context)),
    ):
        result = Path(folder) / "result"
        _train(context, rows, job, approval, spectator, result)
        history = take_over(model, result)
    warn_if_diverged(model)
    return history


def _train(
    context: SparkContext,
    rows: Rows,
    job: Job,
    approval: Callable[..., dict[str, Any]],
    spectator: Spectator,
    result: Path,
) -> None:
    """Bring up the rendezvous, run the barrier stage, and leave what the root sends in the file `result`."""
    key = secrets.token_bytes(32)
    listen_host, reachable_host = driver_addresses(context)
    with result.open("wb") as file:
        rendezvous = Rendezvous(
            rows.num_ranks,
            key,
            job.timeouts,
            approve=approval,
            on_progress=spectator.report,
            on_result=file.write,
        )
        with contextlib.closing(rendezvous):
            _, port = rendezvous.start(listen_host)
            task = StageTask(rows.num_ranks, (reachable_host, port), key, job.timeouts, job.files())
            spectator.show_phase(Phase.START)
            run_stage(context, rows.shards, rendezvous, task, spectator.draw)
