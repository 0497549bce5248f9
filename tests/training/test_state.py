"""What is collected from a rank, beyond what a resumed fit shows by its bits (see test_resume)."""

from __future__ import annotations

import keras
import numpy as np

from allreduce_spark.communicator.local import LocalGroup
from allreduce_spark.training.memory import CallbackMemory
from allreduce_spark.training.state import Position, RankState, SavedState


def half_precision_state(wide):
    """A model with a bfloat16 variable, of which all ranks have agreed on a value that it cannot hold."""
    model = keras.Sequential([keras.Input((2,)), keras.layers.BatchNormalization(dtype="bfloat16")])
    model.compile("sgd", "mse")
    model.optimizer.build(model.trainable_variables)
    (alone,) = LocalGroup(1, timeout_s=10).communicators
    history = keras.callbacks.History()
    history.epoch = []
    variable = model.layers[0].moving_mean
    variable.assign(wide)
    return RankState(model, alone, [(variable, wide)], CallbackMemory({}), history)


def test_what_ranks_have_agreed_on_comes_back_wider_than_the_variable():
    wide = np.array([1.0001, -3.0002], np.float32)
    arrays, about = half_precision_state(wide).collect(Position(1, 2))
    arrays = {name: np.array(array) for name, array in arrays.items()}
    shared = {name: array for name, array in arrays.items() if name.startswith("shared/")}
    fresh = np.zeros(2, np.float32)
    half_precision_state(fresh).restore(SavedState(Position(1, 2), 1, shared, arrays, True, about, [[]]))
    np.testing.assert_array_equal(fresh, wide)


def test_names_of_checkpoints_sort_as_positions_do():
    positions = [Position(0, 1), Position(0, 10), Position(1), Position(1, 3), Position(10, 2)]
    assert positions == sorted(positions)
    assert [position.id for position in positions] == sorted(position.id for position in positions)
