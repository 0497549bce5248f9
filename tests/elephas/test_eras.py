"""The constructors of every era of Elephas lead to the same few settings."""

from __future__ import annotations

import json
import warnings
from typing import Any

import keras
import pytest
from pyspark import SparkContext

from allreduce_spark.elephas.eras import Arguments, read_arguments, sync_every_of
from allreduce_spark.elephas.gone import tell_about_optimizers
from allreduce_spark.elephas.optimizers import Adagrad
from allreduce_spark.elephas.spark_model import AsynchronousSparkModel, SparkMLlibModel, SparkModel
from allreduce_spark.errors import ConfigError

MODEL = "the model"
CONTEXT: Any = object.__new__(SparkContext)  # never started: its type is all that counts


def read(*args: Any, asynchronous: bool = False, **kwargs: Any) -> tuple[Any, ...]:
    found = read_arguments(args, kwargs, asynchronous=asynchronous)
    assert found.model is MODEL
    return found.num_workers, str(found.mode.value), str(found.frequency.value), found.batch_size


@pytest.mark.parametrize(
    ("args", "kwargs", "expected"),
    [
        # 0.1 to 0.3
        ((CONTEXT, MODEL), {}, (4, "asynchronous", "epoch", 32)),
        ((CONTEXT, MODEL, None, "synchronous", "batch", 2), {}, (2, "synchronous", "batch", 32)),
        ((), {"sc": CONTEXT, "master_network": MODEL, "num_workers": 3}, (3, "asynchronous", "epoch", 32)),
        # 0.4 to 6.2
        ((MODEL, "hogwild"), {}, (None, "hogwild", "epoch", 32)),
        ((MODEL, "asynchronous", "batch", "socket", 2, None, 64, 4001), {}, (2, "asynchronous", "batch", 64)),
        ((MODEL,), {"frequency": "epoch", "num_workers": 2}, (2, "asynchronous", "epoch", 32)),
        ((MODEL,), {"mode": "synchronous", "frequency": "epoch"}, (None, "synchronous", "epoch", 32)),
        # from 7.0
        ((MODEL,), {}, (None, "synchronous", "epoch", 32)),
        ((MODEL, 2, None, 16), {}, (2, "synchronous", "epoch", 16)),
        ((MODEL, None), {}, (None, "synchronous", "epoch", 32)),
        ((), {"model": MODEL, "num_workers": 2}, (2, "synchronous", "epoch", 32)),
        ((MODEL, 2), {"mode": "hogwild"}, (2, "hogwild", "epoch", 32)),
    ],
)
def test_arguments_are_read_as_in_the_era_they_are_from(
    args: tuple[Any, ...], kwargs: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    assert read(*args, **kwargs) == expected


def test_an_asynchronous_model_is_so_by_itself_and_takes_its_mode_by_place() -> None:
    assert read(MODEL, 2, asynchronous=True) == (2, "asynchronous", "epoch", 32)
    assert read(MODEL, 2, None, 8, "hogwild", "batch", "socket", 4001, asynchronous=True) == (2, "hogwild", "batch", 8)


def test_a_word_that_is_none_of_elephas_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"mode must be one of \['synchronous', 'asynchronous', 'hogwild'\], got 'async'"
    ):
        read_arguments((MODEL, "async"), {})
    with pytest.raises(ConfigError, match="frequency must be one of"):
        read_arguments((MODEL,), {"frequency": "step"})


def test_only_epochs_of_asynchronous_modes_are_local_steps() -> None:
    def sync_every(mode: str, frequency: str) -> int | str:
        found: Arguments = read_arguments((MODEL, mode, frequency), {})
        return sync_every_of(found.mode, found.frequency)

    assert [sync_every("synchronous", word) for word in ("batch", "epoch")] == [1, 1]
    assert [sync_every("asynchronous", word) for word in ("batch", "epoch")] == [1, "epoch"]
    assert [sync_every("hogwild", word) for word in ("batch", "epoch")] == [1, "epoch"]


def regression() -> keras.Model:
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile("adam", "mse", metrics=["mae"])
    return model


def test_what_is_given_is_what_the_configuration_says_as_in_elephas() -> None:
    assert SparkModel(regression(), 2, foo="bar").get_config() == {"num_workers": 2, "batch_size": 32, "foo": "bar"}
    older = {"parameter_server_mode": "http", "mode": "hogwild", "frequency": "epoch"}
    assert SparkModel(regression(), "hogwild").get_config() == {"num_workers": None, "batch_size": 32, **older}
    asynchronous = AsynchronousSparkModel(regression(), frequency="batch", port=4001, foo=1)
    assert json.loads(json.dumps(asynchronous.get_config())) == {
        "num_workers": None,
        "batch_size": 32,
        "parameter_server_mode": "http",
        "mode": "asynchronous",
        "frequency": "batch",
        "foo": 1,
    }


def test_the_attributes_of_elephas_are_there() -> None:
    model = regression()
    spark_model = SparkMLlibModel(model, mode="synchronous", custom_objects={"a": len})
    assert spark_model.master_network is spark_model.get_network() is model
    assert spark_model.custom_objects == {"a": len}
    assert spark_model.master_optimizer is model.optimizer
    assert (spark_model.master_loss, spark_model.master_metrics) == ("mse", ["mae"])
    assert [weight.shape for weight in spark_model.weights] == [(3, 1), (1,)]
    assert set(spark_model.serialized_model) == {"model", "weights"}
    assert spark_model.training_histories == []
    other = regression()
    spark_model.master_network = other
    assert spark_model.get_network() is other
    spark_model.set_network(model)
    assert spark_model.master_network is model


def test_a_model_that_is_not_compiled_is_refused_in_the_words_of_elephas() -> None:
    with pytest.raises(Exception, match=r"^Compile your Keras model before initializing an Elephas model with it$"):
        SparkModel(keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)]))
    with pytest.raises(ConfigError, match="not compiled"):
        SparkModel(regression()).set_network(keras.Sequential([keras.layers.Dense(1)]))


def test_an_optimizer_for_the_server_is_not_used_and_this_is_said_once() -> None:
    tell_about_optimizers.cache_clear()
    with pytest.warns(UserWarning, match="the optimizer that was given to SparkModel is not used") as caught:
        SparkModel(CONTEXT, regression(), optimizer=Adagrad(), mode="synchronous")
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SparkModel(CONTEXT, regression(), optimizer=Adagrad())
