"""The warm process, seen from its agent: it imports TensorFlow while nobody waits for it, and then forks ranks."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from allreduce_spark.launch.process import RankProcess
from allreduce_spark.rendezvous.client import Channel
from allreduce_spark.training.forking import Request

__all__ = ["WarmProcess"]


class WarmProcess:
    """A child process that runs `allreduce_spark.training`, from which this agent's ranks are forked, one after the other.

    It is started as early as possible, before the shard is on disk, because importing TensorFlow takes seconds. This and
    `start_rank` must happen in the agent's main thread: the process asks the kernel to be killed with its parent
    (PR_SET_PDEATHSIG), and for the kernel that is the thread that started it. Ranks die with it in the same way.
    """

    def __init__(self, folder: Path, threads: int, environment: Mapping[str, str]) -> None:
        """Start it.

        Args:
            folder: The agent's scratch folder.
            threads: Cores that a rank may keep busy.
            environment: For the process and for its ranks: TensorFlow reads some of it when it is imported. What tells the
                ranks from each other is added later.
        """
        self._folder, self._threads, self._environment = folder, threads, dict(environment)
        self._output: tuple[int, ...] = ()  # a pipe, until there is a rank to read it
        self._start()

    def start_rank(self, rank: int, num_ranks: int) -> RankProcess:
        """Have a rank forked, at once or as soon as TensorFlow has been imported. Does not wait for it.

        If the warm process has died since the last time, there is a new one first.
        """
        try:
            return self._ask(rank, num_ranks)
        except ConnectionError:
            self.close()
            self._start()
            return self._ask(rank, num_ranks)

    def close(self) -> None:
        """Kill it, and with it the ranks that still run."""
        self._process.kill()
        self._process.wait()
        self._control.close()
        for descriptor in self._output:
            os.close(descriptor)
        self._output = ()

    def _start(self) -> None:
        self._control, control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # What is printed during the import belongs to the log of the first rank.
        self._output = os.pipe()
        arguments = {
            "control": control.fileno(),
            "parent": os.getpid(),
            "threads": self._threads,
            "folder": self._folder,
        }
        # SIGUSR1 asks for a stack; the process lets it through when it knows that, and would die of it before.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
        try:
            with control:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "allreduce_spark.training", *(f"--{k}={v}" for k, v in arguments.items())],
                    env=self._environment,
                    pass_fds=[control.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=self._output[1],
                    stderr=subprocess.STDOUT,
                )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _ask(self, rank: int, num_ranks: int) -> RankProcess:
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:

            def pair() -> tuple[socket.socket, int]:
                mine, its = socket.socketpair()
                ours.callback(mine.close)
                theirs.callback(its.close)
                return mine, its.fileno()

            def pipe(descriptors: tuple[int, ...]) -> tuple[int, int]:
                read, write = descriptors
                ours.callback(os.close, read)
                theirs.callback(os.close, write)
                return read, write

            channel, rank_channel = pair()
            pmi, rank_pmi = pair()
            lifeline, rank_lifeline = pair()
            ended, rank_ending = pipe(os.pipe())
            output, rank_output = pipe(self._output or os.pipe())
            self._output = ()
            Request(rank, num_ranks, rank_channel, rank_pmi, rank_output, rank_lifeline, rank_ending).send(
                self._control
            )
            ours.pop_all()
        return RankProcess(Channel(channel), pmi, output, lifeline, ended, warm=self._process, folder=self._folder)
