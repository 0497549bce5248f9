"""The rank process, seen from its agent: started early, watched, killed, and leaving nothing behind."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Mapping
from pathlib import Path

from allreduce_spark.communicator.mpich import shared_memory_segments
from allreduce_spark.launch.scratch import note_shared_memory
from allreduce_spark.rendezvous import pmi
from allreduce_spark.rendezvous.client import Channel

__all__ = ["RankProcess"]

LOG_TAIL_LINES = 50
LOG_LINE_CHARACTERS = 2000
READ_BYTES = 1 << 20


class RankProcess:
    """A child process that runs `allreduce_spark.training`.

    It is started as early as possible, before the shard is on disk, because importing TensorFlow takes seconds. It must be
    started from the agent's main thread: the rank asks the kernel to be killed with its parent (PR_SET_PDEATHSIG), and for
    the kernel that is the thread that started it.

    Attributes:
        channel: Messages to and from the rank.
        pmi: The agent's end of the rank's PMI connection; lines of text.
        output: File descriptor with what the rank prints.
        pidfd: File descriptor that becomes readable when the rank has ended.
        output_ended: Whether nothing can be printed any more.
        tail: The last lines that it printed.
    """

    def __init__(
        self, rank: int, num_ranks: int, *, folder: Path, threads: int, environment: Mapping[str, str]
    ) -> None:
        self._folder = folder
        mine, theirs = socket.socketpair()
        self.pmi, rank_pmi = socket.socketpair()
        arguments = {"channel": theirs.fileno(), "parent": os.getpid(), "threads": threads, "folder": folder}
        with theirs, rank_pmi:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "allreduce_spark.training", *(f"--{k}={v}" for k, v in arguments.items())],
                env={**environment, **pmi.environment(rank, num_ranks, rank_pmi.fileno())},
                pass_fds=[theirs.fileno(), rank_pmi.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        assert self._process.stdout is not None
        self.channel = Channel(mine)
        self.output = self._process.stdout.fileno()
        os.set_blocking(self.output, False)
        self.pidfd = os.pidfd_open(self._process.pid)
        self.tail: deque[str] = deque(maxlen=LOG_TAIL_LINES)
        self.output_ended = False
        self._unfinished = b""

    def read_output(self) -> list[str]:
        """The lines that the rank has printed since the last call; they are added to `tail`."""
        # Asked first: what is in the pipe afterwards is then the last. A child of the rank may keep the pipe open.
        ended = self.has_ended()
        data = b""
        with contextlib.suppress(BlockingIOError):
            while len(data) < READ_BYTES and not self.output_ended:
                piece = os.read(self.output, 1 << 16)
                data += piece
                self.output_ended = not piece
        *lines, self._unfinished = (self._unfinished + data).split(b"\n")
        # Last words may have no end of line; nor has a progress bar.
        if self._unfinished and (ended or self.output_ended or len(self._unfinished) > LOG_LINE_CHARACTERS):
            lines, self._unfinished = [*lines, self._unfinished], b""
        texts = [line.decode(errors="replace").rstrip("\r")[:LOG_LINE_CHARACTERS] for line in lines]
        self.tail.extend(texts)
        return texts

    def note_shared_memory(self) -> None:
        """Write down which shared memory the rank uses now, so that it can be removed if the rank is killed."""
        note_shared_memory(self._folder, shared_memory_segments(self._process.pid))

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def how_it_ended(self) -> str:
        """For people; only after `has_ended`."""
        code = self._process.returncode
        if code is None or code >= 0:
            return f"the rank process ended with exit code {code} before its work was done"
        try:
            name = signal.Signals(-code).name
        except ValueError:  # one of the many that have no name
            name = f"signal {-code}"
        hint = " (was the machine out of memory?)" if -code == signal.SIGKILL else ""
        return f"the rank process was killed by {name}{hint}"

    def kill(self) -> None:
        """End the rank at once, whatever it is doing."""
        if not self.has_ended():
            with contextlib.suppress(OSError):
                self.note_shared_memory()
            self._process.kill()
            self._process.wait()

    def close(self) -> None:
        """Kill the rank if it still runs, and let go of everything."""
        self.kill()
        self.channel.close()
        self.pmi.close()
        os.close(self.pidfd)
        if self._process.stdout is not None:
            self._process.stdout.close()
