"""predict and evaluate on Spark: every partition by itself, without barrier or communicator, results in order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from pyspark import RDD
from pyspark.errors import PySparkException

from allreduce_spark.errors import AllReduceSparkError, DataError, MissingDependencyError
from allreduce_spark.spark.stage import missing_module

if TYPE_CHECKING:
    from allreduce_spark.training.inference import InferenceTask, PartitionMetrics

__all__ = ["evaluate_blocks", "predict_blocks"]


def predict_blocks(task: InferenceTask, blocks: RDD[bytes]) -> list[Any]:
    """The predictions of each partition that has rows, in the order of the partitions."""
    return _collect(blocks.mapPartitions(partial(_predict, task)))


def evaluate_blocks(task: InferenceTask, blocks: RDD[bytes]) -> list[PartitionMetrics]:
    """The metric state of each partition that has rows."""
    return _collect(blocks.mapPartitions(partial(_evaluate, task)))


def _predict(task: InferenceTask, blocks: Iterable[bytes]) -> Iterator[Any]:
    from allreduce_spark.training.inference import predict_rows

    return _only_known_errors(predict_rows, task, blocks)


def _evaluate(task: InferenceTask, blocks: Iterable[bytes]) -> Iterator[Any]:
    from allreduce_spark.training.inference import evaluate_rows

    return _only_known_errors(evaluate_rows, task, blocks)


def _only_known_errors(function: Any, task: InferenceTask, blocks: Iterable[bytes]) -> Iterator[Any]:
    """Errors that trying again cannot mend travel as values: Spark would run the task again and wrap the message."""
    try:
        result = function(task, blocks)
    except AllReduceSparkError as error:
        yield error
    else:
        if result is not None:
            yield result


def _collect(results: RDD[Any]) -> list[Any]:
    try:
        collected = results.collect()
    except PySparkException as error:
        missing = missing_module(error)
        if missing is None:
            raise  # an error in the user's own map functions, or in Spark
        raise MissingDependencyError(missing) from error
    for result in collected:
        if isinstance(result, AllReduceSparkError):
            raise result
    if not collected:
        raise DataError("the data has no rows")
    return collected


def concatenate(parts: list[Any]) -> Any:
    """Predictions of the partitions -> predictions of all rows, in the structure of the model's outputs."""
    first = parts[0]
    if isinstance(first, dict):
        return {key: concatenate([part[key] for part in parts]) for key in first}
    if isinstance(first, (list, tuple)):
        return type(first)(concatenate(list(column)) for column in zip(*parts, strict=True))
    return np.concatenate(parts)
