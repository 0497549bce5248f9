"""The agent: the body of a barrier task. It puts its shard on disk, starts the rank, relays between rank and driver, and
kills the rank as soon as the driver says so or is gone.

The rank is a child process and never the Spark worker itself: MPI can be initialised once in a process while Spark reuses its
workers, and a child can be killed. The order of events is that of `run_agent`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import selectors
import socket
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from allreduce_spark.communicator.mpich import mpi_environment
from allreduce_spark.config import Timeouts
from allreduce_spark.data.blocks import decode_block
from allreduce_spark.data.spool import ShardWriter
from allreduce_spark.errors import AllReduceSparkError, ProtocolError, RendezvousError
from allreduce_spark.launch.environment import host_key, interface_of, rank_environment, thread_share
from allreduce_spark.launch.process import RankProcess
from allreduce_spark.launch.scratch import scratch_folder
from allreduce_spark.launch.warm import WarmProcess
from allreduce_spark.rendezvous.client import Connection
from allreduce_spark.rendezvous.protocol import Message, Phase
from allreduce_spark.rendezvous.status import StatusPage

__all__ = ["AgentTask", "run_agent"]

log = logging.getLogger(__name__)

RESULT_PIECE_BYTES = 1 << 20
LOG_LINES_PER_BEAT = 500
CAUSE_CHARACTERS = 20_000


@dataclass(frozen=True)
class AgentTask:
    """What one barrier task is told by the Spark side.

    Attributes:
        rank, num_ranks: The partition of the task, and how many there are.
        address, key: Where the driver listens, and the secret of this fit.
        timeouts: Deadlines.
        local_size: Tasks of the stage on this host.
        task_cpus: Cores that Spark counts for the task.
        gpus: Addresses of the GPUs that Spark gave to the task, or None.
        files: Files for the rank, by name: the model, and what goes with it.
    """

    rank: int
    num_ranks: int
    address: tuple[str, int]
    key: bytes = field(repr=False)
    timeouts: Timeouts
    local_size: int
    task_cpus: int
    gpus: tuple[str, ...] | None
    files: dict[str, bytes] = field(repr=False)


class _Aborted(Exception):
    """The driver told this agent to stop; the driver knows why."""


def run_agent(task: AgentTask, blocks: Iterator[bytes]) -> None:
    """Look after one rank from the first row to the last message. Failures are reported to the driver, not raised.

    Args:
        task: Where and who.
        blocks: The rows of this rank, as `data.blocks` encodes them; read once.

    Raises:
        RendezvousError: The driver could not be reached, or was lost: nobody is left to report to.
    """
    with contextlib.closing(Connection(task.address, task.key)) as driver, contextlib.suppress(_Aborted):
        driver.send("hello", rank=task.rank, host=socket.gethostname())
        try:
            _look_after_rank(task, blocks, driver)
        except (RendezvousError, _Aborted):
            raise
        except Exception as error:  # noqa: BLE001  a bad row, a full disk: the driver is to hear what, not that we are gone
            driver.send("failed", error=type(error).__name__, cause=_cause(error))
            _wait_for_the_end(driver, task.timeouts)


def _look_after_rank(task: AgentTask, blocks: Iterator[bytes], driver: Connection) -> None:
    with scratch_folder() as folder:
        status = StatusPage(folder / "status")
        status.write(Phase.IMPORT)
        place = _Place()
        driver.start_heartbeats(task.timeouts.heartbeat_s, lambda: place.read(status))
        for name, content in task.files.items():
            (folder / name).write_bytes(content)
        with (
            contextlib.closing(_start_warm_process(task, folder, driver.local_address)) as warm,
            contextlib.closing(warm.start_rank(task.rank, task.num_ranks)) as rank,
        ):
            join = _spool(blocks, folder, driver, rank)
            if join is not None:
                place.phase = Phase.JOIN
                driver.send("join", host_key=host_key(), **join)
            _Relay(task, driver, rank, folder, status, place).run()


class _Place:
    """Where this rank is: its status page says it, except before the ranks are let go and once the rank has finished."""

    def __init__(self) -> None:
        self.phase: Phase | None = Phase.SPOOL

    def read(self, status: StatusPage) -> tuple[str, int, int]:
        phase, epoch, step = status.read()
        return (self.phase or phase).value, epoch, step


def _cause(error: Exception) -> str:
    text = str(error) if isinstance(error, AllReduceSparkError) else "".join(traceback.format_exception(error))
    return text[-CAUSE_CHARACTERS:]


def _start_warm_process(task: AgentTask, folder: Path, local_address: str) -> WarmProcess:
    threads = thread_share(task.task_cpus, task.local_size)
    # TensorFlow writes Python files of its own, and removes them only where a process may end in peace.
    temporary = folder / "tmp"
    temporary.mkdir()
    environment = rank_environment(
        os.environ,
        threads=threads,
        gpus=task.gpus,
        extra={"TMPDIR": str(temporary), **mpi_environment(interface_of(local_address))},
    )
    return WarmProcess(folder, threads, environment)


def _spool(blocks: Iterator[bytes], folder: Path, driver: Connection, rank: RankProcess) -> dict[str, Any] | None:
    """Write the shard to disk; return what the driver must know of it to let the ranks start.

    None if the rank has ended meanwhile, because it cannot import TensorFlow, say: nobody needs the rows any more.
    """
    with ShardWriter(folder / "train.arrow") as train, ShardWriter(folder / "validation.arrow") as validation:
        for encoded in blocks:
            _raise_if_aborted(driver)
            if rank.has_ended():
                return None
            block = decode_block(encoded)
            (validation if block.role == "validation" else train).write(block)
    return {
        "rows": train.rows,
        "validation_rows": validation.rows,
        "spec": train.spec.to_json() if train.spec else None,
        "validation_spec": validation.spec.to_json() if validation.spec else None,
    }


class _Relay:
    """Carries messages between driver and rank until the driver says that it is over.

    Everything happens in one thread, in the order in which it comes in.
    """

    def __init__(
        self,
        task: AgentTask,
        driver: Connection,
        rank: RankProcess,
        folder: Path,
        status: StatusPage,
        place: _Place,
    ) -> None:
        self._task, self._driver, self._rank = task, driver, rank
        self._folder, self._status, self._place = folder, status, place
        self._pmi_unfinished = b""
        self._ended: dict[str, Any] | None = None  # the rank's last word, "done" or "failed"
        self._ended_at = 0.0
        self._lines: list[str] = []  # to be sent
        self._room, self._left_out, self._beat_at = LOG_LINES_PER_BEAT, 0, time.monotonic()

    def run(self) -> None:
        """Relay until the driver says `finish`.

        Raises:
            _Aborted: The driver said `abort`.
            RendezvousError: The driver is gone.
        """
        with selectors.DefaultSelector() as self._selector:
            self._selector.register(self._driver, selectors.EVENT_READ, self._from_driver)
            self._selector.register(self._rank.channel, selectors.EVENT_READ, self._from_rank)
            self._selector.register(self._rank.pmi, selectors.EVENT_READ, self._from_pmi)
            self._selector.register(self._rank.output, selectors.EVENT_READ, self._from_output)
            self._selector.register(self._rank.pidfd, selectors.EVENT_READ, self._rank_ended)
            self._finished = False
            while not self._finished:
                for key, _ in self._selector.select(timeout=self._task.timeouts.heartbeat_s):
                    if key.fileobj in self._selector.get_map():
                        key.data()
                self._look_at_the_clock()

    def _from_driver(self) -> None:
        for message in _from_driver(self._driver):
            match message.kind:
                case "member":
                    self._place.phase = None
                    with contextlib.suppress(OSError):  # It has ended, and `_rank_ended` will say so.
                        self._rank.channel.send("start", **message.fields)
                case "pmi":
                    self._rank.note_shared_memory()
                    with contextlib.suppress(OSError):
                        self._rank.pmi.sendall(message.fields["line"].encode() + b"\n")
                case "finish":
                    self._finished = True

    def _from_rank(self) -> None:
        try:
            messages = self._rank.channel.messages()
        except EOFError:
            self._forget(self._rank.channel)
            return
        except ProtocolError as error:
            self._forget(self._rank.channel)
            messages = [Message("failed", {"error": "ProtocolError", "cause": str(error)})]
        for message in messages:
            if message.kind in ("done", "failed"):
                self._ended, self._ended_at = {"kind": message.kind, "fields": message.fields}, time.monotonic()
                if message.kind == "failed":
                    self._report_failure(message.fields)
                    self._rank.kill()
                else:
                    self._place.phase = Phase.RESULT  # what is left to do is to bring it to the driver
            else:
                self._driver.send(message.kind, message.body, **message.fields)

    def _from_pmi(self) -> None:
        with contextlib.suppress(ConnectionError):
            data = self._rank.pmi.recv(1 << 16)
            if data:
                self._rank.note_shared_memory()
                *lines, self._pmi_unfinished = (self._pmi_unfinished + data).split(b"\n")
                for line in lines:
                    self._driver.send("pmi", line=line.decode(errors="replace"))
                return
        self._forget(self._rank.pmi)

    def _from_output(self) -> None:
        lines = self._rank.read_output()
        if self._rank.output_ended:
            self._forget(self._rank.output)  # A pipe at its end is always readable.
        kept = lines[: self._room]
        self._lines += kept
        self._room -= len(kept)
        self._left_out += len(lines) - len(kept)

    def _forget(self, source: Any) -> None:
        if source in self._selector.get_map():
            self._selector.unregister(source)

    def _rank_ended(self) -> None:
        """The process is gone: all that it said is in the buffers now."""
        self._forget(self._rank.pidfd)
        while self._rank.channel in self._selector.get_map() and _is_readable(self._rank.channel):
            self._from_rank()
        self._from_output()
        self._send_log(last=True)
        if self._ended is None:
            self._rank.has_ended()
            self._report_failure({"error": "RankDied", "cause": self._rank.how_it_ended()})
        elif self._ended["kind"] == "done":
            self._send_result()
            self._driver.send("done", **self._ended["fields"])

    def _send_result(self) -> None:
        """The root leaves its result as a file; the driver gets it piece by piece."""
        with contextlib.suppress(FileNotFoundError), open(self._folder / "result", "rb") as file:
            while piece := file.read(RESULT_PIECE_BYTES):
                _raise_if_aborted(self._driver)
                self._driver.send("result", piece)

    def _report_failure(self, fields: dict[str, Any]) -> None:
        self._from_output()
        self._send_log(last=True)
        phase, epoch, step = self._status.read()
        place: dict[str, Any] = {"phase": phase.value}
        if phase.has_step:
            place |= {"epoch": epoch, "step": step}
        cause = fields["cause"][-CAUSE_CHARACTERS:]
        self._driver.send("failed", **{**place, **fields, "cause": cause, "log_tail": list(self._rank.tail)})

    def _send_log(self, *, last: bool = False) -> None:
        """Send what there is, so much per heartbeat: a rank that prints without end must not flood the driver."""
        now = time.monotonic()
        if last or now - self._beat_at >= self._task.timeouts.heartbeat_s:
            if self._left_out:
                self._lines.append(f"({self._left_out} lines are left out here)")
            self._room, self._left_out, self._beat_at = LOG_LINES_PER_BEAT, 0, now
        if self._lines:
            self._driver.send("log", "\n".join(self._lines).encode())
            self._lines = []

    def _look_at_the_clock(self) -> None:
        self._send_log()
        now = time.monotonic()
        # This process may have been stopped or busy itself: then the driver's words lie there unread.
        if now - self._driver.heard_at > self._task.timeouts.silence_s and not _is_readable(self._driver):
            raise RendezvousError(
                f"rank {self._task.rank} has not heard of the driver for {now - self._driver.heard_at:.0f} s and ends. "
                "Setting: Timeouts.silence_s"
            )
        if self._ended and not self._rank.has_ended() and now - self._ended_at > self._task.timeouts.teardown_s:
            log.warning("rank %d has finished but does not exit; killed", self._task.rank)
            self._rank.kill()


def _from_driver(driver: Connection) -> Sequence[Message]:
    try:
        messages = driver.messages()
    except EOFError as error:
        raise RendezvousError("the driver is gone; this rank ends") from error
    for message in messages:
        if message.kind == "abort":
            raise _Aborted
    return messages


def _is_readable(channel: Any) -> bool:
    return bool(select.select([channel], [], [], 0)[0])


def _raise_if_aborted(driver: Connection) -> None:
    while _is_readable(driver):
        _from_driver(driver)


def _wait_for_the_end(driver: Connection, timeouts: Timeouts) -> None:
    """After a failure of its own the agent waits until the driver has told everybody: it must not end the stage first."""
    deadline = time.monotonic() + timeouts.teardown_s
    while time.monotonic() < deadline:
        if select.select([driver], [], [], 1.0)[0]:
            _from_driver(driver)
