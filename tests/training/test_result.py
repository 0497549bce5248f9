"""What the root hands over is what Keras would have left in the user's model and history."""

from __future__ import annotations

import keras
import numpy as np

from allreduce_spark.data.spec import LeafSpec, RowSpec
from allreduce_spark.training.result import take_over, write_result


def test_a_metric_with_one_number_per_class_is_an_array_in_the_history(tmp_path):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3, "softmax")])
    model.compile("sgd", "categorical_crossentropy", metrics=[keras.metrics.F1Score()])
    history = model.fit(np.zeros((6, 2), "f4"), np.eye(3)[[0, 1, 2, 0, 1, 2]], epochs=2, verbose=0)
    write_result(model, history, RowSpec(LeafSpec("x", "float32", (2,))), tmp_path / "result")
    taken = take_over(model, tmp_path / "result")
    assert taken.history["loss"] == history.history["loss"]
    for ours, theirs in zip(taken.history["f1_score"], history.history["f1_score"], strict=True):
        np.testing.assert_array_equal(ours, theirs)
