"""predict, evaluate and transform on Spark: every partition by itself, without barrier or communicator, rows in order."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cloudpickle
import numpy as np
import pyarrow as pa
from pyspark import RDD, Broadcast, TaskContext
from pyspark.errors import PySparkException
from pyspark.resource import ResourceProfile

from allreduce_spark.data.cells import lists, numbers, vectors
from allreduce_spark.data.columns import read_columns
from allreduce_spark.data.flat import RowError, Values
from allreduce_spark.data.forms import TableForm
from allreduce_spark.errors import AllReduceSparkError, ConfigError, DataError, MissingDependencyError
from allreduce_spark.launch.gpus import choose_gpus, seen_by_cuda
from allreduce_spark.launch.scratch import scratch_folder
from allreduce_spark.spark.stage import assigned_gpus, missing_module

if TYPE_CHECKING:
    from allreduce_spark.training.inference import PartitionMetrics
    from allreduce_spark.training.models.heads import Head
    from allreduce_spark.training.scoring import PackedModel

__all__ = [
    "KerasTask",
    "NewColumn",
    "Transform",
    "add_columns",
    "concatenate",
    "evaluate_blocks",
    "predict_blocks",
    "task_context",
    "value_of",
]


def predict_blocks(
    packed: PackedModel, batch_size: int, blocks: RDD[bytes], resources: ResourceProfile | None = None
) -> list[Any]:
    """The predictions of each partition that has rows, in the order of the partitions."""
    return _collect(blocks.mapPartitions(KerasTask(partial(_predict, packed, batch_size))), resources)


def evaluate_blocks(
    packed: PackedModel, batch_size: int, blocks: RDD[bytes], resources: ResourceProfile | None = None
) -> list[PartitionMetrics]:
    """The metric state of each partition that has rows."""
    return _collect(blocks.mapPartitions(KerasTask(partial(_evaluate, packed, batch_size))), resources)


class KerasTask:
    """The body of a task that uses Keras. It travels packed a second time: whoever unpacks it imports Keras, which has to know
    by then what it is to compute with."""

    def __init__(self, body: Callable[..., Any]) -> None:
        self._body = body

    def __call__(self, *arguments: Any) -> Any:
        return self._body(*arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        from allreduce_spark.training.backends import environment

        return partial, (_run_with_keras, environment(), cloudpickle.dumps(self._body))


def _run_with_keras(environment: dict[str, str], body: bytes, *arguments: Any) -> Any:
    _prepare_keras(environment)
    return cloudpickle.loads(body)(*arguments)


def _predict(packed: PackedModel, batch_size: int, blocks: Iterable[bytes]) -> Iterator[Any]:
    from allreduce_spark.training.inference import predict_rows

    return _only_known_errors(partial(predict_rows, packed, batch_size, blocks))


def _evaluate(packed: PackedModel, batch_size: int, blocks: Iterable[bytes]) -> Iterator[Any]:
    from allreduce_spark.training.inference import evaluate_rows

    return _only_known_errors(partial(evaluate_rows, packed, batch_size, blocks))


def _only_known_errors(function: Callable[[Path], Any]) -> Iterator[Any]:
    """Errors that trying again cannot mend travel as values: Spark would run the task again and wrap the message.

    Args:
        function: Gets a folder on the local disk that Spark uses.
    """
    try:
        with scratch_folder() as folder:
            result = function(folder)
    except AllReduceSparkError as error:
        yield error
    else:
        if result is not None:
            yield result


def _collect(results: RDD[Any], resources: ResourceProfile | None) -> list[Any]:
    try:
        collected = (results if resources is None else results.withResources(resources)).collect()
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


@dataclass(frozen=True)
class Transform:
    """What a task needs to know to add columns to the rows of a DataFrame.

    Attributes:
        token: Stands for the model.
        form: What the feature columns must be.
        heads: What the outputs of the model mean.
        layer: Name of the layer whose output is wanted, or "".
        columns: The columns to add, in their order.
        batch_size: Rows per call of the model.
    """

    token: str
    form: TableForm
    heads: tuple[Head, ...]
    layer: str
    columns: tuple[NewColumn, ...]
    batch_size: int


@dataclass(frozen=True)
class NewColumn:
    """One column that a transformer adds.

    Attributes:
        name: Its name.
        source: "prediction", "probability" or "raw" of a head, or the output of the "layer".
        head: Index of the head; 0 for a layer.
        kind: "number", "vector" or "array".
    """

    name: str
    source: str
    head: int
    kind: str


def add_columns(
    transform: Transform, packed: Callable[[], PackedModel], batches: Iterable[pa.RecordBatch]
) -> Iterator[pa.RecordBatch]:
    """The body of a transformer's task: batch after batch, nothing is held back.

    Args:
        packed: Gets the model; called where it is not in this worker yet.

    Raises:
        DataError: A row is not what the model takes; names the partition, the row and the column.
    """
    from allreduce_spark.training.scoring import scorer_of

    with_outputs = any(column.source != "layer" for column in transform.columns)
    scorer = None
    known: dict[str, Values] = {}
    done = 0
    for batch in batches:
        for start in range(0, batch.num_rows, transform.batch_size):
            piece = batch.slice(start, transform.batch_size)
            try:
                kept, columns = read_columns(piece, transform.form, known)
            except RowError as error:
                place = f"partition {_partition()}, row {done + error.row}"
                raise DataError(f"in {place}, {error}") from None
            done += piece.num_rows
            if kept.num_rows:
                scorer = scorer or scorer_of(transform.token, transform.layer, with_outputs=with_outputs, packed=packed)
                by_form = dict(zip(transform.form.arrays, columns, strict=True))
                arrays = {form.key: by_form[form].array(kept.num_rows) for form in transform.form.x}
                yield _with_columns(kept, transform, *scorer(arrays))


def _with_columns(
    batch: pa.RecordBatch, transform: Transform, outputs: list[np.ndarray], layer: np.ndarray | None
) -> pa.RecordBatch:
    arrays, names = list(batch.columns), list(batch.schema.names)
    for column in transform.columns:
        if column.source == "layer":
            values = layer
        else:
            head = transform.heads[column.head]
            values = getattr(head, column.source)(outputs[column.head])
        arrays.append(_CELLS[column.kind](values))
        names.append(column.name)
    return pa.RecordBatch.from_arrays(arrays, names=names)


_CELLS: dict[str, Callable[[Any], pa.Array]] = {"number": numbers, "vector": vectors, "array": lists}


def value_of(model: Broadcast[PackedModel]) -> PackedModel:
    """A model that was broadcast, in a task."""
    value = model.value
    # Spark would keep the archive in memory beside the model that is made of it; should it be asked for again, it is in a file,
    # unless spark.io.encryption.enabled made it come through a socket.
    if getattr(model, "_path", None) is not None:
        vars(model).pop("_value", None)
    return value


def _prepare_keras(environment: dict[str, str]) -> None:
    """Before it is imported: quiet, and on the cores and the GPU of this task alone. Spark runs many tasks on a machine.

    Tasks that were given no GPU take turns with those of the machine. None of this can be changed once there was a computation:
    a worker that Spark uses again stays with what its first task had.

    Raises:
        ConfigError: The worker has imported Keras before, with another backend.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.update(environment)
    from allreduce_spark.training.backends import KERAS_BACKEND

    keras_backend = environment["KERAS_BACKEND"]
    if keras_backend != KERAS_BACKEND:
        raise ConfigError(
            f"Keras runs on {keras_backend} on the driver, but code of your own has imported it with {KERAS_BACKEND} in a "
            f"Python worker of Spark. Set spark.executorEnv.KERAS_BACKEND={keras_backend} for the application."
        )
    from allreduce_spark.training.cores import use_cores

    with seen_by_cuda(choose_gpus(assigned_gpus(task_context()), _partition())):
        use_cores(task_context().cpus())


def _partition() -> int:
    return task_context().partitionId()


def task_context() -> TaskContext:
    context = TaskContext.get()
    assert context is not None  # for mypy: this runs in a task
    return context
