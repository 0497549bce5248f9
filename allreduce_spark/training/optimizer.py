"""All-reduce inside `optimizer.apply`: every rank applies the gradient of the union of the ranks' batches.

Keras 3's trainers, and custom `train_step`s, all end in `optimizer.apply`, so this is the one place to reduce in; hooks on
`apply_gradients` are never called (which is why Horovod's own Keras optimizer silently does nothing under Keras 3). Because
the gradients are reduced *before* Keras clips, unscales, accumulates or decays anything, all of that sees what a
single process would see.

The mean over the union of the batches is the mean of the ranks' means, each weighted by its rows:

    g = rows_0 / R * g_0 + ... + rows_n / R * g_n        R = rows_0 + ... + rows_n

All ranks know R before the step (`batches.BatchPlan`), so each scales its part while it copies it, and the sum is the result:
dividing afterwards would be one more pass over all gradients. They travel as one flat buffer, because one large all-reduce
costs less than many small ones (Sergeev and Del Balso 2018, arXiv:1802.05799, "Tensor Fusion"). A communicator with operations
for TensorFlow's graph (`Communicator.graph`) gets the dense gradients as one flat tensor, on the device where they are; all
else, and all of it with others, leaves the step as numpy arrays.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from allreduce_spark.communicator.base import Communicator
from allreduce_spark.training.backends import Order, ours
from allreduce_spark.training.buffer import FlatBuffer

__all__ = ["GradientReducer", "StepRows", "distribute", "distribute_steps", "moving_variables"]


@dataclass
class StepRows:
    """How many rows count in the current step; `callbacks` moves it on.

    Attributes:
        mine: This rank's; 0 in a step to which it brings none.
        total: Those of all ranks; 0 while no step is running.
    """

    mine: int = 0
    total: int = 0

    @property
    def share(self) -> float:
        """The weight of this rank's mean in the mean of all rows."""
        return self.mine / self.total


def distribute(
    optimizer: keras.optimizers.Optimizer,
    communicator: Communicator,
    rows: StepRows,
    moving: Sequence[keras.Variable] = (),
    order: Order | None = None,
) -> GradientReducer | None:
    """Make `optimizer.apply` reduce the gradients over the ranks before it applies them. Changes the optimizer in place.

    The optimizer keeps its class, so files that callbacks write load in plain Keras. A `LossScaleOptimizer` is
    distributed as a whole: its gradients are reduced while still scaled, and all ranks see the same overflow. A rank's gradient
    is the mean over fewer rows than the global batch has, and may be up to `world_size` times what they add to the global mean:
    so float16 overflows at scales that one process could still use, and the loss scale settles that much lower.

    Args:
        optimizer: The model's; built or not.
        communicator: The group to reduce over.
        rows: The weight of this rank's gradient, read at every step.
        moving: Variables that the forward pass moves (see `moving_variables`); averaged at every step as well.
        order: That of all collectives in the model's steps; None where there are no others.

    Returns:
        What reduces; None where there is one rank, which has nothing to reduce.
    """
    if communicator.world_size == 1:
        return None
    reduce = GradientReducer(communicator, rows, moving, order)
    apply_locally = optimizer.apply

    def apply(grads: Sequence[Any], trainable_variables: Sequence[keras.Variable] | None = None) -> Any:
        return apply_locally(reduce(list(grads)), trainable_variables)

    optimizer.apply = apply
    if ours.IS_STATELESS and isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        # It hands a step of JAX to the optimizer within it, and never calls its own `apply`.
        stateless = optimizer.stateless_apply

        def stateless_apply(optimizer_variables: Any, grads: Sequence[Any], trainable_variables: Any) -> Any:
            return stateless(optimizer_variables, reduce(list(grads)), trainable_variables)

        optimizer.stateless_apply = stateless_apply
    return reduce


def distribute_steps(
    model: keras.Model,
    communicator: Communicator,
    rows: StepRows,
    order: Order,
    optimizer: keras.optimizers.Optimizer | None = None,
) -> GradientReducer | None:
    """Make the training steps of a model reduce, over the ranks, its gradients and what else they move.

    Args:
        model: Built.
        communicator, rows, order: As for `distribute`.
        optimizer: What the model is, or will be, compiled with; None for the one that it has.

    Returns:
        What reduces the moving variables; None where there is one rank.
    """
    optimizer, moving = optimizer or model.optimizer, moving_variables(model)
    if not ours.IS_STATELESS or not moving:
        return distribute(optimizer, communicator, rows, moving, order)
    if distribute(optimizer, communicator, rows, order=order) is None:
        return None
    reduce, step = GradientReducer(communicator, rows, moving, order), model.train_step
    known = {id(variable): place for place, variable in enumerate(model.non_trainable_variables)}
    places = [known[id(variable)] for variable in moving]

    def train_step(state: Any, data: Any) -> Any:
        logs, (trainable, others, *rest) = step(state, data)
        others = list(others)
        _, moved = reduce.reduce([], [others[place] for place in places])
        for place, value in zip(places, moved, strict=True):
            others[place] = value
        return logs, (trainable, others, *rest)

    model.train_step = train_step
    return reduce


def moving_variables(model: keras.Model) -> list[keras.Variable]:
    """The floating-point variables that a training step may move without a gradient, such as BatchNorm's statistics.

    Weights that are merely frozen do not belong to them, nor do layers that are frozen as a whole, which Keras runs in
    inference mode.
    """
    layers = (layer for layer in model._flatten_layers() if layer.trainable)
    found = {
        id(variable): variable
        for layer in layers
        for variable in layer._non_trainable_variables
        if keras.backend.is_float_dtype(variable.dtype)
    }
    return list(found.values())


class GradientReducer:
    """Called with the local gradients inside a traced (or eager) training step; returns those of the global batch.

    Dense gradients and moving variables share one flat buffer, unless gradients are reduced in the graph, or a stateless step
    brings the moving variables later. A sparse gradient (`tf.IndexedSlices`, of an Embedding) stays sparse: the ranks' slices
    are gathered, one after the other, exactly as one process would have got them.

    Args:
        communicator, rows, moving, order: As for `distribute`. The moving variables must still have the values, equal on
            all ranks, that they have before the first step.
    """

    def __init__(
        self,
        communicator: Communicator,
        rows: StepRows,
        moving: Sequence[keras.Variable] = (),
        order: Order | None = None,
    ) -> None:
        self._communicator, self._rows, self._moving = communicator, rows, list(moving)
        self._order = order or ours.ProgramOrder()
        self._buffers = _Buffers()  # of steps that run as they are written
        # In float32 at least: the small steps of a half-precision variable would be lost in its own type.
        values = [variable.numpy() for variable in moving]
        self._moving_before = [np.array(value, np.promote_types(value.dtype, np.float32)) for value in values]

    @property
    def agreed(self) -> list[tuple[keras.Variable, np.ndarray]]:
        """The moving variables, each with what all ranks have agreed on in the last step, in float32 at least."""
        return list(zip(self._moving, self._moving_before, strict=True))

    def __call__(self, gradients: list[Any]) -> list[Any]:
        """Reduce over the ranks; all must call.

        Args:
            gradients: Per variable, the gradient of the mean loss over this rank's rows, or None; shape of the variable.

        Returns:
            Gradients of the mean loss over all ranks' rows, in the same order; the same bits on every rank.
        """
        reduced, moved = self.reduce(gradients, [keras.ops.convert_to_tensor(variable) for variable in self._moving])
        for variable, value in zip(self._moving, moved, strict=True):
            variable.assign(value)
        return reduced

    def reduce(self, gradients: list[Any], moving: list[Any]) -> tuple[list[Any], list[Any]]:
        """The same with the moving variables as tensors, whose new values it returns beside the gradients."""
        sparse = [g for g in gradients if isinstance(g, ours.SPARSE)]
        dense = [g for g in gradients if g is not None and not isinstance(g, ours.SPARSE)]
        by_graph: list[Any] = []
        by_numpy = dense
        if self._communicator.graph is not None:
            from allreduce_spark.training.backends.tensorflow import reduce_in_graph

            by_graph, by_numpy = reduce_in_graph(self._communicator.graph, dense, lambda: self._rows.share), []
        values, indices = [g.values for g in sparse], [g.indices for g in sparse]
        inputs = [*by_numpy, *moving, *values, *indices]
        results = [(tensor.shape, tensor.dtype) for tensor in [*by_numpy, *moving]]
        results += [((None, *tensor.shape[1:]), tensor.dtype) for tensor in [*values, *indices]]
        counts = (len(by_numpy), len(moving), len(sparse))

        # A graph keeps its own: what it was given may still be in use when another place in it calls.
        buffers = self._buffers if ours.runs_at_once() else _Buffers()
        outputs = (
            self._order.call(lambda *arrays: self._reduce(arrays, counts, buffers), inputs, results) if inputs else []
        )
        reduced, moved, values, indices = _split(outputs, counts)
        whole = iter([*by_graph, *reduced])
        slices = (
            type(local)(value, index, local.dense_shape)
            for value, index, local in zip(values, indices, sparse, strict=True)
        )
        return [g if g is None else next(slices if isinstance(g, ours.SPARSE) else whole) for g in gradients], moved

    def _reduce(
        self, arrays: Sequence[np.ndarray], counts: tuple[int, int, int], buffers: _Buffers
    ) -> list[np.ndarray]:
        """The numpy side of a step. The arrays are the backend's memory: only to be read."""
        dense, moving, values, indices = _split(arrays, counts)
        share = self._rows.share
        # Averaging what each rank *added* leaves a variable that nobody moves as it is, to the bit.
        all_before = self._moving_before if moving else []
        added = [now - before for now, before in zip(moving, all_before, strict=True)]
        buffer = buffers.next([*dense, *added])

        buffer.fill([*dense, *added], share)
        self._communicator.allreduce(buffer.flat)

        reduced, added_by_all = buffer.views[: len(dense)], buffer.views[len(dense) :]
        for before, step in zip(all_before, added_by_all, strict=True):
            before += step
        gathered = [self._gather(v, i, share) for v, i in zip(values, indices, strict=True)]
        return [
            *(view.astype(local.dtype, copy=False) for view, local in zip(reduced, dense, strict=True)),
            *(before.astype(now.dtype) for before, now in zip(all_before, moving, strict=True)),
            *(value for value, _ in gathered),
            *(index for _, index in gathered),
        ]

    def _gather(self, values: np.ndarray, indices: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
        """All ranks' slices of one sparse gradient, each weighted by the share of its rank."""
        if share == 0:
            values, indices = values[:0], indices[:0]
        weighted = values * np.asarray(share, np.result_type(values.dtype, np.float32))
        all_values = np.concatenate(self._communicator.allgather(weighted))
        return all_values.astype(values.dtype, copy=False), np.concatenate(self._communicator.allgather(indices))


class _Buffers:
    """Two flat buffers by turns: the backend may still hold views of the last step's while this one's is being filled.

    Two for arrays of the same shapes and types; a step may apply other gradients elsewhere.
    """

    def __init__(self) -> None:
        self._turns: dict[Any, itertools.cycle[FlatBuffer]] = {}

    def next(self, arrays: Sequence[np.ndarray]) -> FlatBuffer:
        key = tuple((array.shape, array.dtype) for array in arrays)
        if key not in self._turns:
            self._turns[key] = itertools.cycle([FlatBuffer(arrays), FlatBuffer(arrays)])
        return next(self._turns[key])


def _split(items: Sequence[Any], counts: tuple[int, int, int]) -> tuple[list[Any], list[Any], list[Any], list[Any]]:
    """Dense gradients, moving variables, values and indices of the sparse gradients."""
    dense, moving, sparse = counts
    ends = list(itertools.accumulate((dense, moving, sparse, sparse), initial=0))
    return tuple(list(items[start:end]) for start, end in itertools.pairwise(ends))  # type: ignore[return-value]
