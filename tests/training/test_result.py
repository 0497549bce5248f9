"""What the root hands over is what Keras would have left in the user's model and history."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from allreduce_spark.data.spec import LeafSpec, RowSpec
from allreduce_spark.training.result import build_like, least_bytes, take_over, write_result


def test_a_metric_with_one_number_per_class_is_an_array_in_the_history(tmp_path):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3, "softmax")])
    model.compile("sgd", "categorical_crossentropy", metrics=[keras.metrics.F1Score()])
    history = model.fit(np.zeros((6, 2), "f4"), np.eye(3)[[0, 1, 2, 0, 1, 2]], epochs=2, verbose=0)
    write_result(model, history, RowSpec(LeafSpec("x", "float32", (2,))), tmp_path / "result")
    taken = take_over(model, tmp_path / "result")
    assert taken.history["loss"] == history.history["loss"]
    for ours, theirs in zip(taken.history["f1_score"], history.history["f1_score"], strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    "optimizer",
    [
        keras.optimizers.Adam(),
        keras.optimizers.SGD(),
        keras.optimizers.SGD(keras.optimizers.schedules.ExponentialDecay(0.1, 9, 0.9), momentum=0.9),
        keras.optimizers.AdamW(use_ema=True, gradient_accumulation_steps=2),
        keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam()),
    ],
    ids=lambda optimizer: type(optimizer).__name__,
)
def test_the_size_of_what_is_handed_over_is_known_before_the_optimizer_has_any_state(tmp_path, optimizer):
    spec = RowSpec(LeafSpec("x", "float32", (200,)))
    model = keras.Sequential([keras.Input((200,)), keras.layers.Dense(300), keras.layers.Dense(1, dtype="bfloat16")])
    model.compile(optimizer, "mse")
    before = least_bytes(model)
    assert not model.optimizer.built
    build_like(model, spec)
    history = keras.callbacks.History()
    history.on_train_begin()
    write_result(model, history, spec, tmp_path / "result")
    size = (tmp_path / "result").stat().st_size
    assert 0.97 * size < before <= least_bytes(model) <= size


def test_state_of_another_shape_than_the_weights_is_left_out_of_that_size(tmp_path):
    model = keras.Sequential([keras.Input((200,)), keras.layers.Dense(300)])
    model.compile(keras.optimizers.Adafactor(), "mse")
    before = least_bytes(model)
    build_like(model, RowSpec(LeafSpec("x", "float32", (200,))))
    assert 200 * 300 * 4 < before <= least_bytes(model)
