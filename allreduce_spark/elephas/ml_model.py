"""`ElephasEstimator` and `ElephasTransformer`: Elephas's Spark ML classes, over `SparkModel` and `AllReduceTransformer`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from pyspark.ml import Estimator, Model
from pyspark.ml.param.shared import HasFeaturesCol, HasLabelCol, HasOutputCol
from pyspark.ml.util import DefaultParamsReadable, DefaultParamsWritable
from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from pyspark.sql.types import DoubleType

from allreduce_spark.elephas import files
from allreduce_spark.elephas.ml.adapter import df_to_simple_rdd
from allreduce_spark.elephas.ml.params import (
    HasBatchSize,
    HasCategoricalLabels,
    HasCustomObjects,
    HasEpochs,
    HasFrequency,
    HasInferenceBatchSize,
    HasKerasModelConfig,
    HasKerasOptimizerConfig,
    HasLoss,
    HasMetrics,
    HasMode,
    HasNumberOfClasses,
    HasNumberOfWorkers,
    HasValidationSplit,
    HasVerbosity,
)
from allreduce_spark.elephas.spark_model import SparkModel
from allreduce_spark.elephas.utils.model_utils import LossModelTypeMapper, ModelType
from allreduce_spark.spark.ml.persistence import Persistent, plain_history
from allreduce_spark.spark.ml.transformer import AllReduceTransformer
from allreduce_spark.training.models.architecture import compile_model, model_from_json, settings_of

if TYPE_CHECKING:
    import keras

__all__ = ["ElephasEstimator", "ElephasTransformer", "load_ml_estimator", "load_ml_transformer"]


class ElephasEstimator(
    Estimator["ElephasTransformer"],
    HasCategoricalLabels,
    HasValidationSplit,
    HasKerasModelConfig,
    HasFeaturesCol,
    HasLabelCol,
    HasMode,
    HasEpochs,
    HasBatchSize,
    HasFrequency,
    HasVerbosity,
    HasNumberOfClasses,
    HasNumberOfWorkers,
    HasOutputCol,
    HasLoss,
    HasMetrics,
    HasKerasOptimizerConfig,
    HasCustomObjects,
    DefaultParamsReadable["ElephasEstimator"],
    DefaultParamsWritable,
):
    """Trains a Keras model on a DataFrame with a column of vectors and a column of labels.

    Args:
        model: A compiled Keras model, in the place of `keras_model_config`, `loss`, `metrics` and `optimizer_config`. As with
            these, each fit starts from new weights.
        **kwargs: Any of the params by name; `nb_epoch` is `epochs`.

    Raises:
        TypeError: There is no param of this name.
    """

    def __init__(self, model: keras.Model | None = None, **kwargs: Any) -> None:
        super().__init__()
        self._setDefault(outputCol="prediction")
        self.set_params(**({} if model is None else settings_of(model)), **kwargs)

    def set_params(self, **kwargs: Any) -> ElephasEstimator:
        """Set params by name."""
        _set_by_name(self, {"epochs" if name == "nb_epoch" else name: value for name, value in kwargs.items()})
        return self

    def get_config(self) -> dict[str, Any]:
        """All params by name, but for custom objects: what `save` writes."""
        names = (param.name for param in self.params if param.name != "custom_objects")
        return {name: self.getOrDefault(name) if self.isDefined(name) else None for name in names}

    def get_model(self) -> keras.Model:
        """A new model as `keras_model_config` describes it, not compiled."""
        return model_from_json(self.getOrDefault("keras_model_config"), self.getOrDefault("custom_objects"))

    def save(self, file_name: str) -> None:
        """Write all params but the custom objects to an HDF5 file; what is there is replaced.

        A Pipeline with this stage saves it as Spark saves any stage, with `write()`.

        Raises:
            ConfigError: A param is no JSON value, or the file cannot be written.
        """
        files.write_config(file_name, type(self).__name__, self.get_config())

    def _fit(self, dataset: DataFrame) -> ElephasTransformer:
        value, loss, custom_objects = self.getOrDefault, self.getOrDefault("loss"), self.getOrDefault("custom_objects")
        model = self.get_model()
        compile_model(model, value("optimizer_config"), loss, value("metrics"), custom_objects)
        spark_model = SparkModel(
            model,
            mode=value("mode"),
            frequency=value("frequency"),
            num_workers=value("num_workers"),
            custom_objects=custom_objects,
        )
        rdd = df_to_simple_rdd(
            dataset, value("categorical"), value("nb_classes"), value("featuresCol"), value("labelCol")
        )
        settings = {name: value(name) for name in ("epochs", "batch_size", "verbose", "validation_split")}
        spark_model.fit(rdd, **settings)
        return ElephasTransformer(
            labelCol=value("labelCol"),
            outputCol=value("outputCol"),
            featuresCol=value("featuresCol"),
            keras_model_config=model.to_json(),
            weights=model.get_weights(),
            custom_objects=custom_objects,
            model_type=LossModelTypeMapper().get_model_type(loss),
            history=spark_model.training_histories,
        )

    def setFeaturesCol(self, value: str) -> ElephasEstimator:
        """Deprecated: give `featuresCol` to the constructor."""
        return self._set_deprecated("featuresCol", value)

    def setLabelCol(self, value: str) -> ElephasEstimator:
        """Deprecated: give `labelCol` to the constructor."""
        return self._set_deprecated("labelCol", value)

    def setOutputCol(self, value: str) -> ElephasEstimator:
        """Deprecated: give `outputCol` to the constructor."""
        return self._set_deprecated("outputCol", value)

    def _set_deprecated(self, name: str, value: str) -> ElephasEstimator:
        warnings.warn(
            f"set{name[0].upper()}{name[1:]} is deprecated: pass {name} to ElephasEstimator, or to set_params.",
            DeprecationWarning,
            stacklevel=3,
        )
        return self.set_params(**{name: value})


class ElephasTransformer(
    Model,
    HasKerasModelConfig,
    HasLabelCol,
    HasOutputCol,
    HasFeaturesCol,
    HasCustomObjects,
    HasInferenceBatchSize,
    Persistent,
):
    """Adds the predictions of a Keras model to the rows of a DataFrame, as the column `outputCol`.

    For a regression the column is a double, otherwise an array of doubles: the outputs of the model as they are.

    Args:
        weights: Of the model.
        model_type: Of the model.
        history: One dict per fit, of the metrics after each epoch.
        **kwargs: Any of the params by name.
    """

    def __init__(
        self,
        *,
        weights: Any = (),
        model_type: ModelType | None = None,
        history: Any = (),
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self._setDefault(outputCol="prediction")
        self.weights, self.model_type = [np.asarray(weight) for weight in weights], model_type
        self._history = list(history)
        self._adder: AllReduceTransformer | None = None  # keeps what it has sent to the executors
        self._adder_of: list[np.ndarray] | None = None
        self.set_params(**kwargs)

    @property
    def history(self) -> list[dict[str, Any]]:
        """One dict per fit, of the metrics after each epoch."""
        return self._history

    def set_params(self, **kwargs: Any) -> ElephasTransformer:
        """Set params by name."""
        self._set_known(kwargs)
        self._adder = None
        return self

    def _set_known(self, params: Mapping[str, Any]) -> None:
        _set_by_name(self, params)

    def get_config(self) -> dict[str, Any]:
        """The params, the weights as nested lists, and the type of the model."""
        return {**self._config(), "weights": [weight.tolist() for weight in self.weights]}

    def _config(self) -> dict[str, Any]:
        names = ("keras_model_config", "labelCol", "featuresCol", "outputCol")
        return {**{name: self.getOrDefault(name) for name in names}, "model_type": self.model_type}

    def get_model(self) -> keras.Model:
        """The model with its weights, not compiled."""
        model = model_from_json(self.getOrDefault("keras_model_config"), self.getOrDefault("custom_objects"))
        model.set_weights(self.weights)
        return model

    def save(self, file_name: str) -> None:
        """Write the params and the weights to an HDF5 file; what is there is replaced.

        A PipelineModel with this stage saves it as it saves any stage, with `write()`.

        Raises:
            ConfigError: The file cannot be written.
        """
        config = {**self._config(), "history": [plain_history(history) for history in self.history]}
        files.write_config(file_name, type(self).__name__, config, self.weights)

    def write(self) -> Any:
        """The writer for Spark's pipelines; custom objects are not written."""
        stage = self.copy()
        stage.clear(stage.custom_objects)
        return Persistent.write(stage)

    _saved_model = get_model

    def _saved_about(self) -> dict[str, Any]:
        history = [plain_history(history) for history in self.history]
        return {"history": history, "modelType": self.model_type.name if self.model_type else None}

    def _restore(self, model: keras.Model, about: dict[str, Any]) -> None:
        self.weights, self._history = model.get_weights(), about["history"]
        self.model_type = ModelType[about["modelType"]] if about["modelType"] else None

    def _transform(self, dataset: DataFrame) -> DataFrame:
        if self._adder is None or self._adder_of is not self.weights:
            self._adder_of = self.weights
            self._adder = AllReduceTransformer(self.get_model(), task="regression", outputType="array")
        output, size = self.getOrDefault("outputCol"), self.getOrDefault("inference_batch_size")
        self._adder.setParams(
            featuresCol=self.getOrDefault("featuresCol"), predictionCol=output, predictionBatchSize=size or None
        )
        result = self._adder.transform(dataset)
        if self.model_type is not ModelType.REGRESSION and isinstance(result.schema[output].dataType, DoubleType):
            return result.withColumn(output, F.array(f"`{output}`"))
        return result


def load_ml_estimator(file_name: str, custom_objects: Mapping[str, Any] | None = None) -> ElephasEstimator:
    """Load what `ElephasEstimator.save` wrote, here or in Elephas.

    Raises:
        ConfigError: There is no such file, or it holds something else.
    """
    config = files.read_config(file_name, ElephasEstimator.__name__)
    given = {name: value for name, value in config.items() if value is not None}
    return ElephasEstimator(**given, custom_objects=dict(custom_objects or {}))


def load_ml_transformer(file_name: str, custom_objects: Mapping[str, Any] | None = None) -> ElephasTransformer:
    """Load what `ElephasTransformer.save` wrote, here or in Elephas.

    Raises:
        ConfigError: There is no such file, or it holds something else.
    """
    config = files.read_config(file_name, ElephasTransformer.__name__)
    return ElephasTransformer(**config, custom_objects=dict(custom_objects or {}))


def _set_by_name(stage: Any, params: Mapping[str, Any]) -> None:
    unknown = [name for name in params if not stage.hasParam(name)]
    if unknown:
        known = sorted(param.name for param in stage.params)
        raise TypeError(f"{type(stage).__name__} has no param {unknown[0]!r}; it has {known}.")
    stage._set(**params)
