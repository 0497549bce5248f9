"""What each rank does in the tests of a communicator; as a program, the process of one rank of MPI or Horovod.

A test names a function of this file, and every rank calls it with its communicator: a thread for `local`, a process
otherwise. The file is loaded by its path, and imports little, because every rank pays for it.

    python rank_process.py CONTROL_FD RANK WORLD_SIZE LOCAL_RANK LOCAL_SIZE NODE_RANK TIMEOUT_S BACKEND
"""

from __future__ import annotations

import os
import pickle
import socket
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from allreduce_spark.communicator.base import Communicator, ReduceOp
from allreduce_spark.communicator.horovod_environment import interface_environment
from allreduce_spark.communicator.mpich import mpi_environment, shared_memory_segments
from allreduce_spark.errors import CollectiveError, CollectiveTimeoutError
from allreduce_spark.rendezvous.pmi import environment
from allreduce_spark.world import World


@dataclass(frozen=True)
class Outcome:
    """What a function of this file returned or raised in one rank, and how many seconds it took."""

    value: Any
    error: str | None
    message: str
    traceback: str
    took_s: float


def outcome_of(name: str, communicator: Any, arguments: dict[str, Any]) -> Outcome:
    started = time.monotonic()
    try:
        value, error = globals()[name](communicator, **arguments), None
    except Exception as raised:
        value, error = None, raised
    return Outcome(
        value,
        type(error).__name__ if error else None,
        str(error) if error else "",
        "".join(traceback.format_exception(error)) if error else "",
        time.monotonic() - started,
    )


def random_array(dtype: str, shape: tuple[int, ...], seed: int, rank: int) -> np.ndarray:
    """A rank's own numbers, which the test can make too; of different magnitude, so that the order of a sum shows."""
    random = np.random.default_rng([seed, rank])
    if np.dtype(dtype).kind in "iu":
        return np.array(random.integers(0, 100, shape), dtype)
    if np.dtype(dtype).kind == "f":
        return np.array(random.standard_normal(shape) * 10.0 ** random.integers(-3, 3, shape), dtype)
    size = int(np.prod(shape, dtype=int))
    return random.integers(0, 2, size * np.dtype(dtype).itemsize, np.uint8).view(dtype).reshape(shape)


# What the tests call, each in all ranks at once.


def place(communicator: Communicator) -> tuple[World, int, int]:
    return communicator.world, communicator.rank, communicator.world_size


def allreduced(communicator: Communicator, dtype: str, shape: tuple[int, ...], op: str, seed: int = 0) -> np.ndarray:
    buffer = random_array(dtype, shape, seed, communicator.rank)
    communicator.allreduce(buffer, ReduceOp(op))
    return buffer


def allreduced_with_nan_on_one_rank(communicator: Communicator, op: str, nan_rank: int, size: int) -> np.ndarray:
    buffer = np.full(size, np.nan if communicator.rank == nan_rank else float(communicator.rank))
    communicator.allreduce(buffer, ReduceOp(op))
    return buffer


def broadcasted(communicator: Communicator, dtype: str, shape: tuple[int, ...], root: int) -> np.ndarray:
    buffer = random_array(dtype, shape, 0, communicator.rank)
    if communicator.rank == root:
        buffer.flags.writeable = False  # the root only reads
    communicator.broadcast(buffer, root)
    return buffer


def allgathered(communicator: Communicator, dtype: str, rows: list[int], columns: tuple[int, ...]) -> list[np.ndarray]:
    own = random_array(dtype, (rows[communicator.rank], *columns), 0, communicator.rank)
    before = own.copy()
    gathered = communicator.allgather(own)
    for array in gathered:
        array.view(np.uint8)[...] = 7 if array.size else 0  # they are ours to write to
    assert (own.view(np.uint8) == before.view(np.uint8)).all() if own.size else True
    return communicator.allgather(own)


def done_in_pieces(communicator: Communicator, piece_bytes: int, rows: list[int]) -> tuple[Any, Any]:
    """What an `allgather` and a maximum come to, where so many bytes are too many for Horovod; and in one go."""
    from allreduce_spark.communicator import horovod

    found = []
    for limit in (piece_bytes, horovod._PIECE_BYTES):
        horovod._PIECE_BYTES = limit
        greatest = random_array("float32", (101,), 1, communicator.rank)
        communicator.allreduce(greatest, ReduceOp.MAX)
        gathered = communicator.allgather(random_array("i8", (rows[communicator.rank], 3), 0, communicator.rank))
        found.append([greatest, *gathered])
    return found[0], found[1]


def times_around_a_barrier(communicator: Communicator) -> tuple[float, float]:
    time.sleep(0.04 * communicator.rank)
    before = time.monotonic()
    communicator.barrier()
    return before, time.monotonic()


def second_group_with_a_late_rank(communicator: Communicator, late: int, by_s: float) -> float:
    from mpi4py import MPI

    from allreduce_spark.communicator.mpi import MPICommunicator

    if communicator.rank == late:
        time.sleep(by_s)
    second = MPICommunicator(MPI.COMM_WORLD, communicator.world, timeout_s=5.0)
    buffer = np.ones(1)
    second.allreduce(buffer)
    return float(buffer[0])


def sums_from_other_threads(communicator: Communicator, threads: int) -> list[float]:
    """One thread after another, never two at once: as TensorFlow calls us."""
    sums: list[float] = []

    def work() -> None:
        buffer = np.ones(1000, np.float32)
        communicator.allreduce(buffer)
        sums.append(float(buffer.sum()))

    for _ in range(threads):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    return sums


def many_kinds_in_a_row(communicator: Communicator, rounds: int) -> list[float]:
    seen = []
    for turn in range(rounds):
        buffer = np.full(turn * 37 % 1000, turn, np.float64)
        communicator.allreduce(buffer)
        communicator.broadcast(buffer, turn % communicator.world_size)
        gathered = communicator.allgather(buffer[: (communicator.rank * turn) % 5])
        communicator.barrier()
        seen.append(float(buffer.sum() + sum(array.sum() for array in gathered)))
    return seen


def refused(
    communicator: Communicator, collective: str, buffer: np.ndarray, *, writeable: bool = True, **options: Any
) -> str:
    """Call with a buffer that no rank can send; all ranks stay in step, because none starts."""
    if not writeable:
        buffer = buffer.copy()
        buffer.flags.writeable = False
    try:
        getattr(communicator, collective)(buffer, **options)
    except ValueError as error:
        return str(error)
    return "not refused"


def one_rank_is_silent(communicator: Communicator, silent: int, timeout_s: float) -> None:
    if communicator.rank != silent:
        communicator.allreduce(np.zeros(3, np.float32), timeout_s=timeout_s)


def error_after_a_timeout(communicator: Communicator, silent: int) -> str:
    if communicator.rank == silent:
        return ""
    try:
        communicator.allreduce(np.zeros(3, np.float32), timeout_s=0.3)
    except CollectiveTimeoutError:
        pass
    started = time.monotonic()
    try:
        communicator.barrier()
    except CollectiveError as error:
        return f"{error} (took {time.monotonic() - started:.0f} s)"
    return "no error"


def one_rank_is_late(communicator: Communicator, late: int, by_s: float) -> float:
    if communicator.rank == late:
        time.sleep(by_s)
    buffer = np.ones(1)
    communicator.allreduce(buffer)
    return float(buffer[0])


def each_calls(communicator: Communicator, calls: list[tuple[str, Any, dict[str, Any]]]) -> None:
    """Each rank calls its own `(collective, buffer, options)`."""
    collective, buffer, options = calls[communicator.rank]
    getattr(communicator, collective)(*([] if buffer is None else [buffer.copy()]), **options)


def one_rank_aborts(
    communicator: Communicator, aborts: int, after_s: float = 0.0, rank_is_late: int | None = None
) -> None:
    if communicator.rank == aborts:
        time.sleep(after_s)
        communicator.abort("its shard was empty")
        return
    if communicator.rank == rank_is_late:
        time.sleep(after_s + 0.3)
    communicator.allreduce(np.zeros(3, np.float32))


def aborted_by_another_thread(communicator: Communicator) -> None:
    """Rank 0 waits in a collective while another of its threads aborts; the other ranks never come."""
    if communicator.rank == 0:
        timer = threading.Timer(0.1, communicator.abort, args=["stopped from outside"])
        timer.start()
        try:
            communicator.barrier()
        finally:
            timer.join()


def leave(communicator: Communicator, how: str) -> None:
    communicator.abort("over") if how == "abort" else communicator.close()
    communicator.close()
    communicator.abort("again")


def raise_out_of_the_program(communicator: Communicator, rank: int, timeout_s: float) -> None:
    """An error that no `except` catches ends one rank, while the others wait for it."""
    if communicator.rank == rank:
        raise SystemExit(3)
    communicator.barrier(timeout_s=timeout_s)


def summed_in_a_graph(
    communicator: Communicator, steps: int, silent: int | None = None
) -> tuple[np.ndarray, np.ndarray] | None:
    """Sum in a compiled graph, several times; what comes of it, and of the same sum by numpy."""
    import tensorflow as tf

    assert communicator.graph is not None
    if communicator.rank == silent:
        return None
    own = random_array("float32", (1000,), 5, communicator.rank)
    summed = tf.function(lambda tensor: communicator.graph.allreduce_sum([tensor])[0])
    for _ in range(steps):
        result = summed(tf.constant(own)).numpy()
    if silent is None:
        communicator.allreduce(own)
    return result, own


def names_of_own_segments(communicator: Communicator) -> list[str]:
    communicator.allreduce(np.ones(100_000))
    return sorted(shared_memory_segments(os.getpid()))


def send(control: Connection, message: Any) -> None:
    control.send_bytes(pickle.dumps(message, protocol=5))  # with older protocols numpy loses the byte order of an array


def receive(control: Connection) -> Any:
    return pickle.loads(control.recv_bytes())


def main(arguments: list[str]) -> None:
    serve(Connection(int(arguments[0])), World(*map(int, arguments[1:6])), float(arguments[6]), arguments[7])


def be_forked(control: Connection, pmi: socket.socket, world: World, timeout_s: float, backend: str) -> None:
    """The same in a process that `multiprocessing` has forked."""
    of_interface = {**mpi_environment("lo"), **interface_environment("lo")}
    os.environ.update({**of_interface, **environment(world.rank, world.world_size, pmi.fileno())})
    serve(control, world, timeout_s, backend)


def serve(control: Connection, world: World, timeout_s: float, backend: str) -> None:
    """Open the communicator, and run what the test names until it names nothing."""
    from allreduce_spark.training.opening import open_communicator

    try:
        # Ranks come when they come: the deadline is of the collectives.
        communicator = open_communicator(backend, world, max(timeout_s, 30.0), collective_s=timeout_s)
        communicator.timeout_s = timeout_s
    except Exception as error:
        send(control, (type(error).__name__, str(error)))
        return
    send(control, "ready")
    while (order := receive(control)) is not None:
        send(control, outcome_of(order[0], communicator, order[1]))
    communicator.close()


if __name__ == "__main__":
    sys.modules["rank_process"] = sys.modules["__main__"]  # so that the test process can unpickle an Outcome
    Outcome.__module__ = "rank_process"
    main(sys.argv[1:])
