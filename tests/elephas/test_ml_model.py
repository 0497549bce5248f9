"""ElephasEstimator and ElephasTransformer: their params and accessors, and a fit in a pipeline."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from pyspark.ml import Pipeline
from pyspark.ml.feature import StandardScaler
from pyspark.ml.linalg import Vectors
from pyspark.sql import SparkSession
from pyspark.sql.types import ArrayType, DoubleType

from allreduce_spark.elephas.ml_model import ElephasEstimator, ElephasTransformer
from allreduce_spark.elephas.optimizers import Adam
from allreduce_spark.elephas.utils.model_utils import LossModelTypeMapper, ModelType
from allreduce_spark.errors import ConfigError

# Name of the param, what its accessors are called, its default, another value.
PARAMS = [
    ("keras_model_config", "keras_model_config", None, "{}"),
    ("mode", "mode", "asynchronous", "hogwild"),
    ("frequency", "frequency", "epoch", "batch"),
    ("nb_classes", "nb_classes", 10, 2),
    ("categorical", "categorical_labels", True, False),
    ("epochs", "epochs", 10, 3),
    ("epochs", "nb_epoch", 10, 3),
    ("batch_size", "batch_size", 32, 64),
    ("verbose", "verbosity", 0, 1),
    ("validation_split", "validation_split", 0.1, 0.2),
    ("num_workers", "num_workers", 8, 2),
    ("optimizer_config", "optimizer_config", None, {"name": "SGD"}),
    ("metrics", "metrics", ["acc"], ["mae"]),
    ("loss", "loss", None, "mse"),
    ("custom_objects", "custom_objects", {}, {"a": len}),
]


def regression_model() -> keras.Model:
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.1), "mse", metrics=["mae"])
    return model


@pytest.mark.parametrize(("name", "stem", "default", "other"), PARAMS)
@pytest.mark.usefixtures("spark")
def test_every_param_has_the_name_the_default_and_the_accessors_of_elephas(
    name: str, stem: str, default: Any, other: Any
) -> None:
    estimator = ElephasEstimator()
    get, set_ = getattr(estimator, f"get_{stem}"), getattr(estimator, f"set_{stem}")
    if name in ("keras_model_config", "loss"):
        with pytest.raises(KeyError):
            get()
    else:
        assert get() == default
    assert set_(other) is estimator
    assert get() == estimator.getOrDefault(name) == other
    assert getattr(ElephasEstimator(**{name: other}), f"get_{stem}")() == other


@pytest.mark.usefixtures("spark")
def test_older_spellings_are_understood() -> None:
    assert ElephasEstimator(nb_epoch=3).get_epochs() == 3
    estimator = ElephasEstimator(regression_model(), epochs=2)
    assert (estimator.get_loss(), estimator.get_metrics()) == ("mse", ["mae"])
    assert estimator.get_optimizer_config()["class_name"] == "SGD"
    assert estimator.get_model().output_shape == (None, 1)
    with pytest.warns(DeprecationWarning, match="setFeaturesCol is deprecated"):
        assert estimator.setFeaturesCol("x") is estimator
    with pytest.warns(DeprecationWarning, match="setLabelCol is deprecated"):
        estimator.setLabelCol("y")
    with pytest.warns(DeprecationWarning, match="setOutputCol is deprecated"):
        estimator.setOutputCol("z")
    assert (estimator.getFeaturesCol(), estimator.getLabelCol(), estimator.getOutputCol()) == ("x", "y", "z")
    assert ElephasEstimator().getOutputCol() == ElephasTransformer().getOutputCol() == "prediction"
    with pytest.raises(TypeError, match="has no param 'epoch'"):
        ElephasEstimator(epoch=3)
    with pytest.raises(ConfigError, match="not compiled"):
        ElephasEstimator(keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)]))


@pytest.mark.spark
def test_a_pipeline_with_class_labels_gives_probabilities(spark: SparkSession) -> None:
    def own(x: Any) -> Any:
        return keras.ops.softmax(x)

    x = np.random.default_rng(0).normal(size=(96, 3))
    classes = (x.sum(axis=1) > 0).astype(int)
    rows = [(Vectors.dense(row), float(label)) for row, label in zip(x, classes, strict=True)]
    frame = spark.createDataFrame(rows, ["raw", "class"]).repartition(5)
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, activation=own)])
    estimator = ElephasEstimator(
        keras_model_config=model.to_json(),
        custom_objects={"own": own},
        optimizer_config=Adam(lr=0.1).get_config(),
        loss="categorical_crossentropy",
        nb_classes=2,
        epochs=4,
        batch_size=8,
        num_workers=2,
        mode="synchronous",
        featuresCol="scaled",
        labelCol="class",
        outputCol="probabilities",
    )

    pipeline_model = Pipeline(stages=[StandardScaler(inputCol="raw", outputCol="scaled"), estimator]).fit(frame)

    transformer = pipeline_model.stages[-1]
    assert isinstance(transformer, ElephasTransformer)
    (history,) = transformer.history
    assert len(history["acc"]) == len(history["val_acc"]) == 4
    assert history["loss"][-1] < history["loss"][0]
    result = pipeline_model.transform(frame)
    assert result.columns == ["raw", "class", "scaled", "probabilities"]
    assert isinstance(result.schema["probabilities"].dataType, ArrayType)
    collected = result.collect()
    expected = transformer.get_model().predict(np.array([row.scaled.toArray() for row in collected]), verbose=0)
    np.testing.assert_allclose([row.probabilities for row in collected], expected, rtol=1e-5, atol=1e-6)
    accuracy = np.mean([np.argmax(row.probabilities) == row["class"] for row in collected])
    assert accuracy > 0.8
    transformer.set_inference_batch_size(3)
    again = [row.probabilities for row in pipeline_model.transform(frame).collect()]
    np.testing.assert_allclose(again, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.spark
def test_the_type_of_the_output_follows_the_loss(spark: SparkSession) -> None:
    model = regression_model()
    frame = spark.createDataFrame([(Vectors.dense([1.0, 2.0, 3.0]),), (Vectors.sparse(3, {}),)], ["features"]).coalesce(
        1
    )
    (first,), (second,) = model.predict(np.array([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]), verbose=0)
    types = {
        LossModelTypeMapper().get_model_type("mae"): (DoubleType(), [first, second]),
        ModelType.CLASSIFICATION: (ArrayType(DoubleType()), [[first], [second]]),
        None: (ArrayType(DoubleType()), [[first], [second]]),
    }
    for model_type, (column_type, values) in types.items():
        transformer = ElephasTransformer(
            keras_model_config=model.to_json(), weights=model.get_weights(), model_type=model_type
        )
        result = transformer.transform(frame)
        assert result.schema["prediction"].dataType.simpleString() == column_type.simpleString()
        np.testing.assert_allclose([row.prediction for row in result.collect()], values, rtol=1e-5, atol=1e-6)
    # The input is evaluated once, whole partitions are no matter, and an empty one is none either.
    assert transformer.transform(frame.limit(0)).collect() == []
