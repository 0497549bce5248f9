"""predict and evaluate for the rows of one partition, alone: no other rank takes part."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cloudpickle
import keras
import numpy as np

from allreduce_spark.data.blocks import decode_block
from allreduce_spark.data.shard import Shard
from allreduce_spark.data.spool import ShardWriter
from allreduce_spark.training.batches import BatchPlan, ShardBatches
from allreduce_spark.training.checks import check_inputs, check_labels
from allreduce_spark.training.metrics import combine_states, metric_variables, value_of
from allreduce_spark.training.models.model_bytes import model_from_bytes
from allreduce_spark.training.scoring import PackedModel, load_uncompiled

__all__ = ["PartitionMetrics", "evaluate_rows", "predict_rows", "result_of"]


@dataclass(frozen=True)
class PartitionMetrics:
    """The metric state after the rows of one partition.

    Attributes:
        state, initial: Values of `metrics.metric_variables`, after the rows and before the first.
        example: One row as a batch, for whoever has to build the metrics to read the results.
    """

    state: list[np.ndarray]
    initial: list[np.ndarray]
    example: tuple[Any, ...]


def predict_rows(packed: PackedModel, batch_size: int, blocks: Iterable[bytes], folder: Path) -> Any:
    """The model's predictions for the rows, in their order: arrays of shape (rows, ...) in the structure of its outputs.

    None where there is no row.

    Args:
        folder: For the rows, which may be more than memory holds. Nothing stays in it.

    Raises:
        DataError: A row is not fit for the model.
    """
    batches = _batches(blocks, batch_size, folder)
    if batches is None:
        return None
    with packed.keras_settings.in_force():
        model = _model(packed, compiled=False)
        check_inputs(model, batches.spec)
        return model.predict(batches.dataset(), verbose=0)


def evaluate_rows(
    packed: PackedModel, batch_size: int, blocks: Iterable[bytes], folder: Path
) -> PartitionMetrics | None:
    """The metric state that the rows lead to; None where there is no row.

    Args:
        folder: As for `predict_rows`.

    Raises:
        DataError: A row is not fit for the model.
    """
    batches = _batches(blocks, batch_size, folder)
    if batches is None:
        return None
    with packed.keras_settings.in_force():
        model = _model(packed, compiled=True)
        check_labels(model, batches.spec)
        check_inputs(model, batches.spec)
        model.evaluate(batches.dataset(), verbose=0)
        state = [value_of(variable) for variable in metric_variables(model)]
        model.reset_metrics()
        initial = [value_of(variable) for variable in metric_variables(model)]
        return PartitionMetrics(state, initial, keras.tree.map_structure(_first, batches[0]))


def _first(array: np.ndarray | None) -> np.ndarray | None:
    return None if array is None else array[:1]


def result_of(model: keras.Model, parts: list[PartitionMetrics]) -> dict[str, Any]:
    """The metrics, the loss first, over the rows of all partitions. Uses, and then resets, the metrics of `model`.

    A metric that gives one number per class, such as F1Score, is an array.
    """
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(parts[0].example)
    # A function of its own: one that Keras has traced for labels of two shapes, (rows,) and (rows, 1), takes neither any more.
    before, model.test_function = model.test_function, None
    model.evaluate(x, y, sample_weight=sample_weight, verbose=0)  # builds the metrics
    model.test_function = before
    variables = metric_variables(model)
    combined = combine_states(variables, parts[0].initial, [part.state for part in parts])
    for variable, value in zip(variables, combined, strict=True):
        variable.assign(value)
    values = {name: np.asarray(value) for name, value in model.get_metrics_result().items()}
    result = {name: value if value.ndim else float(value) for name, value in values.items()}
    model.reset_metrics()
    return result


def _batches(blocks: Iterable[bytes], batch_size: int, folder: Path) -> ShardBatches | None:
    """Spool the rows, and cut them into batches. The file has no name any more when this returns: it ends with its mapping."""
    path = folder / "rows.arrow"
    with ShardWriter(path) as writer:
        for block in blocks:
            writer.write(decode_block(block))
    shard = Shard.open(path)
    path.unlink()
    return ShardBatches({0: shard}, BatchPlan((writer.rows,), batch_size, world_size=1)) if writer.rows else None


_last: tuple[tuple[bytes, bool], keras.Model] | None = None


def _model(packed: PackedModel, *, compiled: bool) -> keras.Model:
    """Load the model, once for all partitions that one Python worker works on."""
    global _last
    # A function of one name may have been written anew.
    key = (hashlib.sha256(packed.archive + packed.objects + packed.settings).digest(), compiled)
    if _last is None or _last[0] != key:
        if compiled:
            _last = (key, model_from_bytes(packed.archive, cloudpickle.loads(packed.objects)))
        else:
            _last = (key, load_uncompiled(packed))
    return _last[1]
