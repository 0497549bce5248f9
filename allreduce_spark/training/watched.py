"""A communicator that says when its rank waits: so it can be told who keeps whom waiting."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import numpy as np

from allreduce_spark.communicator.base import Communicator, GraphCollectives, ReduceOp
from allreduce_spark.config import Timeouts
from allreduce_spark.errors import CollectiveTimeoutError
from allreduce_spark.rendezvous.status import StatusPage
from allreduce_spark.training.opening import open_communicator
from allreduce_spark.world import World

__all__ = ["WatchedCommunicator", "limited_by", "open_within"]


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


class WatchedCommunicator:
    """Does what another `Communicator` does, and writes onto the status page when it is at it."""

    def __init__(self, communicator: Communicator, status: StatusPage) -> None:
        self._communicator, self._status, self._waited_s, self._began = communicator, status, 0.0, 0.0
        # Operations of a graph that need nothing of each other run at once.
        self._lock, self._at_it = threading.Lock(), 0
        self.world, self.rank, self.world_size = communicator.world, communicator.rank, communicator.world_size
        self.timeout_s = communicator.timeout_s
        self.graph: GraphCollectives | None = None
        if communicator.graph is not None:
            from allreduce_spark.training.backends.tensorflow import WatchedGraph

            self.graph = WatchedGraph(communicator.graph, self._begin, self._end)

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
        with self._lock:
            self._at_it += 1
            if self._at_it == 1:
                self._began = time.perf_counter()
                self._status.write_waiting(True, self._waited_s)

    def _end(self) -> None:
        with self._lock:
            self._at_it -= 1
            if self._at_it == 0:
                self._waited_s += time.perf_counter() - self._began
                self._status.write_waiting(False, self._waited_s)
