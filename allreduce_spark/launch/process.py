"""The rank process, seen from its agent: watched, killed, and leaving nothing behind."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
from collections import deque
from pathlib import Path

from allreduce_spark.communicator.mpich import shared_memory_segments
from allreduce_spark.launch.scratch import note_shared_memory
from allreduce_spark.rendezvous.client import Channel
from allreduce_spark.training.forking import EXIT_CODE_BYTES, exit_code_from

__all__ = ["RankProcess"]

LOG_TAIL_LINES = 50
LOG_LINE_CHARACTERS = 2000
READ_BYTES = 1 << 20
REAPED_S = 1.0


class RankProcess:
    """A rank that `WarmProcess.start_rank` asked for. It may not have been forked yet.

    Attributes:
        channel: Messages to and from the rank.
        pmi: The agent's end of the rank's PMI connection; lines of text.
        output: File descriptor with what the rank prints.
        ended: File descriptor that becomes readable when the rank has ended: `Request.ending`, which there is before the
            process, and which also tells how it ended.
        output_ended: Whether nothing can be printed any more.
        tail: The last lines that it printed.
    """

    def __init__(
        self,
        channel: Channel,
        pmi: socket.socket,
        output: int,
        lifeline: socket.socket,
        ended: int,
        *,
        warm: subprocess.Popen[bytes],
        folder: Path,
    ) -> None:
        """Take over the agent's ends of what a `Request` holds.

        Args:
            channel, pmi, output, ended: As above.
            lifeline: See `Request.lifeline`.
            warm: The process that forks the rank.
            folder: The agent's scratch folder.
        """
        self.channel, self.pmi, self.output, self.ended = channel, pmi, output, ended
        self._lifeline, self._warm, self._folder = lifeline, warm, folder
        self._process: tuple[int, int] | None = None  # its pid, and its pidfd: see `_forked`
        self._exit_code: int | None = None
        self._died_with_warm = self._closed = False
        for descriptor in (output, ended, lifeline.fileno()):
            os.set_blocking(descriptor, False)
        self.tail: deque[str] = deque(maxlen=LOG_TAIL_LINES)
        self.output_ended = False
        self._unfinished = b""

    def read_output(self) -> list[str]:
        """The lines that the rank has printed since the last call; they are added to `tail`."""
        # Asked first: what is in the pipe afterwards is then the last. A child of the rank may keep the pipe open.
        is_over = self.has_ended()
        data = b""
        with contextlib.suppress(BlockingIOError):
            while len(data) < READ_BYTES and not self.output_ended:
                piece = os.read(self.output, 1 << 16)
                data += piece
                self.output_ended = not piece
        *lines, self._unfinished = (self._unfinished + data).split(b"\n")
        # Last words may have no end of line; nor has a progress bar.
        if self._unfinished and (is_over or self.output_ended or len(self._unfinished) > LOG_LINE_CHARACTERS):
            lines, self._unfinished = [*lines, self._unfinished], b""
        texts = [line.decode(errors="replace").rstrip("\r")[:LOG_LINE_CHARACTERS] for line in lines]
        self.tail.extend(texts)
        return texts

    def note_shared_memory(self) -> None:
        """Write down which shared memory the rank uses now, so that it can be removed if the rank is killed."""
        if process := self._forked():
            note_shared_memory(self._folder, shared_memory_segments(process[0]))

    def dump_stack(self) -> None:
        """Have the rank print the Python stacks of all its threads. They come with its output, a moment later.

        A rank that has not been forked yet waits for the import, so it is the warm process that prints.
        """
        if process := self._forked():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(process[1], signal.SIGUSR1)
        else:
            self._warm.send_signal(signal.SIGUSR1)

    def has_ended(self) -> bool:
        if self._exit_code is None:
            try:
                ending = os.read(self.ended, EXIT_CODE_BYTES)
            except BlockingIOError:
                return False
            if ending:
                self._exit_code = exit_code_from(ending)
            else:
                # Only its death lets go of a rank without a word. It may still be at it.
                self._died_with_warm = self._forked() is not None
                self._warm.kill()
                self._exit_code = self._warm.wait()
        return True

    def how_it_ended(self) -> str:
        """For people; only after `has_ended`."""
        code = self._exit_code
        who = "the warm process, from which the rank was forked," if self._died_with_warm else "the rank process"
        if code is None or code >= 0:
            return f"{who} ended with exit code {code} before its work was done"
        try:
            name = signal.Signals(-code).name
        except ValueError:  # one of the many that have no name
            name = f"signal {-code}"
        hint = " (was the machine out of memory?)" if -code == signal.SIGKILL else ""
        return f"{who} was killed by {name}{hint}"

    def kill(self) -> None:
        """End the rank at once, whatever it is doing; if it has not been forked yet, it never will be."""
        process = self._forked()
        if not self.has_ended():
            with contextlib.suppress(OSError):
                self.note_shared_memory()
        if process:
            # Also where it has ended: if its warm process was killed, it may have a last moment to live.
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(process[1], signal.SIGKILL)
            _wait_for(process[1])  # Without a deadline: only the kernel can keep it, and the driver looks at its clock.
            _wait_for(self.ended, REAPED_S)
            self.has_ended()
        self._lifeline.close()
        if self._exit_code is None:
            self._exit_code = -signal.SIGKILL

    def close(self) -> None:
        """Kill the rank if it still runs, and let go of everything. Closing twice is fine."""
        if self._closed:
            return
        self.kill()
        self._closed = True
        self.channel.close()
        self.pmi.close()
        for descriptor in (self.ended, self.output, *(self._process or ())[1:]):
            os.close(descriptor)

    def _forked(self) -> tuple[int, int] | None:
        """The rank's pid and pidfd, or None as long as it has not been forked."""
        if self._process is None and self._lifeline.fileno() >= 0:
            with contextlib.suppress(BlockingIOError, ConnectionError):
                pid, descriptors, _, _ = socket.recv_fds(self._lifeline, 16, 1)
                if pid:
                    os.set_inheritable(descriptors[0], False)
                    self._process = int(pid), descriptors[0]
        return self._process


def _wait_for(descriptor: int, timeout_s: float | None = None) -> None:
    """Wait until there is something to read."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    poll.poll(None if timeout_s is None else timeout_s * 1000)
