"""AllReduceTransformer: what plain `model.predict` says, as columns beside the rows, wherever and however they come."""

from __future__ import annotations

import datetime
import decimal
import io
import pickle
import sys
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import cloudpickle
import keras
import numpy as np
import pytest
from pyspark import Broadcast
from pyspark import cloudpickle as spark_cloudpickle
from pyspark.ml.linalg import DenseVector, Vectors, VectorUDT
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.types import (
    ArrayType,
    DateType,
    DecimalType,
    DoubleType,
    FloatType,
    IntegerType,
    LongType,
    MapType,
    StringType,
    StructField,
    StructType,
    TimestampType,
)

from allreduce_spark.errors import AllReduceSparkError
from allreduce_spark.spark.inference import value_of
from allreduce_spark.spark.ml.transformer import AllReduceTransformer

pytestmark = pytest.mark.spark

for pickler in (cloudpickle, spark_cloudpickle):
    pickler.register_pickle_by_value(sys.modules[__name__])

ROWS = 23
X = np.random.default_rng(0).normal(size=(ROWS, 4))


def dense(units: int, activation: str | None = None, loss: Any = None, inputs: int = 4) -> keras.Model:
    keras.utils.set_random_seed(3)
    layers = [
        keras.layers.Dense(6, activation="relu", name="hidden"),
        keras.layers.Dense(units, activation=activation, name="last"),
    ]
    model = keras.Sequential([keras.Input((inputs,)), *layers])
    if loss is not None:
        model.compile("sgd", loss)
    return model


def table(spark: SparkSession, x: np.ndarray = X, partitions: int = 3) -> DataFrame:
    rows = [(number, Vectors.dense(row)) for number, row in enumerate(x)]
    schema = StructType([StructField("id", LongType()), StructField("features", VectorUDT())])
    return spark.createDataFrame(spark.sparkContext.parallelize(rows, partitions), schema)


def column(rows: list[Any], name: str) -> np.ndarray:
    values = [row[name] for row in rows]
    return np.array([value.toArray() if isinstance(value, DenseVector) else value for value in values])


def assert_close(actual: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)


def test_columns_of_every_type_pass_through_beside_the_predictions_and_the_input_is_computed_once(
    spark: SparkSession,
) -> None:
    rows = [
        (
            number,
            Vectors.dense(row) if number % 2 else Vectors.sparse(4, range(4), row.tolist()),
            {"key": number} if number % 3 else None,
            decimal.Decimal(number) / 4,
            datetime.datetime(2020, 1, 1, 12, number),
            datetime.date(2020, 1, 1 + number),
            (number, ("text", None)),
            Vectors.sparse(3, [1], [2.0]) if number % 2 else None,
        )
        for number, row in enumerate(X)
    ]
    inner = StructType([StructField("text", StringType()), StructField("none", StringType())])
    schema = StructType(
        [
            StructField("id", LongType(), False),
            StructField("features", VectorUDT()),
            StructField("map", MapType(StringType(), LongType())),
            StructField("decimal", DecimalType(10, 2)),
            StructField("time", TimestampType()),
            StructField("date", DateType()),
            StructField("struct", StructType([StructField("number", IntegerType()), StructField("inner", inner)])),
            StructField("a.vector", VectorUDT(), True, {"note": "kept"}),
        ]
    )
    evaluations = spark.sparkContext.accumulator(0)

    def counted(row: Any) -> Any:
        evaluations.add(1)
        return row

    # 40 partitions, most of them empty.
    frame = spark.createDataFrame(spark.sparkContext.parallelize(rows, 40).map(counted), schema)
    model = dense(3, "softmax", "sparse_categorical_crossentropy")
    result = AllReduceTransformer(model, outputLayer="hidden", outputCol="inside", predictionBatchSize=2).transform(
        frame
    )

    assert result.columns == [*frame.columns, "rawPrediction", "probability", "prediction", "inside"]
    assert [result.schema[name] for name in frame.columns] == [frame.schema[name] for name in frame.columns]
    collected = result.collect()
    assert evaluations.value == ROWS
    assert [tuple(row)[: len(rows[0])] for row in collected] == rows
    vectors = ["features", "`a.vector`"]  # Spark compares them by their bytes
    assert result.select(vectors).union(frame.select(vectors)).distinct().count() == ROWS
    expected = model.predict(X, verbose=0)
    assert_close(column(collected, "probability"), expected)
    assert column(collected, "prediction").tolist() == expected.argmax(axis=1).tolist()
    hidden = keras.Model(model.inputs, model.get_layer("hidden").output).predict(X, verbose=0)
    assert_close(column(collected, "inside"), hidden)


def softmax(logits: np.ndarray) -> np.ndarray:
    return keras.ops.convert_to_numpy(keras.ops.softmax(logits))


def sigmoid(logits: np.ndarray) -> np.ndarray:
    return keras.ops.convert_to_numpy(keras.ops.sigmoid(logits))


def pair(p: np.ndarray) -> np.ndarray:
    return np.concatenate([1 - p, p], axis=1)


@pytest.mark.parametrize(
    ("model", "params", "probability", "prediction"),
    [
        (dense(1, "sigmoid", "binary_crossentropy"), {}, pair, lambda p: (p[:, 0] > 0.5) * 1.0),
        (
            dense(1, None, keras.losses.BinaryCrossentropy(from_logits=True)),
            {},
            lambda p: pair(sigmoid(p)),
            lambda p: (p[:, 0] > 0) * 1.0,
        ),
        (
            dense(3, None, keras.losses.SparseCategoricalCrossentropy(from_logits=True)),
            {"outputType": "array"},
            softmax,
            lambda p: p.argmax(axis=1),
        ),
        (dense(3, "sigmoid", "binary_crossentropy"), {}, lambda p: p, lambda p: (p > 0.5) * 1.0),
        (dense(3, "softmax"), {}, lambda p: p, lambda p: p.argmax(axis=1)),
        (dense(2, None, lambda y, p: p), {"task": "classification"}, lambda p: p, lambda p: p.argmax(axis=1)),
        (dense(1, None, "mse"), {}, None, lambda p: p[:, 0]),
        (dense(1, "sigmoid", "mse"), {}, None, lambda p: p[:, 0]),
        (dense(2, None, "mae"), {"outputType": "array"}, None, lambda p: p),
        (dense(3, "softmax", "categorical_crossentropy"), {"task": "regression"}, None, lambda p: p),
    ],
    ids=["unit", "logit", "logits", "labels", "uncompiled", "custom loss", "value", "share", "values", "as regression"],
)
def test_the_loss_decides_what_the_outputs_mean(
    spark: SparkSession, model: keras.Model, params: dict[str, Any], probability: Any, prediction: Any
) -> None:
    rows = AllReduceTransformer(model, **params).transform(table(spark)).collect()
    output = model.predict(X, verbose=0)
    assert_close(column(rows, "prediction"), prediction(output))
    assert ("probability" in rows[0]) == ("rawPrediction" in rows[0]) == (probability is not None)
    if probability is not None:
        assert_close(column(rows, "probability"), probability(output))
        logits = output if output.shape[1] > 1 else np.concatenate([-output, output], axis=1)
        from_logits = getattr(getattr(model, "loss", None), "from_logits", False)
        assert_close(column(rows, "rawPrediction"), logits if from_logits else probability(output))


def test_inputs_are_matched_by_name_or_order_and_every_output_has_columns_of_its_own(spark: SparkSession) -> None:
    left, right = keras.Input((2,), name="left"), keras.Input((1,), name="right")
    both = keras.layers.Concatenate(name="both")([right, left])
    outputs = [
        keras.layers.Dense(3, activation="softmax", name="kind")(both),
        keras.layers.Dense(1, name="size")(both),
        keras.layers.Reshape((3, 1), name="grid")(both),
    ]
    model = keras.Model([right, left], outputs)
    model.compile("sgd", ["sparse_categorical_crossentropy", "mse", "mse"])
    named = keras.Model({"left": left, "right": right}, dict(zip(["kind", "size", "grid"], outputs, strict=True)))
    named.compile("sgd", {"kind": "sparse_categorical_crossentropy", "size": "mse", "grid": "mse"})
    rows = [(row[:2].tolist(), float(row[2])) for row in X]
    kind, size, grid = model.predict([X[:, 2:3], X[:, :2]], verbose=0)

    for tested, columns in ((model, ["left", "right"]), (model, ["b", "a"]), (named, ["right", "left"])):
        names = ["a", "b"] if "a" in columns else ["left", "right"]
        frame = spark.createDataFrame(
            rows, StructType([StructField(names[0], ArrayType(DoubleType())), StructField(names[1], DoubleType())])
        )
        transformer = AllReduceTransformer(
            tested, featuresCols=columns, outputType="array", outputLayer="both", probabilityCol="p"
        )
        result = transformer.transform(frame)
        assert set(result.columns) == {
            *names,
            "rawPrediction_kind",
            "p_kind",
            "prediction_kind",
            "prediction_size",
            "prediction_grid",
            "output",
        }
        collected = result.collect()
        assert_close(column(collected, "p_kind"), kind)
        assert_close(column(collected, "prediction_kind"), kind.argmax(axis=1))
        assert_close(column(collected, "prediction_size"), size[:, 0])
        assert_close(column(collected, "prediction_grid"), grid)
        assert_close(column(collected, "output"), X[:, [2, 0, 1]])


def test_images_come_as_nested_or_flat_arrays_or_as_raw_bytes(spark: SparkSession) -> None:
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Conv2D(2, 3, name="maps"), keras.layers.Flatten(), keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input((4, 5, 2)), *layers])
    model.compile("sgd", "mse")
    images = np.random.default_rng(0).integers(0, 255, (ROWS, 4, 5, 2)).astype("uint8")
    rows = [
        (
            image.tolist(),
            image.reshape(-1).astype(float).tolist(),
            image.tobytes(),
            image.astype("float32").tobytes(),
            image.astype("float64").tobytes(),
        )
        for image in images
    ]
    nested = ArrayType(ArrayType(ArrayType(IntegerType())))
    frame = spark.createDataFrame(
        rows,
        StructType([StructField("nested", nested), StructField("flat", ArrayType(FloatType()))])
        .add("uint8", "binary")
        .add("float32", "binary")
        .add("float64", "binary"),
    )
    expected = model.predict(images, verbose=0)[:, 0]
    for name in frame.columns:
        frame = AllReduceTransformer(model, featuresCol=name, predictionCol=f"p_{name}").transform(frame)
    maps = AllReduceTransformer(model, featuresCol="uint8", predictionCol="", outputLayer="maps", outputType="array")
    collected = maps.transform(frame).collect()
    for name in ("nested", "flat", "uint8", "float32", "float64"):
        np.testing.assert_allclose(column(collected, f"p_{name}"), expected, rtol=1e-5)
    assert column(collected, "output").shape == (ROWS, 2, 3, 2)


def test_rows_with_nulls_and_nans_are_left_out_where_that_is_asked_for(spark: SparkSession) -> None:
    x = X.copy()
    x[3, 1] = np.nan
    rows = [(n, float(row[0]), None if n == 5 else row[1:].tolist(), None) for n, row in enumerate(x)]
    rows[7][2][0] = None
    frame = spark.createDataFrame(rows, "id long, first double, rest array<double>, other string").repartition(1)
    model = dense(1, None, "mse")
    transformer = AllReduceTransformer(
        model, featuresCols=["first", "rest"], handleInvalid="skip", predictionBatchSize=4
    )
    collected = transformer.transform(frame).orderBy("id").collect()
    kept = [n for n in range(ROWS) if n not in (3, 5, 7)]
    assert [row.id for row in collected] == kept
    assert_close(column(collected, "prediction"), model.predict(X[kept], verbose=0)[:, 0])


class Doubled(keras.layers.Layer):
    """A layer of the user's own, which is not registered with Keras."""

    def call(self, x: Any) -> Any:
        return 2 * x


def test_the_models_own_code_reaches_the_executors_and_changed_weights_are_seen(spark: SparkSession) -> None:
    model = keras.Sequential(
        [keras.Input((4,)), Doubled(), keras.layers.Lambda(lambda x: x + 1), keras.layers.Dense(1)]
    )
    model.compile("sgd", lambda y, p: (y - p) ** 2)
    transformer = AllReduceTransformer(model)
    copies = [transformer, transformer.copy(), transformer.copy({transformer.predictionCol: "other"})]
    deep = deepcopy(AllReduceTransformer(dense(1)))
    tokens = set()
    for weight in (1.0, 2.0):
        model.layers[-1].set_weights([np.full((4, 1), weight), np.zeros(1)])
        for copy in copies:
            name = copy.getPredictionCol()
            assert_close(column(copy.transform(table(spark)).collect(), name), weight * (2 * X + 1).sum(axis=1))
            tokens.add(copy._sent._token)
    assert len(tokens) == 2  # sent once for each state of the model, whatever the number of copies
    assert_close(column(deep.transform(table(spark)).collect(), "prediction"), dense(1).predict(X, verbose=0)[:, 0])


def test_a_model_that_came_encrypted_can_be_asked_for_again() -> None:
    broadcast: Any = Broadcast(sock_file=io.BytesIO(pickle.dumps("model")))  # so under spark.io.encryption.enabled
    assert [value_of(broadcast), value_of(broadcast)] == ["model", "model"]


@pytest.fixture
def stream(spark: SparkSession, tmp_path: Path) -> Iterator[DataFrame]:
    frame = table(spark).withColumn("array", F.expr("transform(array(id), x -> double(x))"))
    frame.write.parquet(str(tmp_path / "rows"))
    yield spark.readStream.schema(frame.schema).parquet(str(tmp_path / "rows"))
    for query in spark.streams.active:
        query.stop()


def test_a_stream_is_transformed_as_a_table_is(spark: SparkSession, stream: DataFrame) -> None:
    model = dense(1, None, "mse")
    result = AllReduceTransformer(model).transform(stream)
    assert result.isStreaming
    query = result.writeStream.format("memory").queryName("predictions").trigger(availableNow=True).start()
    assert query.awaitTermination(120)
    collected = spark.table("predictions").orderBy("id").collect()
    assert_close(column(collected, "prediction"), model.predict(X, verbose=0)[:, 0])


def with_row(**values: Any) -> Any:
    """A table whose row 2 is not like the others."""

    def frame(spark: SparkSession) -> DataFrame:
        good = {"v": Vectors.dense(X[0]), "a": X[0].tolist(), "n": 1.0, "b": X[0].tobytes(), "s": "text", "id": 0}
        rows = [{**good, **(values if number == 2 else {})} for number in range(4)]
        schema = (
            StructType()
            .add("v", VectorUDT())
            .add("a", ArrayType(DoubleType()))
            .add("n", "double")
            .add("b", "binary")
            .add("s", "string")
            .add("id", "integer")
        )
        return spark.createDataFrame(
            spark.sparkContext.parallelize([tuple(row[f] for f in schema.names) for row in rows], 1), schema
        )

    return frame


GOOD = with_row()
TWO_INPUTS = keras.Model(
    inputs := [keras.Input((2,), name="l"), keras.Input((1,), name="r")], keras.layers.Concatenate()(inputs)
)


NO_OUTPUTS = dict.fromkeys(["predictionCol", "probabilityCol", "rawPredictionCol"], "")


@pytest.mark.parametrize(
    ("params", "frame", "words"),
    [
        ({"featuresCol": "nope"}, GOOD, ["no column 'nope'", "'v'"]),
        ({"featuresCol": "s"}, GOOD, ["column 's' is a string", "numbers"]),
        ({"featuresCol": "n"}, GOOD, ["column 'n' has a single number", "vectors of length 4"]),
        ({"featuresCols": ["n", "id"]}, GOOD, ["columns 'n', 'id' together", "length 2", "length 4"]),
        ({"featuresCols": ["a", "a"]}, GOOD, ["'a' is named twice"]),
        ({"featuresCol": "a", "featuresCols": ["n"]}, GOOD, ["both set"]),
        ({"featuresCol": "v"}, with_row(v=Vectors.dense([1, 2, 3])), ["row 2", "column 'v'", "length 3", "length 4"]),
        ({"featuresCol": "v"}, with_row(v=Vectors.sparse(9, {})), ["row 2", "column 'v'", "length 9", "length 4"]),
        ({"featuresCol": "v"}, with_row(v=None), ["row 2", "column 'v' has a null"]),
        ({"featuresCol": "a"}, with_row(a=[1.0, None, 2.0, 3.0]), ["row 2", "'a' has a null inside a list"]),
        ({"featuresCol": "a"}, with_row(a=[1.0, float("nan"), 2.0, 3.0]), ["row 2", "column 'a' has a NaN"]),
        ({"featuresCol": "b"}, with_row(b=b"12345"), ["row 2", "column 'b' has 5 bytes", "4 bytes (uint8)"]),
        ({"featuresCol": "a", "outputLayer": "nope"}, GOOD, ["no layer 'nope'", "'hidden', 'last'"]),
        ({"featuresCol": "a", "outputLayer": "last", "outputCol": ""}, GOOD, ["outputCol is empty"]),
        ({"featuresCol": "a", "predictionCol": "id"}, GOOD, ["already has a column 'id'"]),
        ({"featuresCol": "a", "predictionCol": "p", "probabilityCol": "p"}, GOOD, ["two outputs", "'p'"]),
        ({"featuresCol": "a", **NO_OUTPUTS}, GOOD, ["nothing is to be added"]),
        ({"model": TWO_INPUTS, "featuresCol": "a"}, GOOD, ["2 inputs ['l', 'r']", "1 column ['a']"]),
        ({"model": keras.Sequential([keras.layers.Dense(1)])}, GOOD, ["no model with weights"]),
        ({"model": None}, GOOD, ["no model with weights"]),
        ({"model": "model.keras"}, GOOD, ["keras.Model", "str"]),
        ({"featureCol": "a"}, GOOD, ["no param 'featureCol'", "did you mean 'featuresCol'"]),
        ({"predictionBatchSize": 0}, GOOD, ["predictionBatchSize", "at least 1", "0"]),
        ({"outputType": "list"}, GOOD, ["outputType", "'vector', 'array'", "'list'"]),
        ({"featuresCols": "a"}, GOOD, ["featuresCols", "list of column names"]),
        ({"handleInvalid": "keep"}, GOOD, ["handleInvalid", "'error', 'skip'"]),
    ],
)  # fmt: skip
def test_what_cannot_be_transformed_is_named(
    spark: SparkSession, params: dict[str, Any], frame: Any, words: list[str]
) -> None:
    params = dict(params)
    model = params.pop("model", dense(3, "softmax"))
    in_task = any(word.startswith("row ") for word in words)  # seen on the driver, unless one must read the rows
    with pytest.raises(Exception if in_task else AllReduceSparkError) as caught:
        AllReduceTransformer(model, **params).transform(frame(spark)).collect()
    for word in words:
        assert word in str(caught.value)
