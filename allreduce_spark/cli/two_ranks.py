"""A real test, for the doctor and after an install: two processes on this machine, started as an agent starts its rank, and
one all-reduce.

    python -m allreduce_spark.cli.two_ranks RANK NODE,NODE BACKEND TIMEOUT_S        one of the two processes

Nothing at the top of this file needs an installed package: the first thing that does is the rank process itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from allreduce_spark.cli.result import Result, fail, ok
from allreduce_spark.communicator.horovod_environment import interface_environment
from allreduce_spark.communicator.mpich import mpi_environment, shared_memory_segments
from allreduce_spark.errors import AllReduceSparkError, CollectiveError, CollectiveTimeoutError, RankFailedError
from allreduce_spark.launch.environment import interface_of, own_address, rank_environment
from allreduce_spark.rendezvous import pmi
from allreduce_spark.world import worlds_of

__all__ = ["allreduce_of_two", "check_shared_memory_allreduce", "check_tcp_allreduce"]

TIMEOUT_S = 60.0
ELEMENTS = 1 << 18  # 1 MiB of float32: the gradients of a small model
LOG_LINES = 20


def check_shared_memory_allreduce() -> Result:
    """Both ranks on one host: through shared memory."""
    return _check((0, 0))


def check_tcp_allreduce() -> Result:
    """The same two, told that they are on two hosts: by TCP over the interface that a fit would use."""
    return _check((0, 1))


def _check(nodes: tuple[int, int]) -> Result:
    interface = _interface()
    try:
        milliseconds = allreduce_of_two(nodes, interface, TIMEOUT_S)
    except CollectiveTimeoutError as error:
        return fail(
            f"no answer within {TIMEOUT_S:.0f} s",
            f"{error} MPI is most often stopped by a network interface that leads nowhere: set SPARK_LOCAL_IP to an "
            "address of this host that works, or FI_TCP_IFACE to the name of its interface.",
        )
    except AllReduceSparkError as error:
        return fail("two ranks could not reduce together", f"Look at mpi and shared-memory first. {error}")
    way = "shared memory" if nodes[0] == nodes[1] else f"TCP on {interface or 'the interface that MPICH chose'}"
    return ok(f"1 MiB of 2 ranks by {way} in {milliseconds:.1f} ms")


def _interface() -> str | None:
    with contextlib.suppress(OSError):
        return interface_of(own_address(os.environ)[1])
    return None


def allreduce_of_two(nodes: tuple[int, int], interface: str | None, timeout_s: float, backend: str = "mpi") -> float:
    """Start two ranks, answer their PMI words, and let them sum an array.

    Args:
        nodes: For each rank the index of its host, as it is to believe.
        interface: For the traffic by TCP; None leaves the choice to MPICH.
        timeout_s: For all of it.
        backend: "mpi", "horovod" or "horovod-mpi".

    Returns:
        How many milliseconds the quickest of a few all-reduces took.

    Raises:
        CollectiveTimeoutError: It was not over in time.
        RankFailedError: A rank ended without a right result.
    """
    deadline = time.monotonic() + timeout_s
    key_space = pmi.KeySpace(f"doctor_{secrets.token_hex(8)}", len(nodes), pmi.process_mapping(nodes))
    with contextlib.ExitStack() as stack:
        ends = [
            stack.enter_context(_rank_process(rank, nodes, interface, timeout_s, backend)) for rank in range(len(nodes))
        ]
        return max(_answer_until_closed(key_space, ends, deadline))


@contextlib.contextmanager
def _rank_process(
    rank: int, nodes: tuple[int, int], interface: str | None, timeout_s: float, backend: str
) -> Iterator[tuple[subprocess.Popen[str], socket.socket]]:
    """One rank, and our end of its PMI connection; it is killed, and its shared memory removed, at the end."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        of_interface = {**mpi_environment(interface), **interface_environment(interface)}
        extra = {**of_interface, **pmi.environment(rank, len(nodes), theirs.fileno())}
        words = [str(rank), ",".join(map(str, nodes)), backend, str(timeout_s)]
        command = [sys.executable, "-m", "allreduce_spark.cli.two_ranks", *words]
        with subprocess.Popen(
            command,
            env=rank_environment(os.environ, threads=1, gpus=None, extra=extra),
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process:
            theirs.close()  # so that ours reads the end of the stream when the rank is gone
            try:
                yield process, ours
            finally:
                segments = shared_memory_segments(process.pid)
                process.kill()
                for segment in segments:
                    Path(segment).unlink(missing_ok=True)


def _answer_until_closed(
    key_space: pmi.KeySpace, ends: list[tuple[subprocess.Popen[str], socket.socket]], deadline: float
) -> list[float]:
    """Answer the ranks' PMI words until both have hung up; their results, in the order in which they ended."""
    results: list[float] = []
    unfinished = [b""] * len(ends)
    with selectors.DefaultSelector() as selector:
        for index, (_, end) in enumerate(ends):
            selector.register(end, selectors.EVENT_READ, index)
        while selector.get_map():
            for key, _ in selector.select(_left(deadline, len(results))):
                rank: int = key.data
                process, end = ends[rank]
                data = _receive(end)
                if not data:
                    selector.unregister(end)
                    # Asked for at once: if this rank failed, the other would wait in vain.
                    results.append(_result(rank, process, deadline))
                *lines, unfinished[rank] = (unfinished[rank] + data).split(b"\n")
                for line in lines:
                    for receiver, reply in key_space.answer(rank, line.decode(errors="replace")):
                        ends[receiver][1].sendall(reply.encode() + b"\n")
    return results


def _receive(end: socket.socket) -> bytes:
    with contextlib.suppress(ConnectionError):
        return end.recv(1 << 16)
    return b""


def _left(deadline: float, ended: int) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise CollectiveTimeoutError(f"{ended} of 2 ranks had ended when the time was over.")
    return left


def _result(rank: int, process: subprocess.Popen[str], deadline: float) -> float:
    """The milliseconds in a rank's last line. Without that line it has failed, whatever its exit code."""
    try:
        output, _ = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired as error:
        raise CollectiveTimeoutError(f"rank {rank} did not exit.") from error
    lines = output.strip().splitlines()
    try:
        return float(json.loads(lines[-1])["milliseconds"])
    except (IndexError, ValueError, KeyError, TypeError) as error:
        cause = f"ended with exit code {process.returncode} and no result"
        raise RankFailedError(cause, rank=rank, log_tail=tuple(lines[-LOG_LINES:])) from error


def be_a_rank(rank: int, nodes: tuple[int, ...], backend: str, timeout_s: float) -> float:
    """Open a communicator, sum an array a few times, check the sum, close; the milliseconds of the quickest."""
    import numpy as np

    from allreduce_spark.training.opening import open_communicator

    communicator = open_communicator(backend, worlds_of(nodes)[rank], timeout_s, timeout_s)
    expected = len(nodes) * (len(nodes) + 1) / 2
    seconds = []
    for _ in range(5):
        buffer = np.full(ELEMENTS, rank + 1, np.float32)
        begin = time.perf_counter()
        communicator.allreduce(buffer)
        seconds.append(time.perf_counter() - begin)
        if not (buffer == expected).all():
            raise CollectiveError(f"the sum should be {expected} everywhere, but is {buffer.min()} to {buffer.max()}")
    communicator.close()
    return 1000 * min(seconds)


if __name__ == "__main__":
    own_rank, its_nodes, its_backend, its_timeout_s = sys.argv[1:]
    signal.alarm(int(float(its_timeout_s)) + 10)  # the end of a rank whose doctor was killed
    best = be_a_rank(int(own_rank), tuple(map(int, its_nodes.split(","))), its_backend, float(its_timeout_s))
    print(json.dumps({"milliseconds": best}))
