"""Local SGD: each rank takes several steps by itself, and then all continue from the mean of where they have come.

The mean is weighted by the rows that each rank has trained on since the last one, so ranks with fewer rows count for less, and
one with none not at all. With plain SGD and one step at a time that is the step of the global batch itself:

    w - lr * (rows_0 / R * g_0 + ... + rows_n / R * g_n) = rows_0 / R * (w - lr * g_0) + ... + rows_n / R * (w - lr * g_n)

Averaged are the trained weights, what the forward pass moves (BatchNorm), and the optimizer's slots, such as momenta: left to
themselves these would pull each rank back to where it had gone alone. (Stich 2019, arXiv:1805.09767; for the slots Yu, Jin and
Yang 2019, arXiv:1905.03817.)
"""

from __future__ import annotations

import keras
import numpy as np

from allreduce_spark.communicator.base import Communicator
from allreduce_spark.training.backends import settle
from allreduce_spark.training.batches import BatchPlan
from allreduce_spark.training.buffer import FlatBuffer
from allreduce_spark.training.metrics import value_of
from allreduce_spark.training.optimizer import moving_variables

__all__ = ["LocalSteps"]


class LocalSteps:
    """Counts the steps that this rank takes alone, and combines the ranks' weights when it is time.

    At the end of an epoch it always is: validation, callbacks and checkpoints see one model.

    Args:
        model: With its optimizer built; variables equal on all ranks.
        communicator: The group, of more than one rank.
        plan: Of the batches to train on.
        sync_every: Steps from one combination to the next, or "epoch".
    """

    def __init__(self, model: keras.Model, communicator: Communicator, plan: BatchPlan, sync_every: int | str) -> None:
        self._model, self._communicator, self._plan = model, communicator, plan
        self._every = plan.steps if sync_every == "epoch" else int(sync_every)
        state = model.optimizer.variables
        learnt = [*model.trainable_variables, *moving_variables(model), *(v for v in state if _is_slot(v))]
        self._averaged = list({id(variable): variable for variable in learnt}.values())
        # Numbers of steps, scales and the like have no mean; they are taken from one rank that has taken all steps.
        self._counters = [variable for variable in state if not _is_slot(variable)]
        self._longest = int(np.argmax(plan.rows)) % plan.world_size
        self._before = [_widened(value_of(variable)) for variable in self._averaged]
        self._buffer = FlatBuffer(self._before)
        self._kept: list[np.ndarray] | None = None
        self._steps: list[int] = []

    def begin_step(self, step: int) -> None:
        """Call it before each step. One without rows of this rank is computed from padding, and is to change nothing."""
        self._steps.append(step)
        if self._kept is None and self._plan.rows_of_rank(self._communicator.rank, step) == 0:
            settle(self._model)
            self._kept = [value_of(variable) for variable in self._variables]

    def end_step(self) -> None:
        """Call it after each step."""
        if len(self._steps) >= self._every or self._steps[-1] == self._plan.steps - 1:
            self.combine()

    def combine(self) -> None:
        """Give all ranks the mean of what they have learnt since the last time; all must call."""
        settle(self._model)
        mine, total = self._rows_since()
        self._steps = []
        if self._kept is not None:
            for variable, value in zip(self._variables, self._kept, strict=True):
                variable.assign(value)
            self._kept = None
        if total == 0:
            return
        # The mean of what was *added* leaves a variable that nobody has moved as it is, to the bit.
        added = [value_of(v) - before for v, before in zip(self._averaged, self._before, strict=True)]
        self._buffer.fill(added, mine / total)
        self._communicator.allreduce(self._buffer.flat)
        for variable, before, step in zip(self._averaged, self._before, self._buffer.views, strict=True):
            before += step
            variable.assign(before.astype(value_of(variable).dtype))
        for variable in self._counters:
            value = value_of(variable)
            self._communicator.broadcast(value, self._longest)
            variable.assign(value)

    @property
    def is_combined(self) -> bool:
        """Whether no step has been taken since the last combination, so that all ranks hold the same."""
        return not self._steps

    @property
    def agreed(self) -> list[tuple[keras.Variable, np.ndarray]]:
        """The averaged variables, each with what all ranks started from after the last combination, in float32 at least."""
        return list(zip(self._averaged, self._before, strict=True))

    @property
    def _variables(self) -> list[keras.Variable]:
        return [*self._averaged, *self._counters]

    def _rows_since(self) -> tuple[int, int]:
        """Rows of this rank, and of all, in the steps since the last combination."""
        mine = sum(self._plan.rows_of_rank(self._communicator.rank, step) for step in self._steps)
        return mine, sum(self._plan.total(step) for step in self._steps)


def _is_slot(variable: keras.Variable) -> bool:
    return len(variable.shape) > 0 and keras.backend.is_float_dtype(variable.dtype)


def _widened(value: np.ndarray) -> np.ndarray:
    """In float32 at least: the small steps of a half-precision variable would be lost in its own type."""
    return np.array(value, np.promote_types(value.dtype, np.float32))
