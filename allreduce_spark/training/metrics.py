"""Metric *state* combined over ranks or partitions, so that a result equals that of one process over all the rows.

Averaging the ranks' results would be wrong for most metrics: the AUC of a union is not the mean of the AUCs. What can be
combined is the state they are computed from (confusion counts, sums). How is written in each state variable: Keras
creates metric variables with `aggregation="sum"`, the rule by which tf.distribute combines replicas.
"""

from __future__ import annotations

from collections.abc import Sequence

import keras
import numpy as np

from allreduce_spark.communicator.base import Communicator
from allreduce_spark.errors import ConfigError
from allreduce_spark.training.backends import settle

__all__ = ["MetricState", "combine_states", "metric_variables", "value_of"]


def metric_variables(model: keras.Model) -> list[keras.Variable]:
    """The state variables of all metrics of a model, the loss included, in an order that is the same everywhere.

    Raises:
        ConfigError: A metric has state that says not how to combine it.
    """
    variables = list(model.metrics_variables)
    for variable in variables:
        if variable.aggregation not in ("sum", "mean", "only_first_replica"):
            raise ConfigError(
                f"the metric variable {variable.path!r} has aggregation={variable.aggregation!r}, so nobody knows how to "
                "combine it over the ranks. Create it with Metric.add_variable(..., aggregation='sum') (or 'mean')."
            )
    return variables


def combine_states(
    variables: Sequence[keras.Variable], initial: Sequence[np.ndarray], states: Sequence[Sequence[np.ndarray]]
) -> list[np.ndarray]:
    """Combine the metric states that were collected independently from the same initial one.

    Args:
        variables: The state variables; they tell how to combine.
        initial: Their values after `reset_state`.
        states: Per contributor, the values of the variables. There is at least one.

    Returns:
        The state that one process would have reached over the rows of all contributors.
    """
    combined = []
    for index, (variable, start) in enumerate(zip(variables, initial, strict=True)):
        values = [np.asarray(state[index], _wide(start.dtype)) for state in states]
        if variable.aggregation == "sum":
            value = start + np.sum([value - start for value in values], axis=0)
        elif variable.aggregation == "mean":
            value = np.mean(values, axis=0)
        else:
            value = values[0]
        combined.append(np.asarray(value).astype(start.dtype))
    return combined


class MetricState:
    """The metric state of one rank's model: combined over the ranks at the end of an epoch, restored after a step that does
    not count."""

    def __init__(self, model: keras.Model, communicator: Communicator) -> None:
        self._model, self._communicator = model, communicator
        self._initial: dict[int, np.ndarray] = {}
        self._kept: list[tuple[keras.Variable, np.ndarray]] = []

    def begin(self) -> None:
        """Remember the state that every rank starts the epoch with; call it right after Keras has reset the metrics."""
        self._initial = {id(variable): value_of(variable) for variable in metric_variables(self._model)}

    def keep(self) -> None:
        """Remember the state of now, for `restore`."""
        settle(self._model)
        self._kept = [(variable, value_of(variable)) for variable in metric_variables(self._model)]

    def restore(self) -> None:
        """Take back all that has happened to the metrics since `keep`."""
        settle(self._model)
        kept = {id(variable) for variable, _ in self._kept}
        for variable, value in self._kept:
            variable.assign(value)
        for variable in metric_variables(self._model):
            if id(variable) not in kept:  # made in the first step, by a metric that builds itself late
                variable.assign(np.zeros(variable.shape, value_of(variable).dtype))

    def combine(self) -> None:
        """Replace this rank's state by that of all ranks; all must call."""
        settle(self._model)
        for variable in metric_variables(self._model):
            value = value_of(variable)
            initial = self._initial.get(id(variable), np.zeros_like(value))
            wide = np.array(value, _wide(value.dtype))
            match variable.aggregation:
                case "sum":
                    wide -= initial
                    self._communicator.allreduce(wide)
                    wide += initial
                case "mean":
                    self._communicator.allreduce(wide)
                    wide = wide / self._communicator.world_size
                case _:
                    self._communicator.broadcast(wide)
            variable.assign(wide.astype(value.dtype))


def value_of(variable: keras.Variable) -> np.ndarray:
    """A copy of a variable's value; what the backend itself hands out may be its own memory."""
    return np.array(variable.numpy())


def _wide(dtype: np.dtype) -> np.dtype:
    """Counts are summed as int64, everything else as float64: sums of many float32 parts would lose digits."""
    return np.dtype(np.int64 if dtype.kind in "iub" else np.float64)
