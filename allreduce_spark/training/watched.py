"""A communicator that says when its rank waits: so it can be told who keeps whom waiting."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from allreduce_spark.communicator.base import Communicator, GraphCollectives, ReduceOp
from allreduce_spark.config import Timeouts
from allreduce_spark.errors import CollectiveError, CollectiveTimeoutError
from allreduce_spark.rendezvous.status import StatusPage
from allreduce_spark.training.opening import open_communicator
from allreduce_spark.world import World

__all__ = ["WatchedCommunicator", "limited_by", "open_within", "within_graphs"]

# What Horovod's operations say where another rank is gone, or one did not come and Horovod has given up the group.
_LOST = ("Horovod has been shut down", "gloo/transport")


@contextlib.contextmanager
def limited_by(*settings: str) -> Iterator[None]:
    """Let a collective that takes too long name the `Timeouts` that limit it: a communicator knows nothing of settings.

    Raises:
        CollectiveTimeoutError: The same, and which settings to change.
    """
    try:
        yield
    except CollectiveTimeoutError as error:
        names = " or ".join(f"Timeouts.{name}" for name in settings)
        raise CollectiveTimeoutError(f"{error}. If the ranks are only slow, raise {names}") from error


def open_within(timeouts: Timeouts, backend: str, world: World) -> Communicator:
    """`open_communicator` for a rank that has imported all it needs, while another one may still be at it."""
    with limited_by("import_s", "init_s"):
        return open_communicator(backend, world, timeouts.import_s + timeouts.init_s, timeouts.collective_s)


@contextlib.contextmanager
def within_graphs() -> Iterator[None]:
    """Let a collective that fails within a compiled graph fail as those of numpy buffers do.

    Raises:
        CollectiveError: In the place of TensorFlow's error.
    """
    try:
        yield
    except tf.errors.OpError as error:
        if not any(words in error.message for words in _LOST):
            raise
        raise CollectiveError(
            f"the other ranks were lost within a step ({error.message.strip().splitlines()[0]}). If none of them has failed, "
            "one did not come in time: then raise Timeouts.collective_s"
        ) from error


class WatchedCommunicator:
    """Does what another `Communicator` does, and writes onto the status page when it is at it."""

    def __init__(self, communicator: Communicator, status: StatusPage) -> None:
        self._communicator, self._status, self._waited_s, self._began = communicator, status, 0.0, 0.0
        self.rank, self.world_size = communicator.rank, communicator.world_size
        self.timeout_s = communicator.timeout_s
        self.graph: GraphCollectives | None = (
            None if communicator.graph is None else _WatchedGraph(communicator.graph, self._begin, self._end)
        )

    def allreduce(self, buffer: np.ndarray, op: ReduceOp = ReduceOp.SUM, *, timeout_s: float | None = None) -> None:
        with self._waiting(timeout_s) as limit_s:
            self._communicator.allreduce(buffer, op, timeout_s=limit_s)

    def broadcast(self, buffer: np.ndarray, root: int = 0, *, timeout_s: float | None = None) -> None:
        with self._waiting(timeout_s) as limit_s:
            self._communicator.broadcast(buffer, root, timeout_s=limit_s)

    def allgather(self, buffer: np.ndarray, *, timeout_s: float | None = None) -> list[np.ndarray]:
        with self._waiting(timeout_s) as limit_s:
            return self._communicator.allgather(buffer, timeout_s=limit_s)

    def barrier(self, *, timeout_s: float | None = None) -> None:
        with self._waiting(timeout_s) as limit_s:
            self._communicator.barrier(timeout_s=limit_s)

    def abort(self, reason: str) -> None:
        self._communicator.abort(reason)

    def close(self) -> None:
        self._communicator.close()

    @contextlib.contextmanager
    def _waiting(self, timeout_s: float | None) -> Iterator[float]:
        """Yield the deadline of a collective."""
        self._begin()
        try:
            if timeout_s is not None:
                yield timeout_s
                return
            with limited_by("collective_s"):
                yield self.timeout_s
        finally:
            self._end()

    def _begin(self) -> None:
        self._began = time.perf_counter()
        self._status.write_waiting(True, self._waited_s)

    def _end(self) -> None:
        self._waited_s += time.perf_counter() - self._began
        self._status.write_waiting(False, self._waited_s)


class _WatchedGraph:
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
