"""Ranks as threads of one process: the reference implementation of a `Communicator`, for tests and for the debugger.

    first, second = LocalGroup(2, timeout_s=10).communicators     # hand one to each thread

It reduces in rank order, so a result is reproducible to the bit. The other implementations are tested against it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import reduce
from typing import Any, Final

import numpy as np

from allreduce_spark.communicator.agreement import (
    Call,
    allgather_call,
    allreduce_call,
    broadcast_call,
    disagreement,
    name_ranks,
)
from allreduce_spark.communicator.base import GraphCollectives, ReduceOp
from allreduce_spark.errors import CollectiveError, CollectiveTimeoutError
from allreduce_spark.world import World, worlds_of

__all__ = ["LocalCommunicator", "LocalGroup"]

_COMBINE: Final = {ReduceOp.SUM: np.add, ReduceOp.MIN: np.minimum, ReduceOp.MAX: np.maximum}


class _Meeting:
    """One collective: who has come, and, once all have, what came of it."""

    def __init__(self) -> None:
        self.calls: dict[int, Call] = {}
        self.contributions: dict[int, np.ndarray | None] = {}
        self.done = False
        self.result: Any = None


class LocalGroup:
    """A fixed group of ranks that share this process.

    Args:
        world_size: How many ranks there are.
        timeout_s: Seconds that a rank waits for the others in one collective.

    Attributes:
        communicators: One for each rank, in rank order.
    """

    def __init__(self, world_size: int, timeout_s: float) -> None:
        if world_size < 1:
            raise ValueError(f"a group needs at least 1 rank, got world_size={world_size}")
        self.world_size, self.timeout_s = world_size, timeout_s
        self._changed = threading.Condition()
        self._meeting = _Meeting()
        self._failure: tuple[type[CollectiveError], str] | None = None
        self.communicators = tuple(LocalCommunicator(self, world) for world in worlds_of([self] * world_size))

    def meet(
        self,
        rank: int,
        call: Call,
        contribution: np.ndarray | None = None,
        combine: Callable[[list[Any]], Any] | None = None,
        timeout_s: float | None = None,
    ) -> Any:
        """Wait until all ranks have come, and return what `combine` makes of their contributions in rank order.

        The last rank to come combines, while the others still wait: so nobody changes a buffer that is being read.

        Raises:
            CollectiveTimeoutError, CollectiveError: As in `Communicator`; then on all ranks alike.
        """
        with self._changed:
            self._raise_if_broken()
            meeting = self._meeting
            if rank in meeting.calls:
                self._break(CollectiveError, f"two threads of rank {rank} are in a collective at once: {call}")
                self._raise_if_broken()
            meeting.calls[rank], meeting.contributions[rank] = call, contribution
            if len(meeting.calls) == self.world_size:
                self._conclude(meeting, combine)
            else:
                self._await(meeting, rank, call, self.timeout_s if timeout_s is None else timeout_s)
            if not meeting.done:
                self._raise_if_broken()
            return meeting.result

    def abort(self, rank: int, reason: str) -> None:
        """Break the group: whoever waits, or comes later, gets a CollectiveError with this reason."""
        with self._changed:
            self._break(CollectiveError, f"rank {rank} aborted the group: {reason}")

    def close(self, rank: int) -> None:
        """Wait until all ranks close; afterwards no collective can be called. Does nothing in a broken group."""
        if not self._failure:
            self.meet(rank, Call("close()"))
            with self._changed:
                self._break(CollectiveError, "the communicator is closed")

    def _conclude(self, meeting: _Meeting, combine: Callable[[list[Any]], Any] | None) -> None:
        message = disagreement([meeting.calls[rank] for rank in range(self.world_size)])
        if message:
            self._break(CollectiveError, message)
            return
        try:
            if combine:
                meeting.result = combine([meeting.contributions[rank] for rank in range(self.world_size)])
        except BaseException as error:
            self._break(CollectiveError, f"{meeting.calls[0].words} failed: {error!r}")
            raise
        meeting.done = True
        self._meeting = _Meeting()
        self._changed.notify_all()

    def _await(self, meeting: _Meeting, rank: int, call: Call, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not meeting.done and not self._failure:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                missing = name_ranks([other for other in range(self.world_size) if other not in meeting.calls])
                self._break(
                    CollectiveTimeoutError,
                    f"rank {rank} waited {timeout_s:g} s for {missing} in {call}",
                )
            else:
                self._changed.wait(left_s)

    def _break(self, kind: type[CollectiveError], message: str) -> None:
        if not self._failure:  # the first failure is the one to see
            self._failure = kind, message
        self._changed.notify_all()

    def _raise_if_broken(self) -> None:
        if self._failure:
            kind, message = self._failure
            raise kind(message)


class LocalCommunicator:
    """One rank of a `LocalGroup`. See `Communicator` for the contract of its methods."""

    def __init__(self, group: LocalGroup, world: World) -> None:
        self._group, self.world = group, world
        self.rank, self.world_size, self.timeout_s = world.rank, world.world_size, group.timeout_s
        self.graph: GraphCollectives | None = None

    def allreduce(self, buffer: np.ndarray, op: ReduceOp = ReduceOp.SUM, *, timeout_s: float | None = None) -> None:
        call = allreduce_call(buffer, op)
        combined = self._group.meet(self.rank, call, buffer, lambda buffers: reduce(_COMBINE[op], buffers), timeout_s)
        if combined is not buffer:  # it is where there is one rank
            buffer[...] = combined

    def broadcast(self, buffer: np.ndarray, root: int = 0, *, timeout_s: float | None = None) -> None:
        call = broadcast_call(buffer, root, self.rank, self.world_size)
        sent = self._group.meet(self.rank, call, buffer, lambda buffers: buffers[root].copy(), timeout_s)
        if self.rank != root:
            buffer[...] = sent

    def allgather(self, buffer: np.ndarray, *, timeout_s: float | None = None) -> list[np.ndarray]:
        def copies(buffers: list[np.ndarray]) -> list[np.ndarray]:
            return [each.copy() for each in buffers]

        return copies(self._group.meet(self.rank, allgather_call(buffer), buffer, copies, timeout_s))

    def barrier(self, *, timeout_s: float | None = None) -> None:
        self._group.meet(self.rank, Call("barrier()"), timeout_s=timeout_s)

    def abort(self, reason: str) -> None:
        self._group.abort(self.rank, reason)

    def close(self) -> None:
        self._group.close(self.rank)
