"""Synchronous data-parallel training of Keras models on Apache Spark, with no parameter server.

The public names are imported when they are first used: `import allreduce_spark` itself imports neither pyspark,
tensorflow, mpi4py nor horovod, and changes no global state.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from allreduce_spark.communicator.base import Communicator, ReduceOp
    from allreduce_spark.config import Checkpoint, Timeouts
    from allreduce_spark.errors import AllReduceSparkError
    from allreduce_spark.spark.ml.estimator import AllReduceEstimator
    from allreduce_spark.spark.ml.transformer import AllReduceTransformer
    from allreduce_spark.spark.mllib import SparkMLlibModel
    from allreduce_spark.spark.model import SparkModel
    from allreduce_spark.spark.run import run
    from allreduce_spark.spark.tuning.search import search
    from allreduce_spark.training.loops import DistributedOptimizer, broadcast, shard_dataset

__version__ = "0.1.0"

__all__ = [
    "AllReduceEstimator",
    "AllReduceSparkError",
    "AllReduceTransformer",
    "Checkpoint",
    "Communicator",
    "DistributedOptimizer",
    "ReduceOp",
    "SparkMLlibModel",
    "SparkModel",
    "Timeouts",
    "__version__",
    "broadcast",
    "run",
    "search",
    "shard_dataset",
]

_HOME_OF = {
    "AllReduceEstimator": "allreduce_spark.spark.ml.estimator",
    "AllReduceSparkError": "allreduce_spark.errors",
    "AllReduceTransformer": "allreduce_spark.spark.ml.transformer",
    "Checkpoint": "allreduce_spark.config",
    "Communicator": "allreduce_spark.communicator.base",
    "DistributedOptimizer": "allreduce_spark.training.loops",
    "ReduceOp": "allreduce_spark.communicator.base",
    "SparkMLlibModel": "allreduce_spark.spark.mllib",
    "SparkModel": "allreduce_spark.spark.model",
    "Timeouts": "allreduce_spark.config",
    "broadcast": "allreduce_spark.training.loops",
    "run": "allreduce_spark.spark.run",
    "search": "allreduce_spark.spark.tuning.search",
    "shard_dataset": "allreduce_spark.training.loops",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'allreduce_spark' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
