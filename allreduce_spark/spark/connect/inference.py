"""predict and evaluate behind a Connect session: every partition by itself; what it found comes back as blocks and arrays."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession

from allreduce_spark.data.arrays import arrays_to_blocks
from allreduce_spark.data.blocks import Block, decode_block
from allreduce_spark.data.forms import TableForm
from allreduce_spark.data.spec import unflatten
from allreduce_spark.data.tables import table_to_blocks
from allreduce_spark.data.values import to_numpy
from allreduce_spark.errors import AllReduceSparkError, DataError
from allreduce_spark.launch.scratch import scratch_folder
from allreduce_spark.spark.connect.session import Profile
from allreduce_spark.spark.connect.shards import frame_of_blocks
from allreduce_spark.spark.connect.transfer import SCHEMA, answers_of, error_pieces, pieces_of, read_files, send_files
from allreduce_spark.spark.inference import KerasTask, task_context
from allreduce_spark.spark.shards import Columns, check_is_rows, map_batches, select_columns

if TYPE_CHECKING:
    from allreduce_spark.training.inference import PartitionMetrics
    from allreduce_spark.training.scoring import PackedModel

__all__ = ["evaluate_rows_of", "predict_rows_of", "read_model", "send_model"]

PREDICTIONS, STATE, INITIAL, EXAMPLE = "predictions", "state", "initial", "example"


def predict_rows_of(
    session: SparkSession,
    packed: PackedModel,
    batch_size: int,
    data: Any,
    columns: Columns,
    profile: Profile | None = None,
) -> list[Any]:
    """The predictions for all rows, piece by piece, in the order of the rows.

    Args:
        profile: What each task asks for; None for what the application's settings say.

    Raises:
        DataError: There are no rows, or they do not fit the model.
    """
    answers = _answers(session, data, columns, partial(_predict, batch_size), packed, profile)
    return _not_empty([_structure(_block(piece)) for _, piece in answers])


def evaluate_rows_of(
    session: SparkSession,
    packed: PackedModel,
    batch_size: int,
    data: Any,
    columns: Columns,
    profile: Profile | None = None,
) -> list[PartitionMetrics]:
    """The metric state of each partition that has rows.

    Args:
        profile: As for `predict_rows_of`.

    Raises:
        DataError: As in `predict_rows_of`.
    """
    from allreduce_spark.training.inference import PartitionMetrics

    answers = _answers(session, data, columns, partial(_evaluate, batch_size), packed, profile)
    parts = []
    for _, piece in answers:
        with np.load(io.BytesIO(piece), allow_pickle=False) as arrays:
            lists = [[arrays[name] for name in arrays if name.startswith(kind)] for kind in (STATE, INITIAL)]
        _, example = next(answers)
        # Whatever row it is: it only tells Keras what there is to measure.
        parts.append(PartitionMetrics(lists[0], lists[1], _block(example).spec.zeros(1)))
    return _not_empty(parts)


def send_model(session: SparkSession, packed: PackedModel) -> str:
    """Bring a model to the executors; `read_model` gets it there."""
    return send_files(session, dataclasses.asdict(packed))


def read_model(sent: str) -> PackedModel:
    """What `send_model` has sent, in a task."""
    from allreduce_spark.training.scoring import PackedModel

    return PackedModel(**read_files(sent))


Work = Callable[["PackedModel", Iterable[bytes]], Iterator[pa.RecordBatch]]


def _answers(
    session: SparkSession, data: Any, columns: Columns, work: Work, packed: PackedModel, profile: Profile | None
) -> Iterator[tuple[str, bytes]]:
    """What `work` answers for each partition of the data."""
    task = KerasTask(partial(_work, work, send_model(session, packed)))
    if isinstance(data, DataFrame):
        form = columns.form
        return answers_of(
            map_batches(select_columns(data, form), partial(_of_table, task, form), SCHEMA, profile=profile)
        )
    blocks = frame_of_blocks(session, arrays_to_blocks(*check_is_rows(data), role="train", num_shards=1))
    return answers_of(blocks.mapInArrow(partial(_of_blocks, task), SCHEMA, profile=profile))  # type: ignore[arg-type]  # as in `run_stage`


def _of_table(
    task: Callable[[Iterable[bytes]], Iterator[pa.RecordBatch]], form: TableForm, batches: Iterable[pa.RecordBatch]
) -> Iterator[pa.RecordBatch]:
    blocks = table_to_blocks(batches, form, partition=task_context().partitionId(), role="train", num_shards=1)
    return task(block for _, block in blocks)


def _of_blocks(
    task: Callable[[Iterable[bytes]], Iterator[pa.RecordBatch]], batches: Iterable[pa.RecordBatch]
) -> Iterator[pa.RecordBatch]:
    return task(block.as_buffer() for batch in batches for block in batch.column("block"))


def _work(work: Work, sent: str, blocks: Iterable[bytes]) -> Iterator[pa.RecordBatch]:
    try:
        yield from work(read_model(sent), blocks)
    except AllReduceSparkError as error:
        yield from error_pieces(error)


def _predict(batch_size: int, packed: PackedModel, blocks: Iterable[bytes]) -> Iterator[pa.RecordBatch]:
    from allreduce_spark.training.inference import predict_rows

    with scratch_folder() as folder:
        outputs = predict_rows(packed, batch_size, blocks, folder)
    if outputs is not None:
        for _, block in arrays_to_blocks(_plain(outputs), role="train", num_shards=1):
            yield from pieces_of(PREDICTIONS, block)


def _plain(outputs: Any) -> Any:
    """The same with float32 for bfloat16, which is no dtype of numpy's own."""
    if isinstance(outputs, dict):
        return {name: _plain(output) for name, output in outputs.items()}
    if isinstance(outputs, (list, tuple)):
        return type(outputs)(map(_plain, outputs))
    return outputs.astype("float32") if outputs.dtype.name == "bfloat16" else outputs


def _evaluate(batch_size: int, packed: PackedModel, blocks: Iterable[bytes]) -> Iterator[pa.RecordBatch]:
    from allreduce_spark.training.inference import evaluate_rows

    with scratch_folder() as folder:
        metrics = evaluate_rows(packed, batch_size, blocks, folder)
    if metrics is not None:
        arrays = io.BytesIO()
        named = {f"{STATE}-{i}": array for i, array in enumerate(metrics.state)}
        named |= {f"{INITIAL}-{i}": array for i, array in enumerate(metrics.initial)}
        np.savez(arrays, allow_pickle=False, **named)
        yield from pieces_of(STATE, arrays.getvalue())
        (block,) = [block for _, block in arrays_to_blocks(*metrics.example, role="train", num_shards=1)]
        yield from pieces_of(EXAMPLE, block)


def _block(piece: bytes) -> Block:
    block = decode_block(piece)
    assert isinstance(block, Block)  # errors are answers of another name
    return block


def _structure(block: Block) -> Any:
    """The predictions of one block, in the structure of the model's outputs."""
    arrays = (to_numpy(column, leaf) for column, leaf in zip(block.batch.columns, block.spec.leaves, strict=True))
    return unflatten(block.spec.x, arrays)


def _not_empty(parts: list[Any]) -> list[Any]:
    if not parts:
        raise DataError("the data has no rows")
    return parts
