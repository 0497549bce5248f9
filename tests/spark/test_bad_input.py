"""What cannot work is said before any rank starts: which value, what was expected, and what to do."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
import pandas
import pytest
from pyspark import SparkContext
from pyspark.ml.linalg import Vectors
from pyspark.sql import SparkSession

from allreduce_spark import SparkModel
from allreduce_spark.errors import AllReduceSparkError, ConfigError, DataError
from allreduce_spark.rendezvous import controller, group

pytestmark = [pytest.mark.spark, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

ROWS = 8


def compiled(loss: Any = "mse", features: int = 3, **arguments: Any) -> keras.Model:
    model = keras.Sequential([keras.Input((features,)), keras.layers.Dense(1)])
    model.compile("sgd", loss, **arguments)
    return model


def uncompiled() -> keras.Model:
    return keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])


def unbuilt() -> keras.Model:
    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    return model


def with_second_optimizer() -> keras.Model:
    model = compiled()
    model.generator_optimizer = keras.optimizers.Adam()
    return model


def with_two_inputs() -> keras.Model:
    left, right = keras.Input((3,), name="left"), keras.Input((2,), name="right")
    model = keras.Model([left, right], keras.layers.Dense(1)(keras.layers.Concatenate()([left, right])))
    model.compile("sgd", "mse")
    return model


def without_config() -> keras.Model:
    class Factor:
        value = 2.0

    class Scale(keras.layers.Layer):
        def __init__(self, factor: Any) -> None:
            super().__init__()
            self.factor = factor

        def call(self, x: Any) -> Any:
            return x * self.factor.value

    model = keras.Sequential([keras.Input((3,)), Scale(Factor()), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    return model


def arrays(spark: SparkSession) -> Any:
    return np.ones((ROWS, 3), "float32"), np.ones((ROWS, 1), "float32")


class HoldsALock(keras.callbacks.Callback):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


class HoldsSpark(keras.callbacks.Callback):
    def __init__(self, context: Any) -> None:
        super().__init__()
        self.context = context


@dataclass(frozen=True)
class Case:
    """A call that must fail, and the parts that its message must have."""

    name: str
    error: type[AllReduceSparkError] | type[TypeError]
    says: list[str]
    data: Callable[[SparkSession], Any] = arrays
    model: Callable[[], Any] = compiled
    num_ranks: Any = 2
    arguments: dict[str, Any] = field(default_factory=dict)


def rdd(*rows: Any, partitions: int = 2) -> Callable[[SparkSession], Any]:
    return lambda spark: spark.sparkContext.parallelize(list(rows), partitions)


def frame(rows: list[Any], schema: str = "features array<float>, label float") -> Callable[[SparkSession], Any]:
    return lambda spark: spark.createDataFrame(rows, schema)


GOOD_ROW = (np.ones(3), 1.0)
MODELS = [
    Case("not compiled", ConfigError, ["is not compiled", "model.compile("], model=uncompiled),
    Case("not a model", ConfigError, ["needs a keras.Model", "builtins.str"], model=lambda: "model"),
    Case(
        "a layer is not a model",
        ConfigError,
        ["needs a keras.Model", "Dense"],
        model=lambda: keras.layers.Dense(1),
    ),
    Case("a model class is not a model", ConfigError, ["needs a keras.Model"], model=lambda: keras.Model),
    Case(
        "loss without reduction",
        ConfigError,
        ["reduction=", "sum_over_batch_size"],
        model=lambda: compiled(keras.losses.MeanSquaredError(reduction=None)),
    ),
    Case("a second optimizer", ConfigError, ["second optimizer", "generator_optimizer"], model=with_second_optimizer),
    Case("a layer without get_config", ConfigError, ["cannot save", "get_config"], model=without_config),
]
RANKS = [
    Case("no ranks", ConfigError, ["num_ranks must be at least 1, got 0"], num_ranks=0),
    Case("negative ranks", ConfigError, ["num_ranks must be at least 1, got -1"], num_ranks=-1),
    Case("ranks as text", ConfigError, ["num_ranks must be an integer, got '2' of type str"], num_ranks="2"),
    Case("half a rank", ConfigError, ["num_ranks must be an integer, got 2.5"], num_ranks=2.5),
    Case("ranks as bool", ConfigError, ["num_ranks must be an integer, got True"], num_ranks=True),
    Case("more ranks than slots", ConfigError, ["num_ranks=3", "has 2", "lower num_ranks to 2"], num_ranks=3),
    Case("more ranks than anybody has", ConfigError, ["num_ranks=100000", "4096"], num_ranks=100_000),
]
SETTINGS = [
    Case("batch_size 0", ConfigError, ["batch_size must be at least 1, got 0"], arguments={"batch_size": 0}),
    Case("batch_size None", ConfigError, ["batch_size must be an integer, got None"], arguments={"batch_size": None}),
    Case("epochs 0", ConfigError, ["epochs must be at least 1, got 0"], arguments={"epochs": 0}),
    Case("epochs 1.5", ConfigError, ["epochs must be an integer, got 1.5"], arguments={"epochs": 1.5}),
    Case(
        "validation_split 1.0",
        ConfigError,
        ["validation_split must be", "got 1.0"],
        arguments={"validation_split": 1.0},
    ),
    Case(
        "validation_split negative",
        ConfigError,
        ["validation_split must be", "got -0.1"],
        arguments={"validation_split": -0.1},
    ),
    Case(
        "validation_split with validation_data",
        ConfigError,
        ["validation_split and validation_data are both given"],
        arguments={"validation_split": 0.2, "validation_data": (np.ones((2, 3)), np.ones((2, 1)))},
    ),
    Case(
        "validation_split that leaves nothing",
        DataError,
        ["validation_split=0.99", "8 rows", "none to train on"],
        arguments={"validation_split": 0.99},
    ),
    Case(
        "initial_epoch after the end",
        ConfigError,
        ["initial_epoch=3", "epochs=3"],
        arguments={"initial_epoch": 3, "epochs": 3},
    ),
    Case(
        "shuffle as text", ConfigError, ["shuffle must be True or False, got 'batch'"], arguments={"shuffle": "batch"}
    ),
    Case("seed negative", ConfigError, ["seed must be at least 0, got -1"], arguments={"seed": -1}),
    Case("verbose 3", ConfigError, ["verbose must be 0, 1, 2 or 'auto', got 3"], arguments={"verbose": 3}),
    Case("verbose as a list", ConfigError, ["verbose must be", "got [1]"], arguments={"verbose": [1]}),
    Case(
        "class_weight as text",
        ConfigError,
        ["class_weight must be a dict", "'balanced'"],
        arguments={"class_weight": "balanced"},
    ),
    Case(
        "class_weight by name",
        ConfigError,
        ["class_weight has the key 'cat'", "class indices"],
        arguments={"class_weight": {"cat": 1.0}},
    ),
    Case(
        "class_weight negative",
        ConfigError,
        ["class_weight[1] must be a finite number >= 0, got -2"],
        arguments={"class_weight": {0: 1.0, 1: -2}},
    ),
    Case(
        "class_weight beside sample weights",
        ConfigError,
        ["class_weight", "sample weights", "one of them"],
        data=lambda spark: (*arrays(spark), np.ones(ROWS)),
        arguments={"class_weight": {0: 1.0, 1: 2.0}},
    ),
    Case(
        "class_weight beside a weight column",
        ConfigError,
        ["class_weight", "sample weights", "one of them"],
        data=frame([([1.0, 2.0, 3.0], 1.0, 0.5)] * 4, "features array<float>, label float, w float"),
        arguments={"class_weight": {0: 1.0, 1: 2.0}, "weight_col": "w"},
    ),
    Case(
        "callbacks that are none",
        ConfigError,
        ["keras.callbacks.Callback", "'early'"],
        arguments={"callbacks": ["early"]},
    ),
    Case(
        "a callback class",
        ConfigError,
        ["keras.callbacks.Callback objects", "EarlyStopping"],
        arguments={"callbacks": [keras.callbacks.EarlyStopping]},
    ),
    Case("callbacks no list", ConfigError, ["callbacks must be", "5"], arguments={"callbacks": 5}),
    Case(
        "BackupAndRestore",
        ConfigError,
        ["BackupAndRestore", "Leave it out"],
        arguments={"callbacks": [keras.callbacks.BackupAndRestore("/tmp/never")]},
    ),
    Case(
        "a callback with a lock",
        ConfigError,
        ["cannot be sent to the executors", "lock", "HoldsALock"],
        arguments={"callbacks": [HoldsALock()]},
    ),
    Case(
        "unknown keyword",
        TypeError,
        ["unexpected keyword argument 'steps_per_epoch'"],
        arguments={"steps_per_epoch": 3},
    ),
    Case("feature column a number", ConfigError, ["features_col", "5"], arguments={"features_col": 5}),
    Case("weight column a number", ConfigError, ["weight_col", "5"], arguments={"weight_col": 5}),
]
DATA = [
    Case("no data", DataError, ["NoneType", "expected arrays (x, y)"], data=lambda spark: None),
    Case("x without y", DataError, ["no labels", "(x, y)"], data=lambda spark: (np.ones((ROWS, 3)),)),
    Case("x alone", DataError, ["ndarray", "expected arrays (x, y)"], data=lambda spark: np.ones((ROWS, 3))),
    Case("empty arrays", DataError, ["0 rows"], data=lambda spark: (np.ones((0, 3)), np.ones((0, 1)))),
    Case("an empty RDD", DataError, ["no rows"], data=lambda spark: spark.sparkContext.emptyRDD()),
    Case("an RDD of empty partitions", DataError, ["no rows"], data=rdd(partitions=3)),
    Case("an empty DataFrame", DataError, ["no rows"], data=frame([])),
    Case(
        "wrong feature column",
        DataError,
        ["no column 'pixels'", "['features', 'label']"],
        data=frame([([1.0, 2.0, 3.0], 1.0)]),
        arguments={"features_col": "pixels"},
    ),
    Case(
        "wrong label column",
        DataError,
        ["no column 'target'", "['features', 'label']"],
        data=frame([([1.0, 2.0, 3.0], 1.0)]),
        arguments={"label_col": "target"},
    ),
    Case(
        "wrong weight column",
        DataError,
        ["no column 'w'"],
        data=frame([([1.0, 2.0, 3.0], 1.0)]),
        arguments={"weight_col": "w"},
    ),
    Case(
        "null in features",
        DataError,
        ["column 'features' has a null", "drop such rows"],
        data=frame([([1.0, 2.0, 3.0], 1.0), (None, 1.0)]),
    ),
    Case(
        "null in the label",
        DataError,
        ["column 'label' has a null"],
        data=frame([([1.0, 2.0, 3.0], None)]),
    ),
    Case(
        "null inside an array",
        DataError,
        ["column 'features' has a null inside a list"],
        data=frame([([1.0, 2.0, 3.0], 1.0), ([1.0, None, 3.0], 1.0)]),
    ),
    Case(
        "ragged array column",
        DataError,
        ["length 2", "length 3", "pad or cut"],
        data=lambda spark: frame([([1.0, 2.0, 3.0], 1.0), ([1.0, 2.0], 1.0)])(spark).coalesce(1),
    ),
    Case(
        "vectors of different sizes",
        DataError,
        ["length 2", "length 3"],
        data=lambda spark: spark.createDataFrame(
            [(Vectors.dense([1.0, 2.0, 3.0]), 1.0), (Vectors.dense([1.0, 2.0]), 1.0)], ["features", "label"]
        ).coalesce(1),
    ),
    Case(
        "string labels", DataError, ["y is a string", "StringIndexer"], data=lambda spark: (np.ones((2, 3)), ["a", "b"])
    ),
    Case(
        "string label column",
        DataError,
        ["column 'label' is a string", "StringIndexer"],
        data=frame([([1.0, 2.0, 3.0], "cat")], "features array<float>, label string"),
    ),
    Case(
        "string labels in an RDD",
        DataError,
        ["y is a string", "row 0", "partition"],
        data=rdd((np.ones(3), "cat")),
    ),
    Case(
        "x and y of different lengths",
        DataError,
        ["x has 8 rows", "y has 7"],
        data=lambda spark: (np.ones((8, 3)), np.ones(7)),
    ),
    Case(
        "a row of another shape in an RDD",
        DataError,
        ["row 2", "partition 1", "(4,)", "(3,)"],
        data=rdd(*[GOOD_ROW] * 5, (np.ones(4), 1.0)),
    ),
    Case(
        "partitions of different shapes",
        DataError,
        ["(3,) in the rows of rank", "(4,) in the rows of rank", "mend the map function"],
        data=rdd((np.ones(3), 1.0), (np.ones(4), 1.0)),
    ),
    Case("rows that are no tuples", DataError, ["ndarray", "expected a tuple (x, y)", "row 0"], data=rdd(np.ones(3))),
    Case("rows of four parts", DataError, ["tuple of length 4", "expected a tuple (x, y)"], data=rdd((1, 2, 3, 4))),
    Case("None in a row", DataError, ["x is None", "row 0"], data=rdd((None, 1.0))),
    Case("rows without a label", DataError, ["y is None"], data=rdd((np.ones(3), None))),
    Case("ragged lists", DataError, ["x is ragged"], data=lambda spark: ([[1, 2, 3], [1, 2]], [0, 1])),
    Case("dates", DataError, ["datetime64", "numbers"], data=lambda spark: (np.array(["2020-01-01"], "M8[D]"), [1])),
    Case(
        "a date column",
        DataError,
        ["column 'd'", "numbers"],
        data=frame([(None, 1.0)], "d date, label float"),
        arguments={"features_col": "d"},
    ),
    Case(
        "a list of dicts",
        DataError,
        ["list", "expected arrays (x, y)"],
        data=lambda spark: [{"x": [1.0, 2.0, 3.0], "y": 1.0}] * 5,
    ),
    Case(
        "two dicts in a list",
        DataError,
        ["x['y'] is a single value, not an array of rows"],
        data=lambda spark: [{"x": [1.0, 2.0, 3.0], "y": 1.0}] * 2,
    ),
    Case(
        "a pandas DataFrame",
        DataError,
        ["pandas", "createDataFrame"],
        data=lambda spark: pandas.DataFrame({"a": [1.0], "label": [1.0]}),
    ),
    Case("a path", DataError, ["str", "expected arrays (x, y)"], data=lambda spark: "/data/rows.parquet"),
    Case(
        "empty validation arrays",
        DataError,
        ["validation", "0 rows"],
        arguments={"validation_data": (np.ones((0, 3)), np.ones((0, 1)))},
    ),
    Case(
        "an empty validation RDD",
        DataError,
        ["validation data has no rows"],
        data=rdd(*[GOOD_ROW] * 4),
        arguments={"validation_data": rdd()},
    ),
    Case(
        "validation rows of another shape",
        DataError,
        ["validation", "(4,)", "(3,)"],
        arguments={"validation_data": (np.ones((2, 4)), np.ones((2, 1)))},
    ),
]
FIT = [
    Case(
        "rows that do not fit the model",
        DataError,
        ["x has rows of shape (4,)", "(3,)"],
        data=lambda spark: (np.ones((ROWS, 4)), np.ones(ROWS)),
    ),
    Case(
        "images for a model of vectors",
        DataError,
        ["x has rows of shape (8, 8)", "(64,)"],
        data=lambda spark: (np.ones((ROWS, 8, 8)), np.ones(ROWS)),
        model=lambda: compiled(features=64),
    ),
    Case(
        "a DataFrame that does not fit the model",
        DataError,
        ["(2,)", "(3,)"],
        data=frame([([1.0, 2.0], 1.0)] * 4),
    ),
    Case(
        "one array for two inputs",
        DataError,
        ["2 inputs", "'left'", "'right'"],
        model=with_two_inputs,
    ),
    Case(
        "inputs of other names",
        DataError,
        ["'left'", "'wrong'"],
        model=with_two_inputs,
        data=lambda spark: ({"wrong": np.ones((ROWS, 3)), "right": np.ones((ROWS, 2))}, np.ones(ROWS)),
    ),
    Case(
        "strings for a model of numbers",
        DataError,
        ["string", "float32"],
        data=lambda spark: (np.array([["a", "b", "c"]] * 4), np.ones(4)),
    ),
]


def classifier(loss: str) -> Callable[[], Any]:
    def build() -> keras.Model:
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, "softmax")])
        model.compile("sgd", loss)
        return model

    return build


def labelled(*labels: Any) -> Callable[[SparkSession], Any]:
    return lambda spark: (np.ones((len(labels), 3), "float32"), np.array(labels))


SPARSE, ONE_HOT = classifier("sparse_categorical_crossentropy"), classifier("categorical_crossentropy")
CLASSES = [
    Case("labels from 1", DataError, ["label 4 in row 3", "4 classes, 0 to 3"], labelled(1, 2, 3, 4), SPARSE),
    Case("a label below 0", DataError, ["label -1 in row 1", "renumber"], labelled(0, -1), SPARSE),
    Case("a label that is NaN", DataError, ["label nan in row 1"], labelled(0.0, np.nan), SPARSE),
    Case(
        "labels to validate on",
        DataError,
        ["label 9 in row 0"],
        labelled(0, 1),
        SPARSE,
        arguments={"validation_data": (np.ones((1, 3)), np.array([9]))},
    ),
    Case(
        "one-hot labels for a sparse loss",
        DataError,
        ["takes class indices", "model with CategoricalCrossentropy", "argmax"],
        labelled([0.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]),
        SPARSE,
    ),
    Case(
        "class indices for a one-hot loss",
        DataError,
        ["takes one number per class", "SparseCategoricalCrossentropy", "to_categorical"],
        labelled(0, 1),
        ONE_HOT,
    ),
    Case(
        "class indices of an RDD for a one-hot loss",
        DataError,
        ["takes one number per class"],
        rdd((np.ones(3), 1), (np.ones(3), 2)),
        ONE_HOT,
    ),
]


@pytest.fixture
def let_go(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Everything that was ever sent to ranks to let them start."""
    formed: list[Any] = []

    def form_group(*arguments: Any) -> Any:
        formed.append(arguments)
        return group.form_group(*arguments)

    monkeypatch.setattr(controller, "form_group", form_group)
    return formed


def fit(case: Case, spark: SparkSession) -> Any:
    arguments = {"verbose": 0, **case.arguments}
    if callable(arguments.get("validation_data")):
        arguments["validation_data"] = arguments["validation_data"](spark)
    return SparkModel(case.model(), num_ranks=case.num_ranks).fit(case.data(spark), **arguments)


@pytest.mark.parametrize("case", [*MODELS, *RANKS, *SETTINGS, *DATA, *FIT, *CLASSES], ids=lambda case: case.name)
def test_what_cannot_work_is_refused_before_any_rank_starts(case: Case, spark: SparkSession, let_go: list[Any]) -> None:
    with pytest.raises(case.error) as caught:
        fit(case, spark)
    assert [part for part in case.says if part not in str(caught.value)] == []
    assert let_go == []


def test_more_ranks_than_slots_is_refused_at_once_and_not_after_minutes(spark: SparkSession) -> None:
    started_at = time.monotonic()
    with pytest.raises(ConfigError, match=r"num_ranks=64 needs 64 slots at once, but this Spark application has 2"):
        SparkModel(compiled(), num_ranks=64).fit(arrays(spark))
    assert time.monotonic() - started_at < 2


def test_a_callback_that_holds_the_spark_context_is_named(spark: SparkSession) -> None:
    with pytest.raises(ConfigError, match=r"HoldsSpark.* cannot be sent to the executors"):
        SparkModel(compiled()).fit(arrays(spark), callbacks=[HoldsSpark(spark.sparkContext)], verbose=0)


def test_without_a_spark_session_nothing_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SparkContext, "_active_spark_context", None)
    for call in (SparkModel(compiled()).fit, SparkModel(compiled()).evaluate, SparkModel(compiled()).predict):
        with pytest.raises(ConfigError, match=r"no active Spark session.*getOrCreate"):
            call((np.ones((2, 3)), np.ones(2)))


def test_dynamic_allocation_is_refused(spark: SparkSession) -> None:
    settings = spark.sparkContext._conf
    settings.set("spark.dynamicAllocation.enabled", "true")
    try:
        with pytest.raises(ConfigError, match=r"dynamicAllocation.enabled is true.*Set it to false"):
            SparkModel(compiled()).fit(arrays(spark))
    finally:
        settings.set("spark.dynamicAllocation.enabled", "false")


def test_words_among_the_loss_weights_are_dropped_with_a_warning_and_fit_works(spark: SparkSession) -> None:
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse", ["acc"])
    with pytest.warns(UserWarning, match=r"loss_weights=\['acc'\].*pass metrics by name"):
        spark_model = SparkModel(model, num_ranks=2)
    assert np.isfinite(spark_model.fit(arrays(spark), verbose=0).history["loss"][0])


INFERENCE = [
    Case("predict of nothing", DataError, ["no rows"], data=lambda spark: spark.sparkContext.emptyRDD()),
    Case("predict of empty arrays", DataError, ["0 rows"], data=lambda spark: np.ones((0, 3))),
    Case("predict without weights", ConfigError, ["no weights yet", "fit it first"], model=unbuilt),
    Case("predict with batch_size 0", ConfigError, ["batch_size must be"], arguments={"batch_size": 0}),
    Case(
        "predict of a wrong column",
        DataError,
        ["no column 'features'", "['f']"],
        data=frame([([1.0],)], "f array<float>"),
    ),
    Case(
        "predict of rows that do not fit the model",
        DataError,
        ["x has rows of shape (4,)", "(3,)"],
        data=lambda spark: np.ones((ROWS, 4)),
    ),
    Case(
        "predict of ragged rows",
        DataError,
        ["row 1", "(3,)", "(4,)"],
        data=rdd(np.ones(3), np.ones(4), partitions=1),
    ),
]


@pytest.mark.parametrize("case", INFERENCE, ids=lambda case: case.name)
def test_what_cannot_be_predicted_is_refused(case: Case, spark: SparkSession) -> None:
    with pytest.raises(case.error) as caught:
        SparkModel(case.model()).predict(case.data(spark), **case.arguments)
    assert [part for part in case.says if part not in str(caught.value)] == []


def test_evaluate_without_labels_is_refused(spark: SparkSession) -> None:
    with pytest.raises(DataError, match="no labels"):
        SparkModel(compiled()).evaluate((np.ones((ROWS, 3)),))
