"""What callbacks remember goes through JSON and arrays unharmed; their settings, and what is no plain data, stay out of it."""

from __future__ import annotations

import copy
import json
import math

import keras
import ml_dtypes
import numpy as np
import pytest

from allreduce_spark.errors import ConfigError
from allreduce_spark.training.memory import CallbackMemory
from allreduce_spark.training.plain import NotPlain, pack, unpack


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        2**70,
        -0.0,
        math.inf,
        "ü\n",
        [1, (2, [3.5, None])],
        {"a": {1: "x", None: [True]}, 2.5: ()},
        np.float32(0.1),
        np.arange(6, dtype=np.int16).reshape(2, 3),
        np.array(3.0),
        {"large": np.arange(1000.0), "half": [np.ones((30, 30), ml_dtypes.bfloat16)]},
        np.ones(2, ml_dtypes.bfloat16),
        [np.zeros((0, 3)), {"k": np.bool_(True)}],
    ],
    ids=str,
)
def test_plain_values_come_back_with_their_types(value):
    arrays = {}
    packed = json.loads(json.dumps(pack(value, "name", arrays)))
    assert all(name.startswith("name") for name in arrays)
    back = unpack(packed, arrays)
    assert_same(back, value)


def assert_same(one, other):
    assert type(one) is type(other)
    if isinstance(other, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    elif isinstance(other, dict):
        assert list(one) == list(other)
        for key in other:
            assert_same(one[key], other[key])
    elif isinstance(other, (np.ndarray, np.generic)):
        assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
    else:
        assert repr(one) == repr(other)


@pytest.mark.parametrize("value", [object(), {1}, [len], np.array(["text"]), np.array([None]), {(1, 2): 3}], ids=str)
def test_what_is_not_plain_is_refused(value):
    with pytest.raises(NotPlain):
        pack(value, "name", {})


def moved(callback, fresh, change):
    """Let `callback` remember something, and give it to `fresh`, by JSON and arrays."""
    memory = CallbackMemory({3: callback})
    change(callback)
    arrays = {}
    collected = json.loads(json.dumps(memory.collect(arrays, "own/callbacks")))
    arrays = {name: np.array(array) for name, array in arrays.items()}
    CallbackMemory({3: fresh}).restore(collected, arrays, "own/callbacks", memory.best_weights())
    return collected


def test_memory_is_restored_and_settings_are_the_new_ones():
    def change(callback):
        callback.wait, callback.best, callback.best_weights = 2, 0.25, [np.ones(3), np.zeros((30, 40))]

    fresh = keras.callbacks.EarlyStopping(patience=7)
    collected = moved(keras.callbacks.EarlyStopping(patience=3), fresh, change)
    assert (fresh.wait, fresh.best, fresh.patience) == (2, 0.25, 7)
    np.testing.assert_array_equal(fresh.best_weights[1], np.zeros((30, 40)))
    assert set(collected["3"]["attributes"]) == {"wait", "best"}


class OwnStopping(keras.callbacks.EarlyStopping):
    pass


def test_best_weights_are_apart_only_where_all_ranks_have_the_same():
    def change(callback):
        callback.best_weights = [np.zeros((30, 40))]

    of_the_root = keras.callbacks.EarlyStopping()
    of_the_root.root_only = True
    for callback in (OwnStopping(), of_the_root):
        fresh = copy.copy(callback)
        collected = moved(callback, fresh, change)
        assert set(collected["3"]["attributes"]) == {"best_weights"}
        np.testing.assert_array_equal(fresh.best_weights[0], np.zeros((30, 40)))


def test_best_weights_that_were_none_are_none_again():
    fresh = keras.callbacks.EarlyStopping()
    fresh.best_weights = [np.ones(3)]
    moved(keras.callbacks.EarlyStopping(), fresh, lambda callback: None)
    assert fresh.best_weights is None


def test_what_had_not_changed_becomes_again_what_it_was_at_first():
    fresh = keras.callbacks.ReduceLROnPlateau()
    memory = CallbackMemory({0: fresh})
    fresh.wait = 5  # as a callback may do when training begins
    memory.restore(CallbackMemory({0: keras.callbacks.ReduceLROnPlateau()}).collect({}, "x"), {}, "x", {})
    assert fresh.wait == 0


def test_an_array_that_was_changed_in_place_has_changed():
    class Total(keras.callbacks.Callback):
        def __init__(self):
            super().__init__()
            self.total = np.zeros(2)

    def change(callback):
        callback.total += 1

    fresh = Total()
    moved(Total(), fresh, change)
    np.testing.assert_array_equal(fresh.total, [1, 1])


def test_a_state_that_is_no_plain_data_is_refused_by_name():
    class Bad(keras.callbacks.Callback):
        def get_state(self):
            return {"file": object()}

        def set_state(self, state):
            raise AssertionError("not reached")

    with pytest.raises(ConfigError, match=r"get_state\(\) of the callback Bad"):
        CallbackMemory({0: Bad()}).collect({}, "x")


def test_a_callback_of_another_class_starts_anew():
    fresh = keras.callbacks.EarlyStopping()
    other = {"0": {"class": "Other", "attributes": {"wait": 3}}}
    CallbackMemory({0: fresh}).restore(other, {}, "x", {0: [np.ones(3)]})
    assert (fresh.wait, fresh.best_weights) == (0, None)
