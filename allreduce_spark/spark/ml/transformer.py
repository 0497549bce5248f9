"""`AllReduceTransformer`: a Keras model as a Spark ML transformer."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from pyspark.ml import Model
from pyspark.ml.linalg import VectorUDT
from pyspark.sql import DataFrame
from pyspark.sql.types import ArrayType, DataType, DoubleType, StructField, StructType

from allreduce_spark.data.forms import TableForm
from allreduce_spark.errors import ConfigError, DataError
from allreduce_spark.spark.engine import Engine, engine_for
from allreduce_spark.spark.inference import KerasTask, NewColumn, Transform, add_columns
from allreduce_spark.spark.ml.params import ColumnParams, accessors
from allreduce_spark.spark.ml.persistence import Persistent, plain_history
from allreduce_spark.spark.shards import check_is_frame, map_batches, scalar_columns, select_columns
from allreduce_spark.training.models.heads import Head, heads_of
from allreduce_spark.training.models.layout import check_is_model, feature_forms, layer_of
from allreduce_spark.training.scoring import PackedModel, pack, state_of
from allreduce_spark.training.settings import KerasSettings

if TYPE_CHECKING:
    import keras

__all__ = ["AllReduceTransformer"]


@accessors
class AllReduceTransformer(Model, ColumnParams, Persistent):
    """Adds the predictions of a Keras model to the rows of a DataFrame.

    The rows stay where they are and in their order, all their columns stay as they are, and the model is loaded once per
    Python worker. It works on a streaming DataFrame too.

    For a classification (see the param `task`), `probabilityCol` becomes a vector of the probabilities of all classes and
    `predictionCol` the most probable class, as a double; with `rawPredictionCol`, all of Spark's evaluators understand it.
    For a regression there is no probability, and `predictionCol` is the value. Values that are not one number become a
    vector or an array, as `outputType` says. Of a model with several outputs, each has columns of its own, `predictionCol +
    "_" + name`. With `outputLayer`, the output of any layer becomes the column `outputCol`, from the same pass.

    Args:
        model: Built; it need not be compiled.
        history: Of the fit that trained it: {"loss": [...], ...}.
        params: Any of the params by name; `explainParams()` describes them.

    Attributes:
        model: The Keras model.
        history: As given; empty where there was no fit.

    Raises:
        ConfigError: A param is unknown or has a wrong value.

    Example:
        >>> transformer = AllReduceTransformer(model, featuresCol="pixels")    # doctest: +SKIP
        >>> transformer.transform(frame).select("prediction").show()           # doctest: +SKIP
    """

    __module__ = "allreduce_spark"  # saved pipelines name their classes so, and outlive the place of this file

    def __init__(
        self, model: keras.Model | None = None, *, history: dict[str, list[Any]] | None = None, **params: Any
    ) -> None:
        super().__init__()
        self._set_column_defaults()
        self.model = model if model is None else check_is_model(model)
        self.history = dict(history or {})
        self._sent = _Sent()
        self._set_known(params)

    def _transform(self, dataset: DataFrame) -> DataFrame:
        check_is_frame(dataset)
        model = self._built_model()
        heads = heads_of(model, self.getOrDefault(self.task)) if self._wants_outputs() else ()
        features = feature_forms(model, self._features(), scalar_columns(dataset))
        form = TableForm(features, invalid=self.getOrDefault(self.handleInvalid))
        select_columns(dataset, form)
        columns = self._new_columns(model, heads)
        _check_new_columns(dataset.columns, [column.name for column, _ in columns])
        token, packed = self._sent.model(engine_for(dataset), model)
        transform = Transform(
            token,
            form,
            heads,
            self.getOrDefault(self.outputLayer),
            tuple(column for column, _ in columns),
            self.getOrDefault(self.predictionBatchSize),
        )
        schema = StructType([*dataset.schema.fields, *(StructField(column.name, kind) for column, kind in columns)])
        return map_batches(dataset, KerasTask(partial(add_columns, transform, packed)), schema)

    def _built_model(self) -> keras.Model:
        if self.model is None or not self.model.built:
            raise ConfigError("the transformer has no model with weights: pass one that is fitted, or built.")
        return self.model

    def _saved_model(self) -> keras.Model:
        return self._built_model()

    def _saved_about(self) -> dict[str, Any]:
        return {"history": plain_history(self.history)}

    def _restore(self, model: keras.Model, about: dict[str, Any]) -> None:
        self.model, self.history = model, about["history"]

    def _wants_outputs(self) -> bool:
        return any(self.getOrDefault(p) for p in (self.predictionCol, self.probabilityCol, self.rawPredictionCol))

    def _new_columns(self, model: keras.Model, heads: Sequence[Head]) -> list[tuple[NewColumn, DataType]]:
        """The columns to add, with their types."""
        kind = self.getOrDefault(self.outputType)
        columns = []
        for index, head in enumerate(heads):
            suffix = f"_{head.name}" if len(heads) > 1 else ""
            prediction = self.getOrDefault(self.predictionCol)
            for source, param in (("raw", self.rawPredictionCol), ("probability", self.probabilityCol)):
                name = self.getOrDefault(param)
                if name and head.is_class:
                    axes = 1 if head.kind == "unit" else len(head.shape)
                    columns.append(_column(name + suffix, source, index, kind, axes))
            if prediction:
                axes = 0 if head.is_number else len(head.shape) - (head.kind == "classes")
                columns.append(_column(prediction + suffix, "prediction", index, kind, axes))
        layer = self.getOrDefault(self.outputLayer)
        if layer:
            axes = len(layer_of(model, layer).shape) - 1
            columns.append(_column(self.getOrDefault(self.outputCol), "layer", 0, kind, axes))
        if not columns:
            raise ConfigError(
                "nothing is to be added: predictionCol, probabilityCol, rawPredictionCol and outputLayer are all empty, or the "
                "model makes no probabilities; name at least one."
            )
        return columns


class _Sent:
    """The model as it was last sent to the executors; shared by the copies of a transformer, which Spark makes freely."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._key: tuple[Any, ...] | None = None
        self._token = ""
        self._packed: Callable[[], PackedModel] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _Sent, ()  # a deep copy of a transformer, or a pickled one, sends its model anew

    def model(self, engine: Engine, model: keras.Model) -> tuple[str, Callable[[], PackedModel]]:
        """(token, what gets it in a task); sent again where weights, settings or Spark application are others."""
        with self._lock:
            key = (engine.application, id(model), state_of(model), KerasSettings.of(model))
            if self._packed is None or key != self._key:
                # The old one is left to Spark's cleaner: a DataFrame that was made with it may still be used.
                self._key, self._token = key, secrets.token_hex(16)
                self._packed = engine.send_model(pack(model))
            return self._token, self._packed


def _column(name: str, source: str, head: int, kind: str, axes: int) -> tuple[NewColumn, DataType]:
    if axes == 0:
        return NewColumn(name, source, head, "number"), DoubleType()
    if kind == "vector":
        return NewColumn(name, source, head, kind), VectorUDT()
    nested: DataType = DoubleType()
    for _ in range(axes):
        nested = ArrayType(nested)
    return NewColumn(name, source, head, kind), nested


def _check_new_columns(existing: Sequence[str], names: Sequence[str]) -> None:
    if not all(names):
        raise ConfigError("outputLayer is set, but outputCol is empty: name the column.")
    for name in names:
        if name in existing or names.count(name) > 1:
            where = "the DataFrame already has" if name in existing else "two outputs would make"
            raise ConfigError(f"{where} a column {name!r}: choose another name for it in the params, or drop it first.")
    twice = next((name for name in existing if list(existing).count(name) > 1), None)
    if twice is not None:
        raise DataError(f"the DataFrame has several columns {twice!r}: rename or drop one of them first.")
