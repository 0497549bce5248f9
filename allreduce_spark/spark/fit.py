"""One fit, once its arguments are checked and its rows divided: the way of `SparkModel.fit`, and of every trial of a search."""

from __future__ import annotations

import contextlib
import logging
import secrets
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pyspark import RDD, SparkContext

from allreduce_spark.config import FitConfig, Recovery, Timeouts
from allreduce_spark.rendezvous.group import Failure
from allreduce_spark.rendezvous.protocol import Phase
from allreduce_spark.rendezvous.recovery import Restarts
from allreduce_spark.rendezvous.server import Rendezvous
from allreduce_spark.spark.approval import approve
from allreduce_spark.spark.shards import shards_for
from allreduce_spark.spark.slots import hold_slots
from allreduce_spark.spark.stage import (
    StageTask,
    count_slots,
    driver_addresses,
    error_of,
    run_stage,
    wait_for_slots,
)
from allreduce_spark.training.checks import warn_if_diverged
from allreduce_spark.training.job import Job, make_job
from allreduce_spark.training.result import take_over

if TYPE_CHECKING:
    import keras

__all__ = ["Rows", "Spectator", "run_fit"]

log = logging.getLogger(__name__)

NO_RECOVERY = Recovery(max_restarts=0)


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
    recovery: Recovery = NO_RECOVERY,
) -> keras.callbacks.History:
    """Train `model` on the ranks of barrier stages, and bring the trained state back into it.

    One stage does, unless machines are lost: then another one goes on with the slots that are left.

    Raises:
        ConfigError, DataError: Something about the model or the rows cannot work; no rank has started.
        RankFailedError, CancelledError, KeyboardInterrupt: What ended the fit.
    """
    job = make_job(model, custom_objects, callbacks, config, timeouts)
    approval = partial(approve, model=model, config=config, with_validation_data=rows.with_validation)
    with (
        tempfile.TemporaryDirectory(prefix="allreduce_spark-") as folder,
        hold_slots(rows.num_ranks, partial(count_slots, context)),
    ):
        result = Path(folder) / "result"
        restarts, num_ranks = Restarts(recovery.max_restarts), rows.num_ranks
        while (loss := _train(context, rows, num_ranks, job, approval, restarts, spectator, result)) is not None:
            num_ranks = wait_for_slots(context, rows.num_ranks, recovery.min_ranks, timeouts)
            log.warning(
                "a barrier stage was lost: %s. Another one goes on with %d of %d ranks.",
                loss.cause.strip(), num_ranks, rows.num_ranks,
            )  # fmt: skip
        history = take_over(model, result)
    warn_if_diverged(model)
    return history


def _train(
    context: SparkContext,
    rows: Rows,
    num_ranks: int,
    job: Job,
    approval: Callable[..., dict[str, Any]],
    restarts: Restarts,
    spectator: Spectator,
    result: Path,
) -> Failure | None:
    """Bring up the rendezvous, run one barrier stage, and leave what the root sends in the file `result`.

    Returns:
        What the stage was lost by, if another one is to go on; None where the training is complete.
    """
    key = secrets.token_bytes(32)
    listen_host, reachable_host = driver_addresses(context)
    with result.open("wb") as file:

        def forget_result(cause: Failure) -> None:
            file.seek(0)
            file.truncate()

        rendezvous = Rendezvous(
            num_ranks,
            key,
            job.timeouts,
            approve=approval,
            restarts=restarts,
            on_progress=spectator.report,
            on_result=file.write,
            on_restart=forget_result,
        )
        with contextlib.closing(rendezvous):
            _, port = rendezvous.start(listen_host)
            task = StageTask(num_ranks, rows.num_ranks, (reachable_host, port), key, job.timeouts, job.files())
            spectator.show_phase(Phase.START)
            shards = shards_for(rows.shards, rows.num_ranks, num_ranks)
            failure = run_stage(context, shards, rendezvous, task, spectator.draw)
    if failure is None:
        return None
    if not rendezvous.stage_is_lost:
        raise error_of(failure)
    refusal = restarts.refusal([failure], rendezvous.place)
    if refusal is not None:
        raise error_of(replace(failure, cause=f"{failure.cause}\n({refusal})") if refusal else failure)
    return failure
