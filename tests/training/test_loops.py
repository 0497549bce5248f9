"""Loops of one's own: what is said where XLA, or a loss that is scaled, would be in the way of the other ranks."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from allreduce_spark.communicator.local import LocalGroup
from allreduce_spark.errors import ConfigError
from allreduce_spark.training.__main__ import _cause
from allreduce_spark.training.loops import DistributedOptimizer

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
