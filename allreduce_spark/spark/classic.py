"""The engine for a session whose driver is this process: RDDs, and the ranks' rendezvous here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyspark import SparkContext
from pyspark.resource import ResourceProfile

from allreduce_spark.config import Checkpoint, Timeouts
from allreduce_spark.spark.cluster import active_context, check_cluster, count_slots, is_local
from allreduce_spark.spark.engine import Fit
from allreduce_spark.spark.fit import Rows, run_fit, run_function_job
from allreduce_spark.spark.inference import evaluate_blocks, predict_blocks, value_of
from allreduce_spark.spark.recovery import newest_checkpoint
from allreduce_spark.spark.resources import register
from allreduce_spark.spark.shards import Columns, blocks_of, shards_of
from allreduce_spark.training.cores import warn_if_gpus_are_taken

if TYPE_CHECKING:
    import keras
    from pyspark import RDD

    from allreduce_spark.checkpoint.manifest import Manifest
    from allreduce_spark.spark.progress import Display
    from allreduce_spark.training.function import FunctionJob
    from allreduce_spark.training.inference import PartitionMetrics
    from allreduce_spark.training.scoring import PackedModel

__all__ = ["ClassicEngine"]


@dataclass(frozen=True)
class ClassicEngine:
    """See `Engine`.

    Attributes:
        resources: What each task asks of Spark, as the application knows it; None for what its settings say.
    """

    context: SparkContext
    resources: ResourceProfile | None

    @classmethod
    def of_active_context(cls, resources: ResourceProfile | None) -> ClassicEngine:
        context = active_context()
        return cls(context, register(context, resources))

    @property
    def application(self) -> str:
        return str(self.context.applicationId)

    def newest_checkpoint(self, checkpoint: Checkpoint, timeouts: Timeouts) -> Manifest | None:
        return newest_checkpoint(str(checkpoint.path), timeouts.checkpoint_s)

    def check_slots(self, num_ranks: int | None, timeouts: Timeouts, min_ranks: int | None = None) -> int:
        return check_cluster(self.context, num_ranks, timeouts, self.resources, min_ranks)

    def fit(self, fit: Fit, display: Display) -> keras.callbacks.History:
        if is_local(self.context):
            warn_if_gpus_are_taken()
        shards = shards_of(self.context, fit.data, fit.validation_data, fit.columns, fit.num_ranks)
        return run_fit(
            self.context,
            fit.model,
            Rows(shards, fit.num_ranks, with_validation=fit.validation_data is not None),
            fit.config,
            callbacks=fit.callbacks,
            custom_objects=fit.custom_objects,
            timeouts=fit.timeouts,
            spectator=display,
            safety=fit.safety,
            backend=fit.backend,
            resources=self.resources,
            ranks_per_gpu=fit.ranks_per_gpu,
        )

    def run(
        self, job: FunctionJob, num_ranks: int, backend: str, max_restarts: int, folder: Path, ranks_per_gpu: int
    ) -> None:
        run_function_job(
            self.context,
            job,
            num_ranks,
            backend,
            max_restarts,
            folder,
            resources=self.resources,
            ranks_per_gpu=ranks_per_gpu,
        )

    def send_model(self, packed: PackedModel) -> Callable[[], PackedModel]:
        return partial(value_of, self.context.broadcast(packed))

    def predict(self, packed: PackedModel, batch_size: int, data: Any, columns: Columns) -> list[Any]:
        return predict_blocks(packed, batch_size, self._blocks(data, columns), self.resources)

    def evaluate(self, packed: PackedModel, batch_size: int, data: Any, columns: Columns) -> list[PartitionMetrics]:
        return evaluate_blocks(packed, batch_size, self._blocks(data, columns), self.resources)

    def _blocks(self, data: Any, columns: Columns) -> RDD[bytes]:
        return blocks_of(self.context, data, columns, max(1, count_slots(self.context, self.resources)))
