"""TensorFlow: steps are graphs, in which numpy code is an operation, and gradients may be sparse."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from allreduce_spark.communicator.base import GraphCollectives
from allreduce_spark.errors import CollectiveError

__all__ = [
    "COMPILES_CALLS",
    "IS_STATELESS",
    "SPARSE",
    "ProgramOrder",
    "WatchedGraph",
    "build_metrics",
    "dataset",
    "reduce_in_graph",
    "runs_at_once",
    "view",
    "wait_for_step",
    "widest_float",
    "within_steps",
]

COMPILES_CALLS = False
IS_STATELESS = False
SPARSE = (tf.IndexedSlices,)

READ_AHEAD = 2  # batches

# What Horovod's operations say where another rank is gone, or one did not come and Horovod has given up the group.
_LOST = ("Horovod has been shut down", "gloo/transport")


class ProgramOrder:
    """See `Order`. TensorFlow itself would leave the graph in any order, and the ranks would miss each other."""

    def __init__(self) -> None:
        self._graph: Any = None
        self._last: list[Any] = []

    def call(
        self, function: Callable[..., Sequence[Any]], inputs: Sequence[Any], results: Sequence[tuple[Any, Any]]
    ) -> list[Any]:
        graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
        known = graph is not None and graph is self._graph
        with tf.control_dependencies(self._last if known else []):
            outputs = tf.numpy_function(function, inputs, [dtype for _, dtype in results])
        if tf.is_tensor(outputs):  # without a graph, one that is alone comes so
            outputs = [outputs]
        self._graph, self._last = graph, list(outputs[:1])
        for tensor, (shape, _) in zip(outputs, results, strict=True):
            tensor.set_shape(shape)
        return list(outputs)


def dataset(read: Callable[[int], tuple[Any, ...]], steps: int) -> tf.data.Dataset:
    """See `KerasBackend`. The batches are read ahead, in a thread of their own.

    Not a `keras.utils.PyDataset`: Keras gives that to TensorFlow through a Python generator, whose end stalls a process that is
    busy on all its cores for a second now and then, and with it all other ranks (seen between training and validation).
    """
    example = read(0)
    leaves = keras.tree.flatten(example)  # None for labels that rows with weights do not have
    arrays = [leaf for leaf in leaves if leaf is not None]
    types = [tf.string if array.dtype == object else tf.as_dtype(array.dtype) for array in arrays]

    def arrays_of(step: np.integer[Any]) -> list[np.ndarray]:
        return [leaf for leaf in keras.tree.flatten(read(int(step))) if leaf is not None]

    @tf.autograph.experimental.do_not_convert  # it would leave a file of generated code behind
    def tensors_of(step: tf.Tensor) -> Any:
        tensors = tf.numpy_function(arrays_of, [step], types)
        for tensor, array in zip(tensors, arrays, strict=True):
            tensor.set_shape((None, *array.shape[1:]))
        present = iter(tensors)
        return keras.tree.pack_sequence_as(example, [None if leaf is None else next(present) for leaf in leaves])

    options = tf.data.Options()
    options.autotune.enabled = False
    # The all-reduce blocks one of TensorFlow's own threads; reading must not have to wait for it.
    options.threading.private_threadpool_size = 1
    return tf.data.Dataset.range(steps).map(tensors_of).prefetch(READ_AHEAD).with_options(options)


def runs_at_once() -> bool:
    return bool(tf.executing_eagerly())


def widest_float() -> str:
    return "float64"


def view(variable: keras.Variable) -> np.ndarray:
    tensor = tf.convert_to_tensor(variable.value)
    try:
        return np.asarray(memoryview(tensor))
    except (ValueError, TypeError):  # bfloat16 and the like, of which Python's buffers know nothing
        return np.asarray(tensor.numpy())


def build_metrics(model: keras.Model, batch: tuple[Any, ...]) -> None:
    if type(model).train_step is keras.Model.train_step:
        model._symbolic_build(data_batch=batch)
    else:
        # A step of the user's own may do anything: trace it.
        tensors = keras.tree.map_structure(lambda leaf: None if leaf is None else tf.convert_to_tensor(leaf), batch)
        tf.function(model.train_step).get_concrete_function(tensors)


def wait_for_step() -> None:
    """Steps have run when they return."""


@contextlib.contextmanager
def within_steps() -> Iterator[None]:
    try:
        yield
    except tf.errors.OpError as error:
        if not any(words in error.message for words in _LOST):
            raise
        raise CollectiveError(
            f"the other ranks were lost within a step ({error.message.strip().splitlines()[0]}). If none of them has failed, "
            "one did not come in time: then raise Timeouts.collective_s"
        ) from error


def reduce_in_graph(graph: GraphCollectives, dense: list[Any], share: Callable[[], float]) -> list[Any]:
    """Sum dense gradients over the ranks, each weighted by its rank's share, without leaving the graph.

    They travel as one flat tensor of float32, or float64 where any of them is: the arithmetic of `FlatBuffer`. Fused here and
    not by the backend, whose order of fusion, and so of summation, may differ from one run to the next.

    Args:
        share: Asked when the step runs.
    """
    if not dense:
        return []
    weight = tf.numpy_function(lambda: np.float64(share()), [], tf.float64)
    weight.set_shape([])
    dtype = tf.float64 if any(g.dtype == tf.float64 for g in dense) else tf.float32
    flat = tf.concat([tf.reshape(tf.cast(g, dtype), [-1]) for g in dense], 0)
    # Multiplying by 0 would not do: a batch that does not count may give nan, and 0 * nan is still nan.
    weighted = tf.where(weight > 0, flat * tf.cast(weight, dtype), tf.zeros_like(flat))
    (total,) = graph.allreduce_sum([weighted])
    parts = tf.split(total, [tf.size(g) for g in dense])
    reduced = [tf.cast(tf.reshape(part, tf.shape(g)), g.dtype) for part, g in zip(parts, dense, strict=True)]
    for tensor, local in zip(reduced, dense, strict=True):
        tensor.set_shape(local.shape)
    return reduced


class WatchedGraph:
    """Says in the graph, too, when the rank waits: from when the tensors are there until they are reduced.

    On a GPU they count as there when they have been asked for, so the rank's own computing is part of its waiting.
    """

    def __init__(self, graph: GraphCollectives, begin: Callable[[], None], end: Callable[[], None]) -> None:
        self._graph, self._begin, self._end = graph, begin, end

    def allreduce_sum(self, tensors: list[Any]) -> list[Any]:
        with tf.control_dependencies(tensors), tf.control_dependencies([_call(self._begin)]):
            reduced = self._graph.allreduce_sum([tf.identity(tensor) for tensor in tensors])
        with tf.control_dependencies(reduced), tf.control_dependencies([_call(self._end)]):
            return [tf.identity(tensor) for tensor in reduced]


def _call(function: Callable[[], None]) -> Any:
    """An operation that calls a function when the step runs."""

    def call() -> np.int32:
        function()
        return np.int32(0)  # it has to return something

    return tf.numpy_function(call, [], tf.int32)
