"""AllReduceEstimator: what `SparkModel.fit` gives, as a Spark ML estimator, and its place among Spark's own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import cloudpickle
import keras
import numpy as np
import pandas as pd
import pytest
from pyspark import cloudpickle as spark_cloudpickle
from pyspark.ml import Pipeline
from pyspark.ml.evaluation import BinaryClassificationEvaluator, MulticlassClassificationEvaluator, RegressionEvaluator
from pyspark.ml.feature import StringIndexer, VectorAssembler
from pyspark.ml.linalg import Vectors, VectorUDT
from pyspark.ml.tuning import CrossValidator, ParamGridBuilder, TrainValidationSplit
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.types import ArrayType, DoubleType, StructType

from allreduce_spark import SparkModel
from allreduce_spark.checkpoint.store import Store
from allreduce_spark.errors import AllReduceSparkError
from allreduce_spark.spark.ml.estimator import AllReduceEstimator

pytestmark = pytest.mark.spark

for pickler in (cloudpickle, spark_cloudpickle):
    pickler.register_pickle_by_value(sys.modules[__name__])

X = np.random.default_rng(0).normal(size=(64, 4))
CLASSES = (X[:, 0] > 0).astype(int) + (X[:, 1] > 0).astype(int)


def model_of(
    units: int, activation: str | None, loss: Any, *, learning_rate: float = 0.1, **arguments: Any
) -> keras.Model:
    keras.utils.set_random_seed(3)
    layers = [keras.layers.Dense(8, activation="relu"), keras.layers.Dense(units, activation=activation)]
    model = keras.Sequential([keras.Input((4,)), *layers])
    model.compile(keras.optimizers.SGD(learning_rate), loss, **arguments)
    return model


def table(spark: SparkSession) -> DataFrame:
    """Two partitions of rows whose features come in three forms."""
    rows = [
        (
            Vectors.dense(x) if n % 3 else Vectors.sparse(4, range(4), x.tolist()),
            *x.tolist(),
            x.tolist(),
            c,
            float(c > 0),
            x.sum().item(),
            1.0 + n % 2,
            [None, True, False][n % 3],
        )
        for n, (x, c) in enumerate(zip(X, CLASSES.tolist(), strict=True))
    ]
    schema = StructType().add("features", VectorUDT())
    for name in ("a.1", "b", "c", "d"):
        schema = schema.add(name, "double")
    schema = (
        schema.add("array", ArrayType(DoubleType()))
        .add("label", "long")
        .add("positive", "double")
        .add("sum", "double")
        .add("weight", "double")
        .add("held_out", "boolean")
    )
    return spark.createDataFrame(spark.sparkContext.parallelize(rows, 2), schema)


def weights_of(model: keras.Model) -> np.ndarray:
    return np.concatenate([weight.reshape(-1) for weight in model.get_weights()])


def test_fit_gives_what_spark_model_gives_and_leaves_its_own_model_alone(spark: SparkSession, tmp_path: Path) -> None:
    model = model_of(3, "softmax", "categorical_crossentropy", metrics=["accuracy"], weighted_metrics=["mae"])
    before = weights_of(model)
    estimator = AllReduceEstimator(
        model=model,
        featuresCols=["a.1", "b", "c", "d"],
        weightCol="weight",
        validationIndicatorCol="held_out",
        learningRate=0.2,
        epochs=3,
        batchSize=8,
        numRanks=2,
        shuffle=False,
        seed=1,
        predictionCol="class",
        checkpointPath=str(tmp_path / "store"),
        checkpointEverySteps=2,
        resume="auto",
        maxRestarts=0,
        minRanks=1,
    )
    frame = table(spark)
    transformer = estimator.fit(frame)
    assert Store(tmp_path / "store").checkpoints()[-1].epoch == 3
    again = estimator.fit(frame)  # Its driver might have been lost after the last step.
    np.testing.assert_array_equal(weights_of(again.model), weights_of(transformer.model))
    assert again.history == transformer.history

    np.testing.assert_array_equal(weights_of(model), before)
    assert model.optimizer.learning_rate.numpy() == pytest.approx(0.1)
    assert int(model.optimizer.iterations) == 0

    reference = model_of(
        3, "softmax", "categorical_crossentropy", learning_rate=0.2, metrics=["accuracy"], weighted_metrics=["mae"]
    )
    # The same rows in the same partitions, as an RDD.
    rows = frame.rdd.map(
        lambda row: (row["held_out"], np.float32(row["array"]), np.eye(3)[row["label"]], row["weight"])
    )
    history = SparkModel(reference, num_ranks=2).fit(
        rows.filter(lambda row: not row[0]).map(lambda row: row[1:]),
        epochs=3,
        batch_size=8,
        shuffle=False,
        seed=1,
        validation_data=rows.filter(lambda row: row[0]).map(lambda row: row[1:]),
        verbose=0,
    )
    np.testing.assert_allclose(weights_of(transformer.model), weights_of(reference), rtol=1e-5, atol=1e-6)
    assert transformer.history.keys() == history.history.keys() >= {"loss", "accuracy", "val_loss", "val_mae"}
    for name, values in history.history.items():
        np.testing.assert_allclose(transformer.history[name], values, rtol=1e-5, err_msg=name)

    assert transformer.uid == estimator.uid
    assert transformer.getFeaturesCols() == ["a.1", "b", "c", "d"]
    result = transformer.transform(frame)
    classes = np.array([row["class"] for row in result.collect()])
    np.testing.assert_array_equal(classes, reference.predict(X, verbose=0).argmax(axis=1))


def test_a_pipeline_with_sparks_own_stages_and_evaluators(spark: SparkSession) -> None:
    frame = (
        table(spark)
        .withColumnRenamed("a.1", "a")
        .selectExpr("a", "b", "c", "d", "if(positive > 0, 'yes', 'no') AS answer")
    )
    stages = [
        StringIndexer(inputCol="answer", outputCol="index", stringOrderType="alphabetAsc"),
        VectorAssembler(inputCols=["a", "b", "c", "d"], outputCol="features"),
        AllReduceEstimator(
            model=model_of(1, "sigmoid", "binary_crossentropy"), labelCol="index", epochs=12, batchSize=4, numRanks=2
        ),
    ]
    result = Pipeline(stages=stages).fit(frame).transform(frame)
    added = ["rawPrediction", "probability", "prediction"]
    assert [field.name for field in result.schema][-5:] == ["index", "features", *added]
    ranking = BinaryClassificationEvaluator(labelCol="index")
    assert ranking.evaluate(result) > 0.9
    assert MulticlassClassificationEvaluator(labelCol="index", metricName="accuracy").evaluate(result) > 0.8
    # The evaluator computes the logarithm of the probability of the true class.
    assert MulticlassClassificationEvaluator(labelCol="index", metricName="logLoss").evaluate(result) < 0.6


def test_cross_validation_and_train_validation_split_with_fits_at_the_same_time(spark: SparkSession) -> None:
    frame = table(spark).select("features", "sum").cache()
    small, large = model_of(1, None, "mse", learning_rate=0.05), model_of(1, None, "mse", learning_rate=1e-6)
    large.set_weights([weight * 3 for weight in large.get_weights()])
    estimator = AllReduceEstimator(model=large, labelCol="sum", epochs=2, batchSize=8, numRanks=2)
    evaluator = RegressionEvaluator(labelCol="sum")
    grid = ParamGridBuilder().addGrid(estimator.learningRate, [1e-6, 0.05]).build()
    by_rate = CrossValidator(
        estimator=estimator.copy({estimator.model: small}),
        estimatorParamMaps=grid,
        evaluator=evaluator,
        numFolds=2,
        parallelism=2,
        seed=1,
    )
    found = by_rate.fit(frame)
    assert found.avgMetrics[1] < found.avgMetrics[0]
    assert found.bestModel.model.optimizer.learning_rate.numpy() == pytest.approx(0.05)
    assert evaluator.evaluate(found.transform(frame)) < found.avgMetrics[0]

    # Two fits of one rank each fit into the two slots side by side.
    estimator.setNumRanks(1)
    models = ParamGridBuilder().addGrid(estimator.model, [large, small]).build()
    split = TrainValidationSplit(
        estimator=estimator, estimatorParamMaps=models, evaluator=evaluator, parallelism=2, seed=1
    )
    chosen = split.fit(frame)
    assert chosen.validationMetrics[1] < chosen.validationMetrics[0]
    # What was measured is what was trained, and not the model of the grid.
    start = RegressionEvaluator(labelCol="sum").evaluate(estimator._transformer(small, {}).transform(frame))
    assert chosen.validationMetrics[1] < start


def test_several_outputs_are_trained_on_a_column_each_and_bad_rows_are_left_out(spark: SparkSession) -> None:
    left, right = keras.Input((3,), name="left"), keras.Input((1,), name="right")
    both = keras.layers.Concatenate()([left, right])
    kind = keras.layers.Dense(3, activation="softmax", name="kind")(both)
    size = keras.layers.Dense(1, name="size")(both)
    keras.utils.set_random_seed(1)
    model = keras.Model([left, right], [kind, size])
    model.compile("sgd", ["sparse_categorical_crossentropy", "mse"])
    rows = [(x[:3].tolist(), x[3].item(), c, x.sum().item()) for x, c in zip(X, CLASSES.tolist(), strict=True)]
    rows += [
        (None, 1.0, 1, 1.0),
        ([1.0, 2.0, None], 1.0, 1, 1.0),
        ([1.0, 2.0, 3.0], 1.0, None, 1.0),
        ([1.0, 2.0, 3.0], 1.0, 1, float("nan")),
    ]
    frame = spark.createDataFrame(
        spark.sparkContext.parallelize(rows, 1), "left array<double>, right double, kind int, size double"
    )
    estimator = AllReduceEstimator(
        model=model,
        featuresCols=["right", "left"],
        labelCols=["kind", "size"],
        handleInvalid="skip",
        batchSize=64,
        numRanks=1,
        epochs=2,
        shuffle=False,
    )
    transformer = estimator.fit(frame)
    history = model.fit(
        [X[:, :3], X[:, 3:]], [CLASSES, X.sum(axis=1)], batch_size=64, epochs=2, shuffle=False, verbose=0
    )
    np.testing.assert_allclose(weights_of(transformer.model), weights_of(model), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(transformer.history["loss"], history.history["loss"], rtol=1e-4)
    added = ["rawPrediction_kind", "probability_kind", "prediction_kind", "prediction_size"]
    assert transformer.transform(frame).columns[4:] == added
    assert transformer.transform(frame.drop("kind", "size")).count() == 66


SOFTMAX = model_of(3, "softmax", "sparse_categorical_crossentropy")
ONE_HOT = model_of(3, "softmax", "categorical_crossentropy")
VALUE = model_of(1, None, "mse")


def bad(**values: Any) -> Any:
    """Rows of which number 2 is not like the others."""

    def frame(spark: SparkSession) -> DataFrame:
        good = {"features": X[0].tolist(), "label": 1.0, "two": [1.0, 2.0], "weight": 1.0, "text": "one", "flag": True}
        rows = [{**good, **(values if number == 2 else {})} for number in range(4)]
        schema = "features array<double>, label double, two array<double>, weight double, text string, flag boolean"
        return spark.createDataFrame(spark.sparkContext.parallelize([tuple(row.values()) for row in rows], 1), schema)

    return frame


GOOD = bad()


@pytest.mark.parametrize(
    ("params", "frame", "words"),
    [
        ({"model": SOFTMAX}, lambda spark: pd.DataFrame({"features": [1.0]}), ["pandas", "spark.createDataFrame(data)"]),
        ({"model": SOFTMAX}, lambda spark: spark.readStream.format("rate").load(), ["no end", "foreachBatch"]),
        ({"model": SOFTMAX, "labelCol": "nope"}, GOOD, ["no column 'nope'", "'features'"]),
        ({"model": SOFTMAX, "featuresCol": "nope"}, GOOD, ["no column 'nope'"]),
        ({"model": SOFTMAX, "weightCol": "nope"}, GOOD, ["no column 'nope'"]),
        ({"model": SOFTMAX, "validationIndicatorCol": "nope"}, GOOD, ["no column 'nope'"]),
        ({"model": SOFTMAX, "validationIndicatorCol": "weight"}, GOOD, ["'weight'", "boolean", "double"]),
        ({"model": SOFTMAX, "validationIndicatorCol": "flag", "validationSplit": 0.5}, GOOD, ["both set"]),
        ({"model": SOFTMAX, "labelCol": "text"}, GOOD, ["column 'text' is a string", "StringIndexer"]),
        ({"model": SOFTMAX}, bad(label=3.0), ["row 2", "column 'label' has the value 3", "3 classes", "0 to 2"]),
        ({"model": ONE_HOT}, bad(label=-1.0), ["row 2", "column 'label' has the value -1", "whole numbers from 0 to 2"]),
        ({"model": SOFTMAX}, bad(label=None), ["row 2", "column 'label' has a null"]),
        ({"model": VALUE}, bad(features=[float("nan")] * 4), ["row 2", "column 'features' has a NaN"]),
        ({"model": VALUE}, bad(weight=-1.0), []),
        ({"model": VALUE, "labelCol": "two"}, GOOD, ["column 'two'", "length 2", "length 1"]),
        ({"model": VALUE, "featuresCol": "two"}, GOOD, ["column 'two'", "vectors of length 2", "vectors of length 4"]),
        ({"model": VALUE, "labelCols": ["label", "weight"]}, GOOD, ["1 outputs", "2 columns", "labelCols"]),
        ({"model": VALUE, "labelCol": "label", "labelCols": ["label"]}, GOOD, ["both set"]),
        ({}, GOOD, ["has no model"]),
        ({"model": "a model"}, GOOD, ["keras.Model", "str"]),
        ({"model": keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])}, GOOD, ["not compiled"]),
        ({"model": VALUE, "numRanks": 99}, GOOD, ["99", "slots"]),
        ({"model": VALUE, "callbacks": [print]}, GOOD, ["callbacks", "print"]),
        ({"model": VALUE, "epoch": 3}, GOOD, ["no param 'epoch'", "'epochs'"]),
        ({"model": VALUE, "epochs": "3"}, GOOD, ["epochs must be an integer", "'3'"]),
        ({"model": VALUE, "batchSize": True}, GOOD, ["batchSize"]),
        ({"model": VALUE, "validationSplit": 1.0}, GOOD, ["validationSplit", "below 1"]),
        ({"model": VALUE, "syncEvery": "step"}, GOOD, ["syncEvery", "'step'"]),
        ({"model": VALUE, "labelCol": 3}, GOOD, ["labelCol must be a string", "3"]),
        ({"model": VALUE, "shuffle": "yes"}, GOOD, ["shuffle must be True or False"]),
        ({"model": VALUE, "learningRate": -1}, GOOD, ["learningRate", "at least 0"]),
        ({"model": VALUE, "classWeight": {0: "x"}}, GOOD, ["classWeight"]),
        ({"model": VALUE, "resume": "auto"}, GOOD, ["resume='auto' needs a place", "Checkpoint(path)"]),
        ({"model": VALUE, "resume": "yes"}, GOOD, ["resume must be one of 'auto', 'never'"]),
        ({"model": VALUE, "checkpointEverySteps": 2, "checkpointEverySeconds": 2}, GOOD, ["one of every_steps and every_s"]),
        ({"model": VALUE, "maxRestarts": -1}, GOOD, ["maxRestarts must be an integer of at least 0"]),
        ({"model": VALUE, "minRanks": 0}, GOOD, ["minRanks must be an integer of at least 1"]),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_on_is_named_before_a_rank_starts(
    spark: SparkSession, params: dict[str, Any], frame: Any, words: list[str]
) -> None:
    if not words:  # the control: the same way without a fault
        assert AllReduceEstimator(**params, numRanks=1).fit(frame(spark)).history["loss"]
        return
    with pytest.raises(AllReduceSparkError) as caught:
        AllReduceEstimator(**params).fit(frame(spark))
    for word in words:
        assert word in str(caught.value)


def test_params_are_documented_and_have_getters_and_setters_and_copies_are_apart() -> None:
    estimator = AllReduceEstimator(model=VALUE, epochs=3)
    assert all(param.doc for param in estimator.params)
    assert all(name in estimator.explainParams() for name in ("featuresCol", "validationIndicatorCol", "syncEvery"))
    assert estimator.setEpochs(5).setParams(numRanks=2, seed=None).getEpochs() == 5
    other = estimator.copy({estimator.epochs: 7})
    assert (estimator.getEpochs(), other.getEpochs(), other.getNumRanks()) == (5, 7, 2)
    assert other.getModel() is VALUE
    assert not estimator.isDefined("seed")
