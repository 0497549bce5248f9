"""Through Spark, agents and MPI processes with Keras on JAX and on PyTorch; `tests/test_keras_backends.py` runs it for each."""

from __future__ import annotations

import sys

import cloudpickle
import keras
import numpy as np
import pytest
from pyspark import cloudpickle as spark_cloudpickle

from allreduce_spark import AllReduceTransformer, Checkpoint, DistributedOptimizer, SparkModel, broadcast, run
from allreduce_spark.errors import ConfigError

pytestmark = pytest.mark.spark
layers = keras.layers

for pickler in (cloudpickle, spark_cloudpickle):
    pickler.register_pickle_by_value(sys.modules[__name__])


def rows_of(count, seed=0):
    x = np.random.default_rng(seed).normal(size=(count, 8)).astype("float32")
    return x, (x[:, 0] + x[:, 1] > 0).astype("int64")


def compiled(*, normalize=False):
    keras.utils.set_random_seed(3)
    middle = [layers.BatchNormalization(), layers.Dropout(0.2, seed=1)] if normalize else []
    model = keras.Sequential(
        [keras.Input((8,)), layers.Dense(8, "tanh"), *middle, layers.Dense(2, activation="softmax")]
    )
    model.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


class LooksAround(keras.callbacks.Callback):
    """What a rank computes with is what the driver does."""

    def __init__(self, expected):
        super().__init__()
        self._expected = expected

    def on_train_end(self, logs=None):
        assert keras.backend.backend() == self._expected


def test_ranks_end_where_plain_keras_ends_and_workers_predict_and_evaluate_with_the_same_backend(spark):
    x, y = rows_of(101)
    plain, ours = compiled(), compiled()
    # Rows are dealt out one by one, so two unshuffled ranks with 8 rows each have the global batches of one with 16.
    arguments = {"epochs": 2, "shuffle": False, "verbose": 0, "validation_data": rows_of(30, seed=1)}
    theirs = plain.fit(x, y, batch_size=16, **arguments).history
    users = [LooksAround(keras.backend.backend())]
    model = SparkModel(ours, num_ranks=2)
    history = model.fit((x, y), batch_size=8, callbacks=users, **arguments).history
    for variable, weight, expected in zip(plain.weights, ours.get_weights(), plain.get_weights(), strict=True):
        assert np.abs(weight - expected).max() < 1e-5 * np.abs(expected).max(), variable.path
    assert history.keys() == theirs.keys()
    for name, values in theirs.items():
        np.testing.assert_allclose(history[name], values, rtol=1e-4, err_msg=name)

    expected = ours.predict(x, verbose=0)
    np.testing.assert_allclose(model.predict(x), expected, rtol=1e-5, atol=1e-6)
    results = ours.evaluate(x, y, return_dict=True, verbose=0)
    assert model.evaluate((x, y)) == pytest.approx(results, rel=1e-4)
    frame = spark.createDataFrame([(row.tolist(),) for row in x[:20]], "features array<float>").repartition(2)
    rows = AllReduceTransformer(ours).transform(frame).collect()
    expected = ours.predict(np.float32([row["features"] for row in rows]), verbose=0)
    assert [row["prediction"] for row in rows] == expected.argmax(axis=-1).tolist()
    assert len(rows) == 20


def test_a_fit_with_moving_statistics_is_resumed_from_its_store(spark, tmp_path):
    data, model = rows_of(75), compiled(normalize=True)
    arguments = {"batch_size": 8, "validation_split": 0.2, "seed": 1, "verbose": 0}
    arguments |= {"checkpoint": Checkpoint(path=str(tmp_path), every_steps=3), "resume": "auto"}
    SparkModel(model, num_ranks=2).fit(data, epochs=1, **arguments)
    assert np.abs(model.layers[1].moving_mean.numpy()).max() > 0
    again = compiled(normalize=True)
    history = SparkModel(again, num_ranks=2).fit(data, epochs=2, **arguments)
    assert history.epoch == [0, 1]
    assert set(history.history) == {"accuracy", "loss", "val_accuracy", "val_loss"}
    assert int(again.optimizer.iterations.numpy()) == 2 * int(model.optimizer.iterations.numpy())


def train(communicator):
    model = compiled()
    broadcast(model, communicator)
    optimizer = DistributedOptimizer(keras.optimizers.SGD(0.1), communicator)
    model.compile(optimizer, "sparse_categorical_crossentropy")
    x, y = rows_of(32)
    mine = slice(communicator.rank, None, communicator.world_size)
    model.fit(x[mine], y[mine], batch_size=16, shuffle=False, verbose=0)
    return [*model.get_weights(), keras.ops.convert_to_numpy(keras.ops.ones(1, "float64"))]


def test_a_loop_of_ones_own_takes_the_step_of_all_rows_with_the_types_of_the_driver(spark, request):
    x, y = rows_of(32)
    model = compiled()
    model.compile(keras.optimizers.SGD(0.1), "sparse_categorical_crossentropy")
    model.fit(x, y, batch_size=32, shuffle=False, verbose=0)
    if keras.backend.backend() == "jax":
        import jax

        jax.config.update("jax_enable_x64", True)
        request.addfinalizer(lambda: jax.config.update("jax_enable_x64", False))
    for *weights, wide in run(train, num_ranks=2, backend="auto"):
        assert wide.dtype == np.float64
        for ours, expected in zip(weights, model.get_weights(), strict=True):
            np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


def test_horovod_is_refused_before_anything_starts(spark):
    with pytest.raises(ConfigError, match="Keras runs on"):
        SparkModel(compiled(), backend="horovod")
