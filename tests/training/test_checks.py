"""What is said about a model that has been trained to nonsense."""

from __future__ import annotations

import warnings

import keras
import numpy as np
import pytest

from allreduce_spark.training.checks import warn_if_diverged


def test_weights_that_are_no_numbers_are_told_of():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, name="last")])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_diverged(model)
    model.layers[0].kernel.assign(np.array([[1.0], [np.nan]]))
    with pytest.warns(UserWarning, match="1 of 2 weights hold NaN or infinity, '.*last/kernel' first"):
        warn_if_diverged(model)
