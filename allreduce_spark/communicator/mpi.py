"""Ranks as MPI processes, by mpi4py on MPICH: the default, and the only file that imports mpi4py.

Importing this file loads the MPI library but does not initialise it; `open_mpi` does.

Every collective is non-blocking and polled until a deadline, because MPI itself knows none: when a rank dies, the
others spin in their collective until somebody kills them. Polling also pays: the rank yields its core now and then, so 4
ranks on 2 cores that others use, too, all-reduce 4 KB in 1.6 ms and 1 MB in 2.1 ms, where a blocking MPI_Allreduce needs
9 ms and 1.1 s. Yield by `os.sched_yield`, which takes 0.4 us; `time.sleep(0)` takes 70.

Before any data move, the ranks gather what each is about to do (`Call`, 64 bytes each). This costs about 5 us in shared
memory and 12 us by TCP, and in return:

* Ranks that disagree get an error that says who called what, before MPI can crash, hang or mix up their bytes.
* A rank waits for slower ones in this small step, where it may sleep and leave its core to others.
* Data are in flight only while all ranks are in the same collective: a silent rank leaves no buffer of ours with MPI.

After an error MPI must not be finalised, which would wait for the others; so `close` alone does that. Nothing stays in
/dev/shm either: `open_mpi` unlinks the shared memory once all ranks have mapped it.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np

from allreduce_spark.communicator.agreement import (
    CALL_BYTES,
    Call,
    allgather_call,
    allreduce_call,
    arrays_of_ranks,
    broadcast_call,
    disagreement,
    name_ranks,
    sizes_of_ranks,
)
from allreduce_spark.communicator.base import GraphCollectives, ReduceOp
from allreduce_spark.communicator.mpich import shared_memory_segments
from allreduce_spark.errors import CollectiveError, CollectiveTimeoutError, ConfigError, MissingDependencyError
from allreduce_spark.world import World

try:
    import mpi4py

    mpi4py.rc(initialize=False, finalize=False)
    from mpi4py import MPI
except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py is there, but finds no MPI library
    raise MissingDependencyError(
        f"backend='mpi' needs mpi4py and an MPICH library, but: {error}. "
        "Install both on every executor: pip install mpi4py mpich"
    ) from error

__all__ = ["MPICommunicator", "open_mpi"]

logger = logging.getLogger(__name__)

_PATIENT_AFTER_S: Final = 0.005  # A wait this long is no part of a fast collective: somebody is late.
# Within a host MPICH reduces 100 MB three times as fast in pieces that stay in the caches: 10 ms instead of 34 with two ranks.
# Between hosts each piece costs the delays of several messages: four on a busy machine reduced 10 MB in 0.66 s at once, where
# the network takes 0.60, and in 0.76 to 0.93 by pieces of 1 MB. A limit keeps down the memory: MPICH takes as much again.
_LOCAL_PIECE_BYTES: Final = 1 << 20
_REMOTE_PIECE_BYTES: Final = 1 << 24
_LONGEST_SLEEP_S: Final = 0.001
# Whoever yields to other work on the machine may get the core back after milliseconds only: in the case above 4 KB took 8 ms
# and 1 MB took 9 with a yield after each poll, and 100 MB between 2 ranks 890 ms instead of 230.
_POLLS_PER_YIELD: Final = 100
_ABORT_TAG: Final = 1
_ABORT_NOTE_BYTES: Final = 512  # Small messages leave at once, without waiting for the receiver.
_ABORT_WAIT_S: Final = 0.05

_Transfer = Callable[[MPI.Request, Any], None]


def open_mpi(world: World, timeout_s: float) -> MPICommunicator:
    """Initialise MPI in this process, and open a communicator of all ranks. Works once per process.

    The environment must hold what `rendezvous.pmi.environment` and `mpi_environment` return. MPI_Init itself knows no
    deadline: whoever started this process must watch it.

    Args:
        world: Who this process is to be.
        timeout_s: Seconds that a collective waits for the other ranks, the opening among them.

    Raises:
        ConfigError: MPI came up with another rank or size, or without support for threads.
        CollectiveError: MPI was opened in this process before.
        CollectiveTimeoutError: The other ranks initialised MPI but did not come to the first barrier.
    """
    if MPI.Is_finalized():
        raise CollectiveError("MPI was opened and closed in this process, which works only once: start a new process")
    if not MPI.Is_initialized():
        # TensorFlow calls from threads of its own, one at a time.
        MPI.Init_thread(MPI.THREAD_SERIALIZED)
    if MPI.Query_thread() < MPI.THREAD_SERIALIZED:
        raise ConfigError("MPI was initialised without support for threads: ask for MPI.THREAD_SERIALIZED or more")
    _check_world(world, MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size)
    # COMM_SELF stands for errors of no communicator in particular, such as a lost connection that a poll comes upon.
    for each in (MPI.COMM_WORLD, MPI.COMM_SELF):
        each.Set_errhandler(MPI.ERRORS_RETURN)
    shares_memory = world.local_size == world.world_size
    piece_bytes = _LOCAL_PIECE_BYTES if shares_memory else _REMOTE_PIECE_BYTES
    communicator = MPICommunicator(MPI.COMM_WORLD, world, timeout_s, piece_bytes)
    communicator.barrier()
    # All ranks of this host have mapped the shared memory by now. It lives on without a name, and ends with the last
    # process, so nothing is left behind however a rank ends. MPI_Finalize does not mind.
    for segment in shared_memory_segments(os.getpid()):
        Path(segment).unlink(missing_ok=True)
    return communicator


def _check_world(world: World, rank: int, size: int) -> None:
    if (rank, size) == (world.rank, world.world_size):
        return
    library = MPI.Get_library_version().strip().splitlines()[0][:80]
    if size == 1:
        MPI.Finalize()  # alone, it waits for nobody; and it removes the shared memory
        hint = (
            "It did not find PMI_FD, PMI_RANK and PMI_SIZE in its environment, or does not understand them: "
            "the library must be MPICH or Intel MPI; Open MPI cannot be used (pip install mpich)."
        )
    else:
        hint = "It took its rank from another launcher: do not start Spark's executors by mpiexec or srun."
    raise ConfigError(
        f"MPI came up as rank {rank} of {size}, but this process is rank {world.rank} of {world.world_size}. "
        f"{hint} The library is {library}."
    )


class MPICommunicator:
    """The ranks of an MPI communicator. See `Communicator` for the contract of its methods; `open_mpi` makes one.

    Args:
        parent: The group; duplicated, so that messages of others never mix with ours. All its ranks must come.
        world: This rank's place in it.
        timeout_s: Seconds that a collective waits for the other ranks.
        piece_bytes: An all-reduce of more goes piece by piece. The same on all ranks.
    """

    def __init__(
        self, parent: MPI.Intracomm, world: World, timeout_s: float, piece_bytes: int = _LOCAL_PIECE_BYTES
    ) -> None:
        self.world, self.rank, self.world_size, self.timeout_s = world, world.rank, world.world_size, timeout_s
        self._piece_bytes = piece_bytes
        self.graph: GraphCollectives | None = None
        self._busy = threading.Lock()
        self._broken: str | None = None  # why no collective can be called any more
        self._has_left = False  # aborted or closed
        self._in_flight: list[Any] = []  # given up, and never freed: MPI may yet read or write there
        self._received = np.zeros((self.world_size, CALL_BYTES), np.uint8)
        # MPI's own minimum of a number and NaN depends on their order, which differs between the ranks. numpy's is NaN,
        # and commute=False keeps the order of the ranks, so that all get the same bits.
        self._float_ops = {
            ReduceOp.MIN: MPI.Op.Create(_elementwise(np.minimum), commute=False),
            ReduceOp.MAX: MPI.Op.Create(_elementwise(np.maximum), commute=False),
        }
        self._comm = parent
        duplicate, duplication = parent.Idup()
        self._wait(duplication, Call("open()"), time.monotonic(), timeout_s)
        self._comm = duplicate  # not to be touched before the wait is over
        self._comm.Set_errhandler(MPI.ERRORS_RETURN)

    def allreduce(self, buffer: np.ndarray, op: ReduceOp = ReduceOp.SUM, *, timeout_s: float | None = None) -> None:
        with self._agreed(allreduce_call(buffer, op), timeout_s) as (_, transfer):
            operation, flat = self._operation(op, buffer.dtype), buffer.reshape(-1)
            step = self._piece_bytes // buffer.itemsize
            for piece in (flat[start : start + step] for start in range(0, flat.size, step)):
                transfer(self._comm.Iallreduce(MPI.IN_PLACE, piece, operation), piece)

    def broadcast(self, buffer: np.ndarray, root: int = 0, *, timeout_s: float | None = None) -> None:
        with self._agreed(broadcast_call(buffer, root, self.rank, self.world_size), timeout_s) as (_, transfer):
            if buffer.size:
                transfer(self._comm.Ibcast([_as_bytes(buffer), MPI.BYTE], root), buffer)

    def allgather(self, buffer: np.ndarray, *, timeout_s: float | None = None) -> list[np.ndarray]:
        with self._agreed(allgather_call(buffer), timeout_s) as (calls, transfer):
            sizes = sizes_of_ranks(calls, buffer)
            gathered = np.empty(sum(sizes), np.uint8)
            if gathered.size:
                received = [gathered, sizes, MPI.BYTE]
                transfer(self._comm.Iallgatherv([_as_bytes(buffer), MPI.BYTE], received), (buffer, gathered))
        return arrays_of_ranks(gathered, calls, buffer)

    def barrier(self, *, timeout_s: float | None = None) -> None:
        with self._agreed(Call("barrier()"), timeout_s):
            pass  # all have come: that is what agreeing takes

    def abort(self, reason: str) -> None:
        """Break the group, and tell the other ranks, who look for it whenever a collective takes longer than usual."""
        if self._has_left:
            return
        note = f"rank {self.rank} aborted the group: {reason}"
        self._has_left, self._broken = True, self._broken or note
        # In a thread of its own, because MPI_Isend by TCP to a rank that has died tries again for ever.
        teller = threading.Thread(target=self._tell_others, args=[note], name="mpi-abort", daemon=True)
        teller.start()
        teller.join(_ABORT_WAIT_S)

    def close(self) -> None:
        if self._broken:
            return
        with self._agreed(Call("close()"), None):
            self._has_left, self._broken = True, "the communicator is closed"
            for operation in self._float_ops.values():
                operation.Free()
            self._comm.Free()
            MPI.Finalize()

    @contextmanager
    def _agreed(self, call: Call, timeout_s: float | None) -> Iterator[tuple[list[Call], _Transfer]]:
        """Wait until all ranks have come and said the same; then the body may move data.

        Yields:
            What each rank said, and a function that waits for a request and keeps its second argument alive till then.
        """
        self._raise_if_broken()
        if not self._busy.acquire(blocking=False):
            raise CollectiveError(f"two threads of rank {self.rank} are in a collective at once: {call}")
        try:
            started, limit_s = time.monotonic(), self.timeout_s if timeout_s is None else timeout_s
            own = call.to_bytes()
            self._received.fill(0)
            self._wait(self._comm.Iallgather(own, self._received), call, started, limit_s, own, may_sleep=True)
            calls = self._calls_of_all(call, own)
            yield calls, lambda request, kept: self._wait(request, call, started, limit_s, kept)
        except BaseException as error:
            self._broken = self._broken or f"{type(error).__name__}: {error}"
            if isinstance(error, MPI.Exception):
                raise CollectiveError(f"MPI failed in {call}: {error}") from error
            raise
        finally:
            self._busy.release()

    def _calls_of_all(self, call: Call, own: bytes) -> list[Call]:
        if self._received.tobytes() == own * self.world_size:
            return [call] * self.world_size
        calls = [Call.from_bytes(row.tobytes()) for row in self._received]
        message = disagreement(calls)
        if message:
            raise CollectiveError(message)
        return calls

    def _wait(
        self,
        request: MPI.Request,
        call: Call,
        started: float,
        limit_s: float,
        kept: Any = None,
        *,
        may_sleep: bool = False,
    ) -> None:
        """Poll until the request is complete, and yield the core in between.

        Args:
            request: What to wait for.
            call: What is named in an error.
            started: When the collective began, by `time.monotonic`.
            limit_s: Seconds after which it fails.
            kept: Buffers of the request.
            may_sleep: Only the arrival of other ranks is waited for, so that sleeping loses no bandwidth.
        """
        next_look_s, polls, is_patient = _PATIENT_AFTER_S, 0, False
        try:
            while not request.Test():
                polls += 1
                if polls % _POLLS_PER_YIELD and not is_patient:
                    continue
                waited_s = time.monotonic() - started
                if waited_s >= next_look_s:
                    next_look_s = waited_s + _LONGEST_SLEEP_S
                    self._raise_if_hopeless(call, waited_s, limit_s)
                is_patient = may_sleep and waited_s >= _PATIENT_AFTER_S
                if is_patient:
                    time.sleep(min(waited_s / 100, _LONGEST_SLEEP_S))  # and so come about 1% too late at most
                else:
                    os.sched_yield()
        except BaseException:
            self._in_flight.append((request, kept))
            raise

    def _raise_if_hopeless(self, call: Call, waited_s: float, limit_s: float) -> None:
        self._raise_if_broken()  # another thread of this rank may have aborted
        message = self._comm.Improbe(MPI.ANY_SOURCE, _ABORT_TAG)
        if message:
            note = np.zeros(_ABORT_NOTE_BYTES, np.uint8)
            message.Recv(note)
            raise CollectiveError(note.tobytes().rstrip(b"\0").decode(errors="replace"))
        if waited_s < limit_s:
            return
        silent = [rank for rank in range(self.world_size) if rank != self.rank and not self._received[rank].any()]
        waited_for = f"{name_ranks(silent)}, of which one at least did not come" if silent else "the data of the others"
        raise CollectiveTimeoutError(f"rank {self.rank} waited {waited_s:.1f} s in {call} for {waited_for}")

    def _tell_others(self, note: str) -> None:
        """Send each rank the note, as far as that can be done at once. MPI is not called any more afterwards."""
        # A thread that is in a collective sees within a millisecond that the group is broken, and leaves MPI to us.
        if not self._busy.acquire(timeout=_ABORT_WAIT_S):
            return
        data = np.frombuffer(note.encode()[:_ABORT_NOTE_BYTES], np.uint8)
        deadline = time.monotonic() + _ABORT_WAIT_S
        try:
            others = [rank for rank in range(self.world_size) if rank != self.rank]
            requests = [self._comm.Isend(data, rank, _ABORT_TAG) for rank in others]
            self._in_flight.append((requests, data))
            while not MPI.Request.Testall(requests) and time.monotonic() < deadline:
                os.sched_yield()
        except MPI.Exception as error:
            logger.debug("could not tell all ranks of the abort: %s", error)

    def _raise_if_broken(self) -> None:
        if self._broken:
            raise CollectiveError(self._broken)

    def _operation(self, op: ReduceOp, dtype: np.dtype) -> MPI.Op:
        if op is ReduceOp.SUM:
            return MPI.SUM
        if dtype.kind == "f":
            return self._float_ops[op]
        return MPI.MIN if op is ReduceOp.MIN else MPI.MAX


def _elementwise(ufunc: np.ufunc) -> Callable[[Any, Any, MPI.Datatype], None]:
    """A reduction for MPI: accumulated = ufunc(incoming, accumulated), where `incoming` comes from the lower ranks."""

    def combine(incoming: Any, accumulated: Any, datatype: MPI.Datatype) -> None:
        dtype = np.dtype(datatype.tocode())
        target = np.frombuffer(accumulated, dtype)
        ufunc(np.frombuffer(incoming, dtype), target, out=target)

    return combine


def _as_bytes(buffer: np.ndarray) -> np.ndarray:
    return buffer.reshape(-1).view(np.uint8)
