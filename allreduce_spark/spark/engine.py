"""What `SparkModel` asks of a Spark session, be its driver here (`classic`) or behind a Connect server (`connect`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pyspark.errors import PySparkRuntimeError
from pyspark.resource import ResourceProfile
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.utils import is_remote

from allreduce_spark.config import Checkpoint, FitConfig, Timeouts
from allreduce_spark.spark.shards import Columns, FormedTable

if TYPE_CHECKING:
    import keras

    from allreduce_spark.checkpoint.manifest import Manifest
    from allreduce_spark.spark.progress import Display
    from allreduce_spark.spark.recovery import Safety
    from allreduce_spark.training.function import FunctionJob
    from allreduce_spark.training.inference import PartitionMetrics
    from allreduce_spark.training.scoring import PackedModel

__all__ = ["Engine", "Fit", "engine_for"]


@dataclass(frozen=True)
class Fit:
    """A fit whose arguments are checked.

    Attributes:
        model: The user's, which is to be trained.
        data, validation_data: As the user gave them.
        columns: What is what in a DataFrame.
        num_ranks: How many shards, and so ranks while no machine is lost.
        config, timeouts: The settings.
        callbacks, custom_objects: The user's.
        safety: How it is kept safe.
        backend: What the ranks are to reduce by, as `config.BACKENDS` names it.
        ranks_per_gpu: How many of them may share a GPU.
    """

    model: keras.Model
    data: Any
    validation_data: Any
    columns: Columns
    num_ranks: int
    config: FitConfig
    timeouts: Timeouts
    callbacks: Sequence[keras.callbacks.Callback]
    custom_objects: dict[str, Any]
    safety: Safety
    backend: str
    ranks_per_gpu: int


class Engine(Protocol):
    """Fits and inference behind one session. What a method raises is what `SparkModel` says it raises."""

    @property
    def application(self) -> str:
        """What tells it from other applications, and sessions, that a model may have been sent to."""

    def newest_checkpoint(self, checkpoint: Checkpoint, timeouts: Timeouts) -> Manifest | None:
        """The last complete one in its store, which is looked at from where the fit's driver will be."""

    def check_slots(self, num_ranks: int | None, timeouts: Timeouts, min_ranks: int | None = None) -> int:
        """The number of ranks: `num_ranks`, or where that is None, as many as there are slots.

        There are slots for all of them, or for `min_ranks` at least, where that is given.
        """

    def fit(self, fit: Fit, display: Display) -> keras.callbacks.History:
        """Train the model."""

    def run(
        self, job: FunctionJob, num_ranks: int, backend: str, max_restarts: int, folder: Path, ranks_per_gpu: int
    ) -> None:
        """Call a function on ranks; what rank r returned becomes the file `result-r` in `folder`."""

    def send_model(self, packed: PackedModel) -> Callable[[], PackedModel]:
        """Bring a model to the executors, once for all tasks; what is returned gets it there."""

    def predict(self, packed: PackedModel, batch_size: int, data: Any, columns: Columns) -> list[Any]:
        """The predictions of each partition that has rows, in the order of the rows."""

    def evaluate(self, packed: PackedModel, batch_size: int, data: Any, columns: Columns) -> list[PartitionMetrics]:
        """The metric state of each partition that has rows."""


def engine_for(*data: Any, resources: ResourceProfile | None = None) -> Engine:
    """The engine for these data: that of the session of a DataFrame among them, else that of the active session.

    The active one of a thread that has made no Connect session is the default one of the process, as it is for Spark.

    Args:
        resources: What each task is to ask of Spark; None for what the application's settings say.

    Raises:
        ConfigError: There is no session, or it cannot run ranks, or has no such resources.
    """
    frames = [part.frame if isinstance(part, FormedTable) else part for part in data]
    remote = [frame for frame in frames if isinstance(frame, DataFrame) and _is_of_connect(frame)]
    if remote or is_remote():
        from allreduce_spark.spark.connect.engine import ConnectEngine  # needs grpc, which not everybody has

        return ConnectEngine.of(remote[0].sparkSession if remote else _active_session(), resources)
    from allreduce_spark.spark.classic import ClassicEngine

    return ClassicEngine.of_active_context(resources)


def _active_session() -> SparkSession | None:
    try:
        return SparkSession.active()
    except PySparkRuntimeError:
        return None  # nor is there a default one


def _is_of_connect(frame: DataFrame) -> bool:
    return type(frame).__module__.startswith("pyspark.sql.connect.")
