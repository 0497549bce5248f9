"""The contract of a `Communicator`: a fixed group of ranks and the collectives they run together.

What every implementation promises, and `tests/communicator/test_contract.py` checks for all of them:

* All ranks call the same collectives in the same order with buffers of the same dtype and size; sizes may differ in
  `allgather` alone. Ranks that disagree get a `CollectiveError`, when the deadline passes at the latest: never a hang.
* Every rank holds the same bits after `allreduce`, `broadcast` and `allgather`.
* Every call has a deadline: a rank that waits longer than `timeout_s` for the others gets a `CollectiveTimeoutError`.
* After an error the communicator is broken: abort it, do not close it politely. A broken group is never repaired; the
  ranks are started again in a new generation (the fail-stop model of Horovod Elastic and torch.distributed.elastic).

What is *not* promised: that two threads of one rank may be in a collective at once.
"""

from __future__ import annotations

from enum import Enum
from typing import Any, Protocol, runtime_checkable

import numpy as np

from allreduce_spark.world import World

__all__ = ["Communicator", "GraphCollectives", "ReduceOp"]


class ReduceOp(str, Enum):
    """How `allreduce` combines the ranks' values, elementwise."""

    SUM = "sum"
    MIN = "min"
    MAX = "max"


@runtime_checkable
class Communicator(Protocol):
    """A fixed group of ranks. All methods are collective: every rank of the group must call them, in the same order.

    Attributes:
        world: This rank's place: also which others are on its host, by `local_rank`, `local_size` and `node_rank`.
        rank, world_size: Index of this rank in the group, and how many there are; as `world` has them.
        timeout_s: Seconds that a call waits for the other ranks where it is not given its own `timeout_s`.
        graph: The collectives that this backend can run inside a compiled graph, or None where it has numpy buffers only.
    """

    world: World
    rank: int
    world_size: int
    timeout_s: float
    graph: GraphCollectives | None

    def allreduce(self, buffer: np.ndarray, op: ReduceOp = ReduceOp.SUM, *, timeout_s: float | None = None) -> None:
        """Combine `buffer` of all ranks elementwise, in place; all ranks then hold the same bits.

        Args:
            buffer: C-contiguous, writable; dtype float32, float64, int32 or int64; any shape, may be empty.
            op: How to combine.
            timeout_s: Deadline of this call; the communicator's own where it is None.

        Raises:
            CollectiveTimeoutError: Another rank did not come in time.
            CollectiveError: The ranks disagree, or the transport failed.
            ValueError: The buffer is not contiguous or writable, or has another dtype.
        """
        ...

    def broadcast(self, buffer: np.ndarray, root: int = 0, *, timeout_s: float | None = None) -> None:
        """Overwrite `buffer`, in place, with that of `root`. Any dtype of fixed size; errors as `allreduce`."""
        ...

    def allgather(self, buffer: np.ndarray, *, timeout_s: float | None = None) -> list[np.ndarray]:
        """Give every rank the arrays of all ranks, in rank order.

        Args:
            buffer: Same dtype and same shape but for the first axis on every rank, which may be 0 long.

        Returns:
            `world_size` new arrays. Errors as `allreduce`.
        """
        ...

    def barrier(self, *, timeout_s: float | None = None) -> None:
        """Return once all ranks have called. Errors as `allreduce`."""
        ...

    def abort(self, reason: str) -> None:
        """Break the group at once, without waiting for anybody: other ranks fail in their next or current collective."""
        ...

    def close(self) -> None:
        """Leave the group in peace. All ranks must call; does nothing after `abort`."""
        ...


class GraphCollectives(Protocol):
    """Collectives on the tensors of a compiled graph: the seam for backends that bring operations of their own.

    A backend that has them (Horovod) reduces gradients on the device where they are; one that has not (MPI) gets them
    as numpy buffers, out of the graph and back. Their deadline is the backend's own.
    """

    def allreduce_sum(self, tensors: list[Any]) -> list[Any]:
        """Sum each tensor over the ranks, inside the graph being traced; shapes and dtypes as given."""
        ...
