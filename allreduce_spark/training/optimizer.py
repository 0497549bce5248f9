"""All-reduce inside `optimizer.apply`: every rank applies the gradient of the union of the ranks' batches.

Keras 3's trainers, and custom `train_step`s, all end in `optimizer.apply`, so this is the one place to reduce in; hooks on
`apply_gradients` are never called (which is why Horovod's own Keras optimizer silently does nothing under Keras 3). Because
the gradients are reduced *before* Keras clips, unscales, accumulates or decays anything, all of that sees what a
single process would see.

The mean over the union of the batches is the mean of the ranks' means, each weighted by its rows:

    g = rows_0 / R * g_0 + ... + rows_n / R * g_n        R = rows_0 + ... + rows_n

All ranks know R before the step (`batches.BatchPlan`), so each scales its part while it copies it, and the sum is the result:
dividing afterwards would be one more pass over all gradients. They travel as one flat buffer, because one large all-reduce
costs less than many small ones (Sergeev and Del Balso 2018, arXiv:1802.05799, "Tensor Fusion"). A backend with operations for
the graph (`Communicator.graph`) gets the dense gradients as one flat tensor, on the device where they are; all else, and all
of it with other backends, leaves the graph as numpy arrays.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from allreduce_spark.communicator.base import Communicator, GraphCollectives
from allreduce_spark.training.buffer import FlatBuffer
from allreduce_spark.training.order import ProgramOrder

__all__ = ["GradientReducer", "StepRows", "distribute", "moving_variables"]


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
    order: ProgramOrder | None = None,
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

    Dense gradients and moving variables share one flat buffer, unless the backend reduces gradients in the graph. A sparse
    gradient (`tf.IndexedSlices`, of an Embedding) stays sparse: the ranks' slices are gathered, one after the other, exactly
    as one process would have got them.

    Args:
        communicator, rows, moving, order: As for `distribute`. The moving variables must still have the values, equal on
            all ranks, that they have before the first step.
    """

    def __init__(
        self,
        communicator: Communicator,
        rows: StepRows,
        moving: Sequence[keras.Variable] = (),
        order: ProgramOrder | None = None,
    ) -> None:
        self._communicator, self._rows, self._moving = communicator, rows, list(moving)
        self._order = order or ProgramOrder()
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
        sparse = [g for g in gradients if isinstance(g, tf.IndexedSlices)]
        dense = [g for g in gradients if g is not None and not isinstance(g, tf.IndexedSlices)]
        moving = [tf.convert_to_tensor(variable) for variable in self._moving]
        graph = self._communicator.graph
        by_graph = [] if graph is None else self._reduce_in_graph(graph, dense)
        by_numpy = dense if graph is None else []
        inputs = [*by_numpy, *moving, *(g.values for g in sparse), *(g.indices for g in sparse)]
        counts = (len(by_numpy), len(moving), len(sparse))

        buffers = _Buffers()  # of this call: a step may apply other gradients elsewhere
        outputs = (
            self._order.call(
                lambda *arrays: self._reduce(arrays, counts, buffers), inputs, [tensor.dtype for tensor in inputs]
            )
            if inputs
            else []
        )
        reduced, moved, values, indices = _split(outputs, counts)
        reduced = [*by_graph, *reduced]
        for tensor, local in zip([*reduced, *moved], [*dense, *moving], strict=True):
            tensor.set_shape(local.shape)
        for variable, value in zip(self._moving, moved, strict=True):
            variable.assign(value)
        for value, index, local in zip(values, indices, sparse, strict=True):
            value.set_shape([None, *local.values.shape[1:]])
            index.set_shape([None])
        slices = (
            tf.IndexedSlices(value, index, local.dense_shape)
            for value, index, local in zip(values, indices, sparse, strict=True)
        )
        whole = iter(reduced)
        return [g if g is None else next(slices) if isinstance(g, tf.IndexedSlices) else next(whole) for g in gradients]

    def _reduce_in_graph(self, graph: GraphCollectives, dense: list[Any]) -> list[Any]:
        """Dense gradients as one flat tensor of float32, or float64 where any of them is: the arithmetic of `FlatBuffer`.

        Fused here and not by the backend, whose order of fusion, and so of summation, may differ from one run to the next.
        """
        if not dense:
            return []
        share = tf.numpy_function(lambda: np.float64(self._rows.share), [], tf.float64)
        share.set_shape([])
        dtype = tf.float64 if any(g.dtype == tf.float64 for g in dense) else tf.float32
        flat = tf.concat([tf.reshape(tf.cast(g, dtype), [-1]) for g in dense], 0)
        # Multiplying by 0 would not do: a batch that does not count may give nan, and 0 * nan is still nan.
        weighted = tf.where(share > 0, flat * tf.cast(share, dtype), tf.zeros_like(flat))
        (total,) = graph.allreduce_sum([weighted])
        parts = tf.split(total, [tf.size(g) for g in dense])
        return [tf.cast(tf.reshape(part, tf.shape(g)), g.dtype) for part, g in zip(parts, dense, strict=True)]

    def _reduce(
        self, arrays: Sequence[np.ndarray], counts: tuple[int, int, int], buffers: _Buffers
    ) -> list[np.ndarray]:
        """The numpy side of a step. The arrays are TensorFlow's memory: only to be read."""
        dense, moving, values, indices = _split(arrays, counts)
        share = self._rows.share
        # Averaging what each rank *added* leaves a variable that nobody moves as it is, to the bit.
        added = [now - before for now, before in zip(moving, self._moving_before, strict=True)]
        buffer = buffers.next([*dense, *added])

        buffer.fill([*dense, *added], share)
        self._communicator.allreduce(buffer.flat)

        reduced, added_by_all = buffer.views[: len(dense)], buffer.views[len(dense) :]
        for before, step in zip(self._moving_before, added_by_all, strict=True):
            before += step
        gathered = [self._gather(v, i, share) for v, i in zip(values, indices, strict=True)]
        return [
            *(view.astype(local.dtype, copy=False) for view, local in zip(reduced, dense, strict=True)),
            *(before.astype(now.dtype) for before, now in zip(self._moving_before, moving, strict=True)),
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
    """Two flat buffers by turns: TensorFlow may still hold views of the last step's while this one's is being filled."""

    def __init__(self) -> None:
        self._turns: itertools.cycle[FlatBuffer] | None = None

    def next(self, arrays: Sequence[np.ndarray]) -> FlatBuffer:
        if self._turns is None:
            self._turns = itertools.cycle([FlatBuffer(arrays), FlatBuffer(arrays)])
        return next(self._turns)


def _split(items: Sequence[Any], counts: tuple[int, int, int]) -> tuple[list[Any], list[Any], list[Any], list[Any]]:
    """Dense gradients, moving variables, values and indices of the sparse gradients."""
    dense, moving, sparse = counts
    ends = list(itertools.accumulate((dense, moving, sparse, sparse), initial=0))
    return tuple(list(items[start:end]) for start, end in itertools.pairwise(ends))  # type: ignore[return-value]
