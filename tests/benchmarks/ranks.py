"""Starts the processes of a benchmark: N ranks of one script on this machine, with no mpirun and no Spark.

The ranks run the very script that starts them; `is_a_rank` tells the two apart. Each prints its result as JSON, in the
last line of its output.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from allreduce_spark.communicator.base import Communicator
from allreduce_spark.communicator.mpich import mpi_environment, shared_memory_segments
from allreduce_spark.launch.environment import rank_environment, thread_share
from allreduce_spark.rendezvous import pmi
from allreduce_spark.training.__main__ import PR_SET_PDEATHSIG
from allreduce_spark.world import worlds_of

__all__ = ["is_a_rank", "join_group", "run_ranks"]

COLLECTIVE_S = 120.0


def run_ranks(script: str, num_ranks: int, arguments: Sequence[str] = ()) -> list[Any]:
    """Run `script` in `num_ranks` processes at once, in the environment that an agent would give them.

    Returns:
        What each printed in its last line, in rank order.

    Raises:
        RuntimeError: A rank failed; the message ends in its output.
    """
    keys = pmi.KeySpace(f"benchmark-{secrets.token_hex(8)}", num_ranks, pmi.process_mapping([0] * num_ranks))
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(num_ranks)]
        ranks = [
            stack.enter_context(_rank([sys.executable, script, *arguments], rank, num_ranks, file))
            for rank, file in enumerate(files)
        ]
        ends = [end for _, end in ranks]
        threading.Thread(target=_answer, args=(keys, ends), daemon=True).start()
        codes = [process.wait() for process, _ in ranks]
        outputs = [_read(output) for output in files]
    if any(codes):
        texts = "".join(f"\nRank {rank}:\n{output}" for rank, output in enumerate(outputs))
        raise RuntimeError(f"the ranks of {Path(script).name} ended with the exit codes {codes}{texts}")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def _read(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


@contextlib.contextmanager
def _rank(
    command: Sequence[str], rank: int, num_ranks: int, output: IO[bytes]
) -> Iterator[tuple[subprocess.Popen[bytes], socket.socket]]:
    """One rank, and our end of its PMI connection; it is killed, and its shared memory removed, at the end.

    What it prints goes to a file: nobody reads pipes while all are waited for, and a full one would stop it.
    """
    ours, theirs = socket.socketpair()
    threads = thread_share(1, num_ranks)
    extra = {**mpi_environment("lo"), **pmi.environment(rank, num_ranks, theirs.fileno())}
    environment = rank_environment(os.environ, threads=threads, gpus=None, extra=extra)
    with (
        ours,
        subprocess.Popen(
            command,
            env=environment,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        theirs.close()  # so that ours reads the end of the stream when the rank is gone
        try:
            yield process, ours
        finally:
            segments = shared_memory_segments(process.pid)
            process.kill()
            for segment in segments:
                Path(segment).unlink(missing_ok=True)


def _answer(keys: pmi.KeySpace, ends: Sequence[socket.socket]) -> None:
    """Answer the ranks' PMI words until all of them have hung up. A thread's whole life."""
    unfinished = [b""] * len(ends)
    with selectors.DefaultSelector() as selector, contextlib.suppress(OSError):
        for rank, end in enumerate(ends):
            selector.register(end, selectors.EVENT_READ, rank)
        while selector.get_map():
            for key, _ in selector.select():
                rank = key.data
                data = ends[rank].recv(1 << 16)
                if not data:
                    selector.unregister(ends[rank])
                *lines, unfinished[rank] = (unfinished[rank] + data).split(b"\n")
                for line in lines:
                    for receiver, reply in keys.answer(rank, line.decode()):
                        ends[receiver].sendall(reply.encode() + b"\n")


def is_a_rank() -> bool:
    """Whether this process was started by `run_ranks`."""
    return "PMI_RANK" in os.environ


def join_group() -> Communicator:
    """The communicator of this rank, opened as `training.rank` opens it."""
    from allreduce_spark.communicator.mpi import open_mpi  # not above: the script itself is to have no MPI

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a benchmark that is killed leaves no rank behind
    rank, size = int(os.environ["PMI_RANK"]), int(os.environ["PMI_SIZE"])
    return open_mpi(worlds_of(["here"] * size)[rank], COLLECTIVE_S)
