"""Ranks as Horovod processes, by its Gloo or its MPI controller: the only file that imports horovod.

In each process a thread of Horovod's own agrees with the others, every millisecond, which tensors all ranks have brought, by
name, and reduces those: within a compiled graph (`HorovodGraph`), where NCCL finds them on the GPU, or given as numpy buffers.

For buffers the contract is kept as in `mpi`: before any data move, the ranks gather what each is about to do (`Call`).
Horovod itself would let ranks that disagree about a name wait for each other for ever. What may wait for ever runs in a
thread of ours, so that whoever calls can leave at the deadline; that thread stays behind with the broken group. Within a
graph Horovod keeps the deadline (HOROVOD_STALL_SHUTDOWN_TIME_SECONDS), and shuts the group down when it passes; but with its
Gloo controller it never looks (0.28.1), and whoever started the ranks must see that they do not go on.

After an error the process must be ended by `os._exit` or by a signal, as ranks are: Horovod's destructors wait for the
others. Where Gloo or MPI fail while the communicator is being opened, Horovod ends the process itself.
"""

from __future__ import annotations

import atexit
import ctypes
import math
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import contextmanager, suppress
from functools import partial, reduce
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
from allreduce_spark.communicator.horovod_environment import rank_environment
from allreduce_spark.communicator.mpich import shared_memory_segments
from allreduce_spark.errors import CollectiveError, CollectiveTimeoutError, ConfigError, MissingDependencyError
from allreduce_spark.world import World

INSTALL: Final = "Install it on every executor: allreduce-spark install-horovod"

# The library needs the MPI that it was built with, which pip installs where no linker looks.
with suppress(OSError):
    ctypes.CDLL(str(Path(sys.prefix, "lib", "libmpi.so.12")), mode=ctypes.RTLD_GLOBAL)
try:
    import horovod.tensorflow as hvd
    import tensorflow as tf
    from horovod.tensorflow.mpi_ops import _basics
except ImportError as error:
    raise MissingDependencyError(f"backend='horovod' needs Horovod, but: {error}. {INSTALL}") from error
except Exception as error:  # whatever its loader raises where it was built against another TensorFlow
    raise MissingDependencyError(f"Horovod is installed, but cannot be loaded: {error}. {INSTALL}") from error

__all__ = ["HorovodCommunicator", "HorovodGraph", "open_horovod"]

_ABORT: Final = "abort()"
_ABORT_WAIT_S: Final = 0.05
_ABORT_TELL_S: Final = (
    2.0  # For the others to come to a collective and hear the reason; then they hear of the end alone.
)
_PIECE_BYTES: Final = 1 << 30  # MPI, and Horovod what is gathered from all ranks, count in 32 bits.
_MARGIN_S: Final = 60.0

_COMBINE: Final = {ReduceOp.MIN: np.minimum, ReduceOp.MAX: np.maximum}


def open_horovod(
    world: World,
    timeout_s: float,
    *,
    controller: str = "gloo",
    gloo_store: tuple[str, int] | None = None,
    collective_s: float | None = None,
) -> HorovodCommunicator:
    """Initialise Horovod in this process, and open the communicator of all ranks.

    Args:
        world: This rank's place.
        timeout_s: Seconds to wait for the other ranks to come, and in each collective of numpy buffers.
        controller: "gloo", or "mpi": then the environment must hold what `rendezvous.pmi.environment` and `mpi_environment`
            return.
        gloo_store: Address and port of a key-value server that all ranks share (`rendezvous.gloo_store`), for Gloo.
        collective_s: Seconds that a tensor of a compiled graph may wait for those of the other ranks; `timeout_s` where None.

    Raises:
        ConfigError: Horovod was built without this controller, or came up with another rank or size.
        CollectiveError: Horovod is open in this process.
        CollectiveTimeoutError: The other ranks did not come.
    """
    if hvd.is_initialized():
        raise CollectiveError("Horovod is open in this process: a process can be one rank only")
    if not (hvd.gloo_built() if controller == "gloo" else hvd.mpi_built()):
        raise ConfigError(f"the Horovod that is installed was built without {controller}. {INSTALL}")
    collective_s = timeout_s if collective_s is None else collective_s
    longest_s = max(timeout_s, collective_s) + _MARGIN_S
    os.environ.update(
        rank_environment(
            world, controller, gloo_store=gloo_store, collective_s=collective_s, longest_s=math.ceil(longest_s)
        )
    )
    communicator = HorovodCommunicator(world, timeout_s)
    communicator.barrier()
    for segment in shared_memory_segments(os.getpid()):  # of MPI; as `open_mpi` does, and for the same reason
        Path(segment).unlink(missing_ok=True)
    return communicator


class HorovodCommunicator:
    """The ranks of one Horovod group. See `Communicator` for the contract of its methods; `open_horovod` makes one."""

    def __init__(self, world: World, timeout_s: float) -> None:
        self.world, self.rank, self.world_size, self.timeout_s = world, world.rank, world.world_size, timeout_s
        self.graph: GraphCollectives | None = HorovodGraph()
        self._busy = threading.Lock()
        self._broken: str | None = None  # why no collective can be called any more
        self._has_left = False  # aborted or closed
        self._waiting: Future[Any] | None = None
        self._runner = _Runner()
        self._wait(self._runner.submit(hvd.init), Call("open()"), time.monotonic(), timeout_s)
        atexit.unregister(_basics.shutdown)  # It would wait for the other ranks: `close` alone may.
        if (hvd.rank(), hvd.size()) != (world.rank, world.world_size):
            raise ConfigError(
                f"Horovod came up as rank {hvd.rank()} of {hvd.size()}, but this process is rank {world.rank} of "
                f"{world.world_size}: do not start Spark's executors by horovodrun, mpiexec or srun."
            )

    def allreduce(self, buffer: np.ndarray, op: ReduceOp = ReduceOp.SUM, *, timeout_s: float | None = None) -> None:
        with self._agreed(allreduce_call(buffer, op), timeout_s) as (_, run):
            flat = buffer.reshape(-1)
            if op is ReduceOp.SUM:
                for piece in _pieces(flat):
                    piece[...] = run(partial(_sum, piece))
            elif flat.size:
                # Gathered, because the minimum of Gloo and of MPI depends on the order where one of the numbers is NaN.
                for piece in _pieces(flat, ranks=self.world_size):
                    rows = run(partial(_gather, _as_bytes(piece))).view(buffer.dtype).reshape(self.world_size, -1)
                    piece[...] = reduce(_COMBINE[op], rows)

    def broadcast(self, buffer: np.ndarray, root: int = 0, *, timeout_s: float | None = None) -> None:
        with self._agreed(broadcast_call(buffer, root, self.rank, self.world_size), timeout_s) as (_, run):
            for piece in _pieces(_as_bytes(buffer)):
                sent = run(partial(_broadcast, piece, root))
                if self.rank != root:
                    piece[...] = sent

    def allgather(self, buffer: np.ndarray, *, timeout_s: float | None = None) -> list[np.ndarray]:
        with self._agreed(allgather_call(buffer), timeout_s) as (calls, run):
            gathered = _gather_in_pieces(run, _as_bytes(buffer), sizes_of_ranks(calls, buffer))
        return arrays_of_ranks(gathered, calls, buffer)

    def barrier(self, *, timeout_s: float | None = None) -> None:
        with self._agreed(Call("barrier()"), timeout_s):
            pass  # all have come: that is what agreeing takes

    def abort(self, reason: str) -> None:
        """Break the group. The others hear why if they come to a collective within seconds, and that it is over otherwise."""
        if self._has_left:
            return
        note = f"rank {self.rank} aborted the group: {reason}"
        self._has_left, self._broken = True, self._broken or note
        waiting = self._waiting
        if waiting is not None:
            with suppress(InvalidStateError):
                waiting.set_exception(CollectiveError(note))
        teller = threading.Thread(target=_tell_others, args=[self._runner, note], name="horovod-abort", daemon=True)
        teller.start()
        teller.join(_ABORT_WAIT_S)

    def close(self) -> None:
        if self._broken:
            return
        with self._agreed(Call("close()"), None) as (_, run):
            run(hvd.shutdown)
            self._has_left, self._broken = True, "the communicator is closed"

    @contextmanager
    def _agreed(
        self, call: Call, timeout_s: float | None
    ) -> Iterator[tuple[list[Call], Callable[[Callable[[], Any]], Any]]]:
        """Wait until all ranks have come and said the same; then the body may move data.

        Yields:
            What each rank said, and a function that runs another where waiting has a deadline.
        """
        if self._broken:
            raise CollectiveError(self._broken)
        if not self._busy.acquire(blocking=False):
            raise CollectiveError(f"two threads of rank {self.rank} are in a collective at once: {call}")
        try:
            started, limit_s = time.monotonic(), self.timeout_s if timeout_s is None else timeout_s

            def run(function: Callable[[], Any]) -> Any:
                return self._wait(self._runner.submit(function), call, started, limit_s)

            said = run(partial(_gather, np.frombuffer(call.to_bytes(), np.uint8)))
            yield _calls_of_all(said, self.world_size), run
        except BaseException as error:
            self._broken = self._broken or f"{type(error).__name__}: {error}"
            if isinstance(error, tf.errors.OpError):
                raise CollectiveError(f"Horovod failed in {call}: {error.message}") from error
            raise
        finally:
            self._busy.release()

    def _wait(self, future: Future[Any], call: Call, started: float, limit_s: float) -> Any:
        self._waiting = future
        if self._broken:  # Another thread of this rank has aborted, and may not have seen that we wait.
            raise CollectiveError(self._broken)
        try:
            return future.result(max(0.0, started + limit_s - time.monotonic()))
        except FutureTimeoutError:
            others = [rank for rank in range(self.world_size) if rank != self.rank]
            raise CollectiveTimeoutError(
                f"rank {self.rank} waited {time.monotonic() - started:.1f} s in {call} for {name_ranks(others)}, of which one "
                "at least did not come"
            ) from None
        finally:
            self._waiting = None


class HorovodGraph:
    """Horovod's operations within a compiled graph, on the device where the tensors are. See `GraphCollectives`."""

    def allreduce_sum(self, tensors: list[Any]) -> list[Any]:
        # By name the ranks know which tensors belong together. TensorFlow numbers what has the same name in one graph.
        return [hvd.allreduce(tensor, op=hvd.Sum, name="allreduce_sum") for tensor in tensors]


class _Runner:
    """A thread that runs one function after the other. It may never come back from one, and keeps no process alive."""

    def __init__(self) -> None:
        self._tasks: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        threading.Thread(target=self._work, name="horovod-calls", daemon=True).start()

    def submit(self, function: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        self._tasks.put((future, function))
        return future

    def _work(self) -> None:
        while True:
            future, function = self._tasks.get()
            with suppress(InvalidStateError):  # An abort was quicker, and nobody wants to know any more.
                try:
                    future.set_result(function())
                except InvalidStateError:
                    raise
                except BaseException as error:  # noqa: BLE001  whoever waits for the result gets it
                    future.set_exception(error)


def _tell_others(runner: _Runner, note: str) -> None:
    """Say in the others' next collective why it is over; after `_ABORT_TELL_S`, end it without a word."""
    text = note.encode()[: 8 * CALL_BYTES]
    text = text.ljust(-(-len(text) // CALL_BYTES) * CALL_BYTES, b"\0")
    said = Call(_ABORT, rows=len(text) // CALL_BYTES).to_bytes() + text
    with suppress(FutureTimeoutError, tf.errors.OpError):
        runner.submit(partial(_gather, np.frombuffer(said, np.uint8))).result(_ABORT_TELL_S)
    hvd.shutdown()


def _calls_of_all(said: np.ndarray, world_size: int) -> list[Call]:
    """What each rank is about to do.

    Raises:
        CollectiveError: They disagree, or one of them has aborted.
    """
    rows = iter(said.reshape(-1, CALL_BYTES))
    calls: list[Call] = []
    aborted = ""
    for _ in range(world_size):
        call = Call.from_bytes(next(rows).tobytes())
        calls.append(call)
        if call.words == _ABORT:
            note = b"".join(next(rows).tobytes() for _ in range(call.rows))
            aborted = aborted or note.rstrip(b"\0").decode(errors="replace")
    message = aborted or disagreement(calls)
    if message:
        raise CollectiveError(message)
    return calls


def _sum(piece: np.ndarray) -> np.ndarray:
    with tf.device("/cpu:0"):
        return np.asarray(hvd.allreduce(tf.convert_to_tensor(piece), op=hvd.Sum, name="sum"))


def _gather(data: np.ndarray) -> np.ndarray:
    """The bytes of all ranks, one after the other, in rank order."""
    with tf.device("/cpu:0"):
        return np.asarray(hvd.allgather(tf.convert_to_tensor(data), name="gather"))


def _gather_in_pieces(run: Callable[[Callable[[], Any]], Any], data: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """As `_gather`, of any size: in rounds, to each of which every rank brings its next piece, which may be empty."""
    gathered, step = np.empty(sum(sizes), np.uint8), _PIECE_BYTES // len(sizes)
    places = np.split(gathered, np.cumsum(sizes)[:-1])  # views, one for each rank
    for start in range(0, max(sizes), step):
        pieces = [place[start : start + step] for place in places]
        brought = run(partial(_gather, data[start : start + step]))
        for piece, part in zip(
            pieces, np.split(brought, np.cumsum([piece.size for piece in pieces])[:-1]), strict=True
        ):
            piece[...] = part
    return gathered


def _broadcast(data: np.ndarray, root: int) -> np.ndarray:
    with tf.device("/cpu:0"):
        return np.asarray(hvd.broadcast(tf.convert_to_tensor(data), root, name="broadcast"))


def _pieces(flat: np.ndarray, ranks: int = 1) -> Iterator[np.ndarray]:
    """Views of so many bytes at most as Horovod can count of all these ranks together."""
    step = _PIECE_BYTES // (flat.itemsize * ranks)
    return (flat[start : start + step] for start in range(0, flat.size, step))


def _as_bytes(buffer: np.ndarray) -> np.ndarray:
    return buffer.reshape(-1).view(np.uint8)
