"""Metric state is combined as Keras says it is to be combined, and never by guessing."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from allreduce_spark.errors import ConfigError
from allreduce_spark.training.metrics import combine_states, metric_variables, value_of


class Odd(keras.metrics.Metric):
    """One variable for each way to combine, and one without."""

    def __init__(self, aggregations):
        super().__init__(name="odd")
        self.state = [
            self.add_variable(
                (2,), lambda shape, dtype: 5 * np.ones(shape, dtype), aggregation=aggregation, name=aggregation
            )
            for aggregation in aggregations
        ]

    def update_state(self, *args, **kwargs):
        pass

    def result(self):
        return self.state[0].value[0]


def model_with(metric):
    class Model(keras.Model):
        @property
        def metrics(self):
            return [metric]

        @property
        def metrics_variables(self):
            return metric.variables

    return Model()


def test_sums_count_from_the_initial_state_and_means_and_firsts_are_what_they_say():
    variables = metric_variables(model_with(Odd(["sum", "mean", "only_first_replica"])))
    initial = [value_of(variable) for variable in variables]
    states = [[np.full(2, 6.0)] * 3, [np.full(2, 9.0)] * 3]
    combined = combine_states(variables, initial, states)
    assert [value.tolist() for value in combined] == [[10.0, 10.0], [7.5, 7.5], [6.0, 6.0]]


def test_state_that_says_not_how_to_combine_it_is_refused():
    with pytest.raises(ConfigError, match="nobody knows how to combine it"):
        metric_variables(model_with(Odd(["none"])))


def test_large_counts_are_summed_without_losing_digits():
    (variable,) = metric_variables(model_with(Odd(["sum"])))
    parts = [
        [np.array([2.0**24, 1.0], np.float32)],
        [np.array([1.0, 1.0], np.float32)],
        [np.array([1.0, 1.0], np.float32)],
    ]
    (total,) = combine_states([variable], [np.zeros(2, np.float32)], parts)
    assert total.tolist() == [2.0**24 + 2, 3.0]
