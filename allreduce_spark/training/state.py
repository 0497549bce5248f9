"""Everything a rank's training hangs on at the border between two steps: collected for a checkpoint, restored from one.

What is equal on all ranks (the weights, those that EarlyStopping keeps, the optimizer's variables) is dealt out, so that each
rank writes a part of it; the names of these tensors begin with "shared/". Those of what is of one rank alone begin with "own/":
random states, the metrics of an epoch that is not over, the memory of callbacks.

Not part of it are the states of random operations that are not Keras's: `tf.random.normal` inside a step, say, or the dropout
of a PyTorch module, while `keras.random` and Keras's layers are fine. Nor is what callbacks change in the model beside its
variables.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from allreduce_spark.checkpoint.manifest import checkpoint_id
from allreduce_spark.checkpoint.shares import deal
from allreduce_spark.communicator.base import Communicator
from allreduce_spark.errors import CheckpointError
from allreduce_spark.training.backends import ours, settle
from allreduce_spark.training.batches import ShardBatches
from allreduce_spark.training.job import seed_variables
from allreduce_spark.training.memory import CallbackMemory
from allreduce_spark.training.metrics import combine_states, metric_variables, value_of
from allreduce_spark.training.models.model_bytes import numpy_dtype
from allreduce_spark.training.plain import pack, unpack

__all__ = ["METRICS", "Position", "RankState", "SavedState", "build_metrics", "make_randomness_differ"]

METRICS = "own/metrics/"
_WEIGHTS, _WIDE, _BEST, _SEEDS = "shared/weights/", "shared/moving/", "shared/best/", "own/seeds/"
_CALLBACKS, _HISTORY, _RANDOM = "own/callbacks", "own/history", "own/random"


@dataclass(frozen=True, order=True)
class Position:
    """The next step to take: a border between two steps. The end of an epoch is the beginning of the next one."""

    epoch: int = 0
    step: int = 0

    @property
    def id(self) -> str:
        """The name of the checkpoint here; names sort as positions do."""
        return checkpoint_id(self.epoch, self.step)


@dataclass(frozen=True)
class SavedState:
    """A checkpoint as one rank needs it.

    Attributes:
        position: Where it was taken.
        world_size: Ranks that there were.
        shared: The tensors that are equal on all ranks, by name.
        own: This rank's own ones; those of the root where this rank has none.
        is_mine: Whether `own` is this rank's.
        about: What belongs to `own` beside the tensors.
        metrics: The metric states of all ranks, in rank order, where their number has changed; else of this rank alone.
    """

    position: Position
    world_size: int
    shared: Mapping[str, np.ndarray]
    own: Mapping[str, np.ndarray]
    is_mine: bool
    about: Mapping[str, Any]
    metrics: Sequence[Sequence[np.ndarray]]

    @property
    def has_stopped(self) -> bool:
        """Whether a callback had ended the training."""
        return bool(self.about["stopped"])


class RankState:
    """What is collected and restored on one rank.

    Args:
        model: Built, as is its optimizer.
        communicator: The group.
        agreed: The variables of which all ranks keep a wider value than the variable's own; see `GradientReducer.agreed`.
        memory: Of the user's callbacks.
        history: Of this fit.
    """

    def __init__(
        self,
        model: keras.Model,
        communicator: Communicator,
        agreed: Sequence[tuple[keras.Variable, np.ndarray]],
        memory: CallbackMemory,
        history: keras.callbacks.History,
    ) -> None:
        self._model, self._communicator, self._agreed = model, communicator, agreed
        self._memory, self._history = memory, history
        self._shared = {f"{_WEIGHTS}{index}": variable for index, variable in enumerate(model.weights)}
        self._shared |= {f"shared/optimizer/{index}": v for index, v in enumerate(model.optimizer.variables)}
        # Half precision alone: a float32 variable holds all that was agreed.
        self._wide = {f"{_WIDE}{i}": wide for i, (v, wide) in enumerate(agreed) if wide.dtype.name != v.dtype}
        sizes = {n: math.prod(v.shape) * numpy_dtype(v.dtype).itemsize for n, v in self._shared.items()}
        sizes |= {name: wide.nbytes for name, wide in self._wide.items()}
        self._mine = deal(sizes, communicator.world_size)[communicator.rank]

    def collect(self, position: Position) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """This rank's share of a checkpoint, to be copied before the next step: the arrays are the variables' own memory.

        Returns:
            Tensors by name, and a JSON value.
        """
        settle(self._model)
        arrays = {n: self._wide[n] if n in self._wide else ours.view(self._shared[n]) for n in self._mine}
        my_weights = [int(name.removeprefix(_WEIGHTS)) for name in self._mine if name.startswith(_WEIGHTS)]
        for index, weights in self._memory.best_weights().items():
            arrays |= {f"{_BEST}{index}/{number}": weights[number] for number in my_weights}
        arrays |= {f"{_SEEDS}{index}": ours.view(variable) for index, variable in enumerate(_seeds(self._model))}
        # Also at the beginning of an epoch, when nobody needs them: what is always of one form is copied faster.
        metrics = metric_variables(self._model)
        arrays |= {f"{METRICS}{index}": ours.view(variable) for index, variable in enumerate(metrics)}
        about = {
            "epoch": position.epoch,
            "step": position.step,
            "world_size": self._communicator.world_size,
            "stopped": bool(self._model.stop_training),
            "random": pack(_random_states(), _RANDOM, arrays),
            "history": pack([self._history.epoch, self._history.history], _HISTORY, arrays),
            "callbacks": self._memory.collect(arrays, _CALLBACKS),
        }
        return arrays, about

    def restore(self, saved: SavedState) -> None:
        """Go back to where `saved` was taken, but for the metrics. The model and the optimizer keep their variables.

        Raises:
            CheckpointError: It is of another model.
        """
        _assign(self._shared, {n: value for n, value in saved.shared.items() if not n.startswith((_WIDE, _BEST))})
        for index, (variable, agreed) in enumerate(self._agreed):
            agreed[...] = saved.shared.get(f"{_WIDE}{index}", value_of(variable))
        seeds = {f"{_SEEDS}{index}": variable for index, variable in enumerate(_seeds(self._model))}
        if saved.is_mine:
            _assign(seeds, {name: value for name, value in saved.own.items() if name.startswith(_SEEDS)})
            _set_random_states(unpack(saved.about["random"], saved.own))
        else:
            states = [saved.own[name].tolist() for name in list(seeds)[: len(seed_variables(self._model))]]
            make_randomness_differ(self._model, states, self._communicator.rank)
        self._history.epoch, self._history.history = unpack(saved.about["history"], saved.own)
        self._memory.restore(saved.about["callbacks"], saved.own, _CALLBACKS, _best_weights(saved.shared))

    def restore_metrics(self, saved: SavedState) -> None:
        """Go back to the metrics of an epoch that was not over. Call it right after Keras has reset them."""
        variables = metric_variables(self._model)
        counts = {len(variables), *map(len, saved.metrics)}
        if len(counts) != 1:
            raise CheckpointError(f"the checkpoint {saved.position.id} is of a model with other metrics.")
        if saved.world_size == self._communicator.world_size:
            values = saved.metrics[0]
        else:
            # Sums that several ranks had, or that one had which is no more, go to the root: the next combination adds them up.
            initial = [value_of(variable) for variable in variables]
            combined = combine_states(variables, initial, saved.metrics)
            values = [
                start if variable.aggregation == "sum" and self._communicator.rank else value
                for variable, start, value in zip(variables, initial, combined, strict=True)
            ]
        for variable, value in zip(variables, values, strict=True):
            variable.assign(np.array(value))


def build_metrics(model: keras.Model, data: ShardBatches) -> None:
    """Make the metrics exist that Keras would make in the first step, so that they can be restored before it."""
    ours.build_metrics(model, data[0])


def make_randomness_differ(model: keras.Model, seed_states: Sequence[Sequence[int]], rank: int) -> None:
    """Equal dropout masks on all ranks would drop the same units for every row of the global batch.

    The root draws what a single process would draw; the other ranks something else.
    """
    variables = seed_variables(model)
    states = seed_states if len(seed_states) == len(variables) else [variable.numpy() for variable in variables]
    for variable, state in zip(variables, states, strict=True):
        value = np.array(state, dtype=variable.dtype)
        if rank:
            # Its bits count: they are unsigned, but PyTorch has no such type.
            drawn = np.random.SeedSequence([int(value[0]) % 2**32, rank]).generate_state(1)
            value[0] = drawn.astype(value.dtype)[0]
        variable.assign(value)


def _assign(variables: Mapping[str, keras.Variable], values: Mapping[str, np.ndarray]) -> None:
    surplus = sorted(values.keys() - variables.keys())
    if surplus:
        raise CheckpointError(f"the checkpoint is of another model: it has {surplus[0]}, which there is none of here.")
    for name, variable in variables.items():
        value = values.get(name)
        if value is None or value.shape != tuple(variable.shape) or value.dtype.name != variable.dtype:
            found = "missing there" if value is None else f"there {value.dtype} of shape {value.shape}"
            raise CheckpointError(
                f"the checkpoint is of another model: {name}, here {variable.path!r} ({variable.dtype} of shape "
                f"{tuple(variable.shape)}), is {found}."
            )
        variable.assign(np.array(value))  # the backend may take over what it is given


def _best_weights(shared: Mapping[str, np.ndarray]) -> dict[int, list[np.ndarray]]:
    """By the callback's index, the weights in their order."""
    found: dict[int, dict[int, np.ndarray]] = {}
    for name, value in shared.items():
        if name.startswith(_BEST):
            index, number = map(int, name.removeprefix(_BEST).split("/"))
            found.setdefault(index, {})[number] = value
    return {index: [weights[number] for number in sorted(weights)] for index, weights in found.items()}


def _seeds(model: keras.Model) -> list[keras.Variable]:
    """The states of the model's random generators, and of the one that Keras itself has for those who name none."""
    from keras.src.backend.common.global_state import get_global_attribute

    everybodys = get_global_attribute("global_seed_generator")
    return [*seed_variables(model), *([] if everybodys is None else [everybodys.state])]


def _random_states() -> dict[str, Any]:
    version, internal, gauss = random.getstate()
    return {"python": [version, np.array(internal, np.uint32), gauss], "numpy": np.random.get_state(legacy=False)}


def _set_random_states(states: dict[str, Any]) -> None:
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal.tolist()), gauss))
    np.random.set_state(states["numpy"])
