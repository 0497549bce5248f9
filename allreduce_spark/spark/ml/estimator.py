"""`AllReduceEstimator`: distributed training of a Keras model as a Spark ML estimator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pyspark.ml import Estimator
from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from pyspark.sql.types import BooleanType

from allreduce_spark.data.forms import ArrayForm, TableForm
from allreduce_spark.errors import ConfigError, DataError
from allreduce_spark.spark.ml.fit_params import FitParams
from allreduce_spark.spark.ml.params import accessors
from allreduce_spark.spark.ml.persistence import Persistent
from allreduce_spark.spark.ml.transformer import AllReduceTransformer
from allreduce_spark.spark.model import SparkModel
from allreduce_spark.spark.shards import FormedTable, check_is_frame, column_of, scalar_columns
from allreduce_spark.training.checks import check_callbacks, check_model
from allreduce_spark.training.models.copies import copy_model, set_learning_rate
from allreduce_spark.training.models.heads import heads_of, label_forms
from allreduce_spark.training.models.layout import check_is_model, feature_forms, outputs_of

if TYPE_CHECKING:
    import keras

__all__ = ["AllReduceEstimator"]


@accessors
class AllReduceEstimator(Estimator[AllReduceTransformer], FitParams, Persistent):
    """Trains a Keras model on the rows of a DataFrame, as `SparkModel` does, and returns a transformer.

    `fit` trains a copy: the model of the estimator stays as it is, and several fits at once, as `CrossValidator` with
    `parallelism` makes them, do not meet. All params may vary in a parameter grid, the model among them.

    The columns must be what the model takes, and labels what its loss takes; a row that is not ends the fit before a rank
    starts. Values that come in one line get the shape of the model's input, numeric columns are put together into one
    vector, and class indices become one-hot vectors for `categorical_crossentropy`.

    A fit survives what `SparkModel.fit` survives. With `checkpointPath` and `resume="auto"`, one whose driver was lost goes on.

    Args:
        model: Compiled.
        params: Any of the params by name; `explainParams()` describes them.

    Raises:
        ConfigError: A param is unknown or has a wrong value.

    Example:
        >>> estimator = AllReduceEstimator(model=model, labelCol="digit", epochs=5, numRanks=2)    # doctest: +SKIP
        >>> transformer = estimator.fit(train)                                                     # doctest: +SKIP
        >>> transformer.history["loss"]                                                            # doctest: +SKIP
        [0.31, 0.12, 0.08, 0.05, 0.04]
        >>> transformer.transform(test).select("prediction", "probability")                        # doctest: +SKIP
    """

    __module__ = "allreduce_spark"  # saved pipelines name their classes so, and outlive the place of this file

    def __init__(self, *, model: keras.Model | None = None, **params: Any) -> None:
        super().__init__()
        self._set_fit_defaults()
        self._set_known({"model": model, **params})

    def _fit(self, dataset: DataFrame) -> AllReduceTransformer:
        check_is_frame(dataset)
        if dataset.isStreaming:
            raise DataError(
                "a streaming DataFrame has no end to train up to: train on batches of it, with writeStream.foreachBatch, or on "
                "a table; the transformer takes streams."
            )
        model = self._fresh_model()
        form = self._form(model, dataset)
        train, validation = self._divided(dataset, form)
        spark_model = SparkModel(
            model,
            self.getOrDefault(self.numRanks) or None,
            sync_every=self.getOrDefault(self.syncEvery),
            backend=self.getOrDefault(self.backend),
            resources=self._if_set("resources"),
            ranks_per_gpu=self.getOrDefault(self.ranksPerGpu),
            custom_objects=self.getOrDefault(self.customObjects),
        )
        history = spark_model.fit(
            train,
            epochs=self.getOrDefault(self.epochs),
            batch_size=self.getOrDefault(self.batchSize),
            verbose=self.getOrDefault(self.verbose),
            callbacks=check_callbacks(self.getOrDefault(self.callbacks)),
            validation_split=self.getOrDefault(self.validationSplit),
            validation_data=validation,
            shuffle=self.getOrDefault(self.shuffle),
            class_weight=self._if_set("classWeight"),
            seed=self._if_set("seed"),
            checkpoint=self._checkpoint(),
            resume=self.getOrDefault(self.resume),
            max_restarts=self.getOrDefault(self.maxRestarts),
            min_ranks=self._if_set("minRanks"),
        )
        return self._transformer(model, history.history)

    def _transformer(self, model: keras.Model, history: dict[str, list[Any]]) -> AllReduceTransformer:
        transformer = AllReduceTransformer(model, history=history)
        transformer._resetUid(self.uid)
        return self._copyValues(transformer)

    def _fresh_model(self) -> keras.Model:
        """A copy of the model to train, with the learning rate that is asked for."""
        model = self._if_set("model")
        if model is None:
            raise ConfigError("the estimator has no model: set the param `model` to a compiled Keras model.")
        copied = copy_model(check_model(check_is_model(model)), self.getOrDefault(self.customObjects))
        rate = self._if_set("learningRate")
        if rate is not None:
            set_learning_rate(copied, rate)
        return copied

    def _saved_model(self) -> keras.Model:
        model = self._if_set("model")
        if model is None:
            raise ConfigError("the estimator has no model to save: set the param `model` first.")
        return check_is_model(model)

    def _restore(self, model: keras.Model, about: dict[str, Any]) -> None:
        self._set(model=model)

    def _form(self, model: keras.Model, dataset: DataFrame) -> TableForm:
        scalar = scalar_columns(dataset)
        weight = self.getOrDefault(self.weightCol)
        limits = (0.0, float("inf"))
        return TableForm(
            feature_forms(model, self._features(), scalar),
            self._label_forms(model, scalar),
            ArrayForm(weight, (weight,), (), limits=limits, owner="the loss") if weight else None,
            self.getOrDefault(self.handleInvalid),
        )

    def _label_forms(self, model: keras.Model, scalar: frozenset[str]) -> tuple[ArrayForm, ...]:
        columns = self._labels()
        if outputs_of(model) is None:  # before its first batch; then what is wrong shows in the ranks
            return tuple(ArrayForm(name, (name,)) for name in columns)
        return label_forms(heads_of(model, self.getOrDefault(self.task)), columns, scalar)

    def _divided(self, dataset: DataFrame, form: TableForm) -> tuple[FormedTable, FormedTable | None]:
        """(rows to train on, rows to validate on)."""
        indicator = self.getOrDefault(self.validationIndicatorCol)
        if not indicator:
            return FormedTable(dataset, form), None
        if self.getOrDefault(self.validationSplit):
            raise ConfigError("validationSplit and validationIndicatorCol are both set: use one of them.")
        if indicator not in dataset.columns:
            raise DataError(f"the DataFrame has no column {indicator!r}; its columns are {dataset.columns}")
        if not isinstance(dataset.schema[indicator].dataType, BooleanType):
            kind = dataset.schema[indicator].dataType.simpleString()
            raise DataError(f"column {indicator!r} tells which rows to validate on and must be boolean, not {kind}")
        chosen = F.coalesce(column_of(dataset, indicator), F.lit(False))
        return FormedTable(dataset.filter(~chosen), form), FormedTable(dataset.filter(chosen), form)
