"""Starts the processes of a benchmark: N ranks of one script on this machine, with no mpirun and no Spark.

    python ranks' script ARGUMENTS    with PMI_RANK and PMI_SIZE in the environment: a rank
    python ranks' script              without them: the benchmark itself

Each rank prints its result as JSON, in the last line of its output. `print_table` shows what came of it all.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from allreduce_spark.communicator.base import Communicator
from allreduce_spark.communicator.mpich import mpi_environment, shared_memory_segments
from allreduce_spark.launch.environment import rank_environment, thread_share
from allreduce_spark.rendezvous import pmi
from allreduce_spark.world import worlds_of

__all__ = ["is_a_rank", "join_group", "print_table", "run_ranks"]

COLLECTIVE_S = 120.0  # a rank whose partner is gone ends by itself after this time


def run_ranks(script: str, num_ranks: int, arguments: Sequence[str] = ()) -> list[Any]:
    """Run `script` in `num_ranks` processes at once, with the environment and the threads that an agent would give them.

    Returns:
        What each printed in its last line, in rank order.

    Raises:
        RuntimeError: A rank ended without a result; its output has gone to stderr.
    """
    keys = pmi.KeySpace(f"benchmark-{secrets.token_hex(8)}", num_ranks, pmi.process_mapping([0] * num_ranks))
    with contextlib.ExitStack() as stack:
        ranks = [stack.enter_context(_rank(script, rank, num_ranks, arguments)) for rank in range(num_ranks)]
        ends = [end for _, end in ranks]
        threading.Thread(target=_answer, args=(keys, ends), daemon=True).start()
        outputs = [process.communicate()[0] for process, _ in ranks]
        codes = [process.returncode for process, _ in ranks]
    if any(codes):
        raise RuntimeError(f"the ranks of {Path(script).name} ended with the exit codes {codes}")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


@contextlib.contextmanager
def _rank(
    script: str, rank: int, num_ranks: int, arguments: Sequence[str]
) -> Iterator[tuple[subprocess.Popen[str], socket.socket]]:
    """One rank, and our end of its PMI connection; it is killed, and its shared memory removed, at the end."""
    ours, theirs = socket.socketpair()
    threads = thread_share(1, num_ranks)
    extra = {**mpi_environment("lo"), **pmi.environment(rank, num_ranks, theirs.fileno())}
    environment = rank_environment(os.environ, threads=threads, gpus=None, extra=extra)
    with (
        ours,
        subprocess.Popen(
            [sys.executable, script, *arguments],
            env=environment,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
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
    from allreduce_spark.communicator.mpi import open_mpi

    rank, size = int(os.environ["PMI_RANK"]), int(os.environ["PMI_SIZE"])
    return open_mpi(worlds_of(["here"] * size)[rank], COLLECTIVE_S)


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print the rows below the head: the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    for row in (head, ["-" * width for width in widths], *rows):
        name, *values = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join((row[0].ljust(widths[0]), *values)).rstrip(), flush=True)
