"""The all-reduce inside `apply`, on ranks that are threads: what it keeps from step to step."""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf
from exactness import on_ranks

from allreduce_spark.training import optimizer
from allreduce_spark.training.optimizer import GradientReducer, StepRows


def test_steps_that_run_as_they_are_written_share_two_buffers_and_spoil_no_result(monkeypatch):
    made = []

    class Counted(optimizer.FlatBuffer):
        def __init__(self, arrays):
            made.append(len(arrays))
            super().__init__(arrays)

    monkeypatch.setattr(optimizer, "FlatBuffer", Counted)

    def on_rank(communicator, _):
        reduce = GradientReducer(communicator, StepRows(1, 2))
        # More than two of one form, as where a step applies several times, and one of another.
        results = [reduce([tf.fill((4, 32), float(number)), tf.fill((3,), 1.0)]) for number in range(5)]
        return results, reduce([tf.fill((7,), 8.0)])

    for results, (other,) in on_ranks(on_rank, 0, 1):
        for number, (whole, _) in enumerate(results):
            np.testing.assert_array_equal(keras.ops.convert_to_numpy(whole), np.full((4, 32), number))
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(other), np.full(7, 8))
    assert sorted(made) == [1] * 2 * 2 + [2] * 2 * 2
