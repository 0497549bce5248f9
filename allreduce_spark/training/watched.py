"""A communicator that says when its rank waits: so it can be told who keeps whom waiting."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import numpy as np

from allreduce_spark.communicator.base import Communicator, GraphCollectives, ReduceOp
from allreduce_spark.rendezvous.status import StatusPage

__all__ = ["WatchedCommunicator"]


class WatchedCommunicator:
    """Does what another `Communicator` does, and writes onto the status page when it is at it."""

    def __init__(self, communicator: Communicator, status: StatusPage) -> None:
        self._communicator, self._status, self._waited_s = communicator, status, 0.0
        self.rank, self.world_size = communicator.rank, communicator.world_size
        self.timeout_s = communicator.timeout_s
        self.graph: GraphCollectives | None = communicator.graph

    def allreduce(self, buffer: np.ndarray, op: ReduceOp = ReduceOp.SUM, *, timeout_s: float | None = None) -> None:
        with self._waiting():
            self._communicator.allreduce(buffer, op, timeout_s=self._deadline(timeout_s))

    def broadcast(self, buffer: np.ndarray, root: int = 0, *, timeout_s: float | None = None) -> None:
        with self._waiting():
            self._communicator.broadcast(buffer, root, timeout_s=self._deadline(timeout_s))

    def allgather(self, buffer: np.ndarray, *, timeout_s: float | None = None) -> list[np.ndarray]:
        with self._waiting():
            return self._communicator.allgather(buffer, timeout_s=self._deadline(timeout_s))

    def barrier(self, *, timeout_s: float | None = None) -> None:
        with self._waiting():
            self._communicator.barrier(timeout_s=self._deadline(timeout_s))

    def abort(self, reason: str) -> None:
        self._communicator.abort(reason)

    def close(self) -> None:
        self._communicator.close()

    def _deadline(self, timeout_s: float | None) -> float:
        return self.timeout_s if timeout_s is None else timeout_s

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        began = time.perf_counter()
        self._status.write_waiting(True, self._waited_s)
        try:
            yield
        finally:
            self._waited_s += time.perf_counter() - began
            self._status.write_waiting(False, self._waited_s)
