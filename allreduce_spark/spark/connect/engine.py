"""The engine for a Spark Connect session: the same stages, each led by a process beside its rank 0 and not by this one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyspark.resource import ResourceProfile
from pyspark.sql import DataFrame, SparkSession

from allreduce_spark.checkpoint.manifest import Manifest
from allreduce_spark.checkpoint.store import Store
from allreduce_spark.config import MAX_RANKS, Checkpoint, Timeouts
from allreduce_spark.errors import ConfigError
from allreduce_spark.launch.scratch import scratch_folder
from allreduce_spark.rendezvous.group import Failure
from allreduce_spark.rendezvous.protocol import Phase
from allreduce_spark.rendezvous.recovery import Restarts
from allreduce_spark.spark.cluster import wait_for_slots
from allreduce_spark.spark.connect.driver import Order
from allreduce_spark.spark.connect.inference import evaluate_rows_of, predict_rows_of, read_model, send_model
from allreduce_spark.spark.connect.session import (
    Profile,
    ask_executor,
    check_result_size,
    check_slots,
    count_slots,
    register,
)
from allreduce_spark.spark.connect.shards import shards_of
from allreduce_spark.spark.connect.stage import run_stage
from allreduce_spark.spark.connect.transfer import send_files
from allreduce_spark.spark.engine import Fit
from allreduce_spark.spark.progress import Nobody
from allreduce_spark.spark.ranks import Spectator, check_restart, warn_of_restart
from allreduce_spark.spark.recovery import newest_checkpoint
from allreduce_spark.spark.shards import Columns
from allreduce_spark.spark.slots import hold_slots
from allreduce_spark.spark.stage import error_of
from allreduce_spark.training.backends import environment
from allreduce_spark.training.checks import warn_if_diverged
from allreduce_spark.training.identity import fingerprint_of
from allreduce_spark.training.job import make_job
from allreduce_spark.training.result import least_bytes, take_over

if TYPE_CHECKING:
    import keras

    from allreduce_spark.training.function import FunctionJob
    from allreduce_spark.training.inference import PartitionMetrics
    from allreduce_spark.training.scoring import PackedModel

__all__ = ["ConnectEngine"]


@dataclass(frozen=True)
class ConnectEngine:
    """See `Engine`.

    All that ranks bring comes back as the answer of one task, which counts against spark.driver.maxResultSize of the server, 1g
    by default. A fit whose weights and optimizer state are known to be more is refused before it begins; of what functions
    return nothing is known, and Spark's error at their end names the setting.
    """

    session: SparkSession
    profile: Profile | None

    @classmethod
    def of(cls, session: SparkSession | None, resources: ResourceProfile | None) -> ConnectEngine:
        """The engine for a session, and tasks that ask for `resources`; None for what the application's settings say.

        Raises:
            ConfigError: There is none, or there are no such resources.
        """
        if session is None:
            raise ConfigError(
                "there is no active Spark Connect session: make one first, with SparkSession.builder.remote(url).getOrCreate()"
            )
        return cls(session, register(session, resources))

    @property
    def application(self) -> str:
        return str(self.session.session_id)  # type: ignore[attr-defined]  # of Connect

    def newest_checkpoint(self, checkpoint: Checkpoint, timeouts: Timeouts) -> Manifest | None:
        path = Store(str(checkpoint.path)).path
        found = ask_executor(self.session, partial(_newest, path, timeouts.checkpoint_s), timeouts)
        return None if found is None else Manifest.from_json(found)

    def check_slots(self, num_ranks: int | None, timeouts: Timeouts, min_ranks: int | None = None) -> int:
        return check_slots(self.session, num_ranks, timeouts, min_ranks, self.profile)

    def fit(self, fit: Fit, display: Spectator) -> keras.callbacks.History:
        job = make_job(fit.model, fit.custom_objects, fit.callbacks, fit.config, fit.timeouts, fit.safety.saves)
        check_result_size(self.session.conf.getAll, least_bytes(fit.model))
        resumed = fit.safety.resumed
        order = Order(
            num_ranks=fit.num_ranks,
            num_shards=fit.num_ranks,
            timeouts=fit.timeouts,
            backend=fit.backend,
            max_restarts=fit.safety.recovery.max_restarts,
            checkpoint=_with_absolute_path(fit.safety.checkpoint),
            resumed=None if resumed is None else resumed.to_json(),
            fingerprint=fingerprint_of(fit.model, fit.config, fit.callbacks).to_json(),
            with_validation_data=fit.validation_data is not None,
            ranks_per_gpu=fit.ranks_per_gpu,
            keras_environment=environment(),
        )
        shards = shards_of(self.session, fit.data, fit.validation_data, fit.columns, fit.num_ranks)
        with scratch_folder() as folder, self._hold_slots(fit.num_ranks):
            sent = send_files(self.session, job.files())
            self._run_stages(shards, order, sent, folder, fit.safety.recovery.min_ranks, display)
            history = take_over(fit.model, folder / "result-0")
        warn_if_diverged(fit.model)
        return history

    def run(
        self, job: FunctionJob, num_ranks: int, backend: str, max_restarts: int, folder: Path, ranks_per_gpu: int
    ) -> None:
        order = Order(
            num_ranks=num_ranks,
            num_shards=num_ranks,
            timeouts=job.timeouts,
            backend=backend,
            max_restarts=max_restarts,
            checkpoint=Checkpoint(),
            ranks_per_gpu=ranks_per_gpu,
            keras_environment=environment(),
        )
        with self._hold_slots(num_ranks):
            sent = send_files(self.session, job.files())
            self._run_stages(None, order, sent, folder, num_ranks, Nobody())

    def send_model(self, packed: PackedModel) -> Callable[[], PackedModel]:
        return partial(read_model, send_model(self.session, packed))

    def predict(self, packed: PackedModel, batch_size: int, data: Any, columns: Columns) -> list[Any]:
        return predict_rows_of(self.session, packed, batch_size, data, columns, self.profile)

    def evaluate(self, packed: PackedModel, batch_size: int, data: Any, columns: Columns) -> list[PartitionMetrics]:
        return evaluate_rows_of(self.session, packed, batch_size, data, columns, self.profile)

    def _hold_slots(self, num_ranks: int) -> AbstractContextManager[None]:
        def count() -> int:
            slots = count_slots(self.session, self.profile)
            return MAX_RANKS if slots is None else slots

        return hold_slots(num_ranks, count, kind=self.profile and self.profile.requests)

    def _run_stages(
        self, shards: DataFrame | None, order: Order, sent: str, folder: Path, least: int | None, display: Spectator
    ) -> None:
        """Barrier stages, one after another, until there is a result. One does, unless machines are lost."""
        restarts = Restarts(order.max_restarts)
        slots = partial(count_slots, self.session, self.profile)
        wait = partial(wait_for_slots, slots, order.num_shards, slots_s=order.timeouts.slots_s)
        if least is not None:
            order = replace(order, num_ranks=wait(least))
        lost: Failure | None = None
        while True:
            display.show_phase(Phase.START)
            with _after(lost):
                outcome = run_stage(self.session, shards, order, sent, folder, display.draw, self.profile)
            failure = outcome.failure
            if failure is None:
                return
            if not outcome.stage_is_lost:
                raise error_of(failure)
            lost = failure
            with _after(lost):
                keeps = order.checkpoint.path is not None
                newest = self.newest_checkpoint(order.checkpoint, order.timeouts) if keeps else None
            reached = (-1, -1) if newest is None else (newest.epoch, newest.step)
            check_restart(restarts, failure, max(outcome.place, reached))
            with _after(lost):
                num_ranks = wait(least or 1)
            began_with = order.resumed and order.resumed["id"]
            order = replace(
                order,
                num_ranks=num_ranks,
                resumed=None if newest is None else newest.to_json(),
                of_this_fit=order.of_this_fit or (newest is not None and newest.id != began_with),
            )
            warn_of_restart(newest, num_ranks, order.num_shards, failure.text)


@contextlib.contextmanager
def _after(lost: Failure | None) -> Iterator[None]:
    """Let an error about slots that are missing name the failure since which they may be."""
    try:
        yield
    except ConfigError as error:
        if lost is None:
            raise
        raise ConfigError(f"{error}\nBefore, a barrier stage was lost: {lost.text}") from error_of(lost)


def _newest(path: str, timeout_s: float) -> dict[str, Any] | None:
    newest = newest_checkpoint(path, timeout_s)
    return None if newest is None else newest.to_json()


def _with_absolute_path(checkpoint: Checkpoint) -> Checkpoint:
    return checkpoint if checkpoint.path is None else replace(checkpoint, path=Store(checkpoint.path).path)
