"""Loops of one's own: what is said where XLA, or a loss that is scaled, would be in the way of the other ranks."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from exactness import on_ranks

from allreduce_spark.communicator.local import LocalGroup
from allreduce_spark.errors import ConfigError
from allreduce_spark.training.__main__ import _cause
from allreduce_spark.training.loops import DistributedOptimizer, broadcast, shard_dataset

X = np.ones((8, 3), "float32")


@pytest.fixture
def communicator():
    """That of rank 0 of 2."""
    return LocalGroup(2, timeout_s=5).communicators[0]


def test_a_model_that_xla_is_to_compile_fails_with_the_setting_that_helps(communicator):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile(DistributedOptimizer(keras.optimizers.SGD(), communicator), "mse", jit_compile=True)
    with pytest.raises(Exception, match="unsupported operations") as raised:
        model.fit(X, X[:, :1], verbose=0)
    assert _cause(raised.value).startswith("XLA knows no way out of its graph to the other ranks")
    assert "jit_compile=False" in _cause(raised.value)
    assert _cause(ValueError("no")).startswith("ValueError: no\n")


def test_with_mixed_float16_only_an_optimizer_that_scales_the_loss_is_distributed(communicator):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        with pytest.raises(
            ConfigError, match=r"DistributedOptimizer\(keras\.optimizers\.LossScaleOptimizer\(optimizer\)"
        ):
            DistributedOptimizer(keras.optimizers.SGD(), communicator)
        scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD())
        assert DistributedOptimizer(scaled, communicator) is scaled
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        model.compile(scaled, "mse")
        assert model.optimizer is scaled, "Keras has put nothing around it"
    finally:
        keras.config.set_dtype_policy(before)


def normalized(seed, policy="float32"):
    keras.utils.set_random_seed(seed)
    layers = keras.layers
    moving = layers.BatchNormalization(momentum=0.5, name="moving")
    dropout = layers.Dropout(0.5, seed=seed)
    return keras.Sequential([keras.Input((3,)), layers.Dense(4, dtype=policy), moving, dropout, layers.Dense(1)])


@pytest.mark.parametrize("own_loop", [False, True])
def test_statistics_of_a_model_that_is_given_are_the_mean_of_the_ranks(own_loop):
    import tensorflow as tf

    models = [normalized(seed) for seed in range(3)]
    models[0].get_layer("moving").set_weights([w + 1 for w in models[0].get_layer("moving").get_weights()])
    x = np.random.default_rng(0).normal(size=(3, 8, 3)).astype("float32")

    def train(communicator, model):
        broadcast(model, communicator)
        optimizer = DistributedOptimizer(keras.optimizers.SGD(0.1), communicator, model=model)
        rows = x[communicator.rank]
        kernel, bias = model.layers[0].get_weights()
        if own_loop:
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(model(rows, training=True)))
            optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
        else:
            model.compile(optimizer, "mse", jit_compile=False)
            model.fit(rows, rows[:, :1], batch_size=8, verbose=0)
        return (rows @ kernel + bias).mean(axis=0), model.get_weights()

    (first, weights), (second, others), (third, _) = on_ranks(train, *models)
    for ours, theirs in zip(weights, others, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    moving = models[0].get_layer("moving").moving_mean.numpy()
    np.testing.assert_allclose(moving, 0.5 * 1 + 0.5 * (first + second + third) / 3, rtol=1e-4, atol=1e-6)


def test_a_model_without_variables_is_refused(communicator):
    model = keras.Sequential([keras.layers.Dense(1)])
    with pytest.raises(ConfigError, match="has no variables yet"):
        DistributedOptimizer(keras.optimizers.SGD(), communicator, model=model)


@pytest.mark.parametrize("is_given", [False, True])
def test_a_model_that_scales_the_loss_around_the_distributed_optimizer_is_refused_before_any_rank_waits(is_given):
    def policy_of_its_own():
        model = Own(dtype="mixed_float16")
        model(X)
        return model

    def train(communicator, model):
        optimizer = DistributedOptimizer(keras.optimizers.SGD(), communicator, model=model if is_given else None)
        model.compile(optimizer, "mse", jit_compile=False)
        assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
        model.fit(X, X[:, :1], verbose=0)

    with pytest.raises(ConfigError, match=r"LossScaleOptimizer\(optimizer\), communicator"):
        on_ranks(train, policy_of_its_own(), policy_of_its_own())


class Own(keras.Model):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.dense = keras.layers.Dense(1, dtype=self.dtype_policy)

    def call(self, x):
        return self.dense(x)


def test_each_rank_keeps_the_states_of_its_random_generators_when_weights_are_broadcast():
    models = [normalized(seed) for seed in range(2)]
    states = [model.layers[2].seed_generator.state.numpy() for model in models]
    assert not np.array_equal(*states)
    on_ranks(lambda communicator, model: broadcast(model, communicator), *models)
    for ours, theirs in zip(*(model.get_weights() for model in models), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for model, before in zip(models, states, strict=True):
        np.testing.assert_array_equal(model.layers[2].seed_generator.state.numpy(), before)


@pytest.mark.parametrize("rows", [X, [1, 2], None])
def test_what_is_no_data_set_of_tensorflow_is_refused_with_what_to_do_of_arrays(communicator, rows):
    with pytest.raises(ConfigError, match=r"got .*rows\[communicator.rank :: communicator.world_size\]"):
        shard_dataset(rows, communicator)
