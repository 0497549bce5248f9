"""Synchronous data-parallel training of Keras models on Apache Spark, with no parameter server.

The public names are imported when they are first used: `import allreduce_spark` itself imports neither pyspark,
tensorflow, mpi4py nor horovod, and changes no global state.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from allreduce_spark.config import Timeouts
    from allreduce_spark.errors import AllReduceSparkError
    from allreduce_spark.spark.model import SparkModel

__version__ = "0.1.0"

__all__ = ["AllReduceSparkError", "SparkModel", "Timeouts", "__version__"]

_HOME_OF = {
    "AllReduceSparkError": "allreduce_spark.errors",
    "SparkModel": "allreduce_spark.spark.model",
    "Timeouts": "allreduce_spark.config",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'allreduce_spark' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
