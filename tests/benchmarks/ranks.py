"""Starts the processes of a benchmark: ranks of one script, with no mpirun and no Spark.

The ranks run the very script that starts them; `is_a_rank` tells the two apart. Each prints its result as JSON, in the last
line of its output (`run_ranks`), or answers one line after the other (`talking_ranks`).
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
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from allreduce_spark.communicator.base import Communicator
from allreduce_spark.communicator.horovod_environment import interface_environment
from allreduce_spark.communicator.mpich import mpi_environment, shared_memory_segments
from allreduce_spark.launch.environment import rank_environment, thread_share
from allreduce_spark.rendezvous import pmi
from allreduce_spark.training.forking import die_with
from allreduce_spark.world import worlds_of

__all__ = ["Place", "ask_ranks", "is_a_rank", "join_group", "run_ranks", "talking_ranks"]

COLLECTIVE_S = 120.0
NODES = "BENCHMARK_NODES"  # the variable of a rank's environment that names the node of each


@dataclass(frozen=True)
class Place:
    """Where a rank runs.

    Attributes:
        node: Index of its host.
        interface: Over which it talks to other hosts.
        prefix: Words before its command.
    """

    node: int = 0
    interface: str = "lo"
    prefix: tuple[str, ...] = ()


def run_ranks(script: str, num_ranks: int, arguments: Sequence[str] = ()) -> list[Any]:
    """Run `script` in `num_ranks` processes on this machine at once, in the environment that an agent would give them.

    Returns:
        What each printed in its last line, in rank order.

    Raises:
        RuntimeError: A rank failed; the message ends in its output.
    """
    with contextlib.ExitStack() as stack:
        # Files, because nobody reads pipes while all are waited for, and a full one would stop its rank.
        files = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(num_ranks)]
        streams = [{"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT} for file in files]
        ranks = stack.enter_context(_ranks([script, *arguments], [Place()] * num_ranks, streams))
        codes = [process.wait() for process in ranks]
        outputs = [_read(output) for output in files]
    if any(codes):
        texts = "".join(f"\nRank {rank}:\n{output}" for rank, output in enumerate(outputs))
        raise RuntimeError(f"the ranks of {Path(script).name} ended with the exit codes {codes}{texts}")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


@contextlib.contextmanager
def talking_ranks(
    script: str, places: Sequence[Place], arguments: Sequence[str] = ()
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Run `script` in a process at each place; what is written to its `stdin` and read from its `stdout` is up to both.

    Raises:
        RuntimeError: A rank hung up (`ask_ranks`); the message ends in what the ranks wrote to their stderr.
    """
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile()) for _ in places]
        streams = [{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": file} for file in files]
        try:
            with _ranks([script, *arguments], places, streams) as ranks:
                yield ranks
        except EOFError as error:
            texts = "".join(f"\nRank {rank}:\n{_read(file)}" for rank, file in enumerate(files))
            raise RuntimeError(f"{error}{texts}") from error


def ask_ranks(ranks: Sequence[subprocess.Popen[bytes]], question: Any) -> list[Any]:
    """Send all ranks a line of JSON; what each answered, in rank order.

    Raises:
        EOFError: One of them hung up.
    """
    for process in ranks:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # what it said last is told below
            process.stdin.write(json.dumps(question).encode() + b"\n")
            process.stdin.flush()
    answers = []
    for rank, process in enumerate(ranks):
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise EOFError(f"rank {rank} ended instead of an answer to {question}")
        answers.append(json.loads(line))
    return answers


def _read(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


@contextlib.contextmanager
def _ranks(
    arguments: Sequence[str], places: Sequence[Place], streams: Sequence[Mapping[str, Any]]
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """A process at each place, whose PMI words are answered; all are killed at the end."""
    nodes = [place.node for place in places]
    keys = pmi.KeySpace(f"benchmark-{secrets.token_hex(8)}", len(places), pmi.process_mapping(nodes))
    with contextlib.ExitStack() as stack:
        ends, processes = [], []
        for rank, place in enumerate(places):
            ours, theirs = socket.socketpair()
            ends.append(stack.enter_context(ours))
            extra = {
                **mpi_environment(place.interface),
                **interface_environment(place.interface),
                **pmi.environment(rank, len(places), theirs.fileno()),
                NODES: ",".join(map(str, nodes)),
            }
            threads = thread_share(1, len(places))
            process = subprocess.Popen(
                [*place.prefix, sys.executable, *arguments],
                env=rank_environment(os.environ, threads=threads, gpus=None, extra=extra),
                pass_fds=[theirs.fileno()],
                **streams[rank],
            )
            theirs.close()  # so that ours reads the end of the stream when the rank is gone
            processes.append(stack.enter_context(process))
            stack.callback(_end, process)
        threading.Thread(target=_answer, args=(keys, ends), daemon=True).start()
        yield processes


def _end(process: subprocess.Popen[bytes]) -> None:
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
    """Whether this process was started as a rank; a benchmark that is killed leaves none behind."""
    if NODES not in os.environ:
        return False
    die_with(os.getppid())
    return True


def join_group(backend: str = "mpi") -> Communicator:
    """The communicator of this rank, opened as `training.rank` opens it."""
    from allreduce_spark.training.opening import open_communicator

    world = worlds_of(os.environ[NODES].split(","))[int(os.environ["PMI_RANK"])]
    return open_communicator(backend, world, COLLECTIVE_S, COLLECTIVE_S)
