"""What an agent does while its rank lives: carry messages between driver and rank, watch it, and start another if told to.

Everything happens in one thread, in the order in which it comes in.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import select
import selectors
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from allreduce_spark.checkpoint.shares import LOCAL_FOLDER, local_shares
from allreduce_spark.checkpoint.store import Store
from allreduce_spark.config import Timeouts
from allreduce_spark.errors import ProtocolError, RendezvousError
from allreduce_spark.launch.output import Output
from allreduce_spark.launch.place import Place
from allreduce_spark.launch.process import RankProcess
from allreduce_spark.launch.scratch import release_shared_memory
from allreduce_spark.launch.upload import upload_share
from allreduce_spark.rendezvous.client import Channel, Connection
from allreduce_spark.rendezvous.protocol import Message, Phase

__all__ = ["Aborted", "Relay", "hear"]

log = logging.getLogger(__name__)

RESULT_PIECE_BYTES = 1 << 20
CAUSE_CHARACTERS = 20_000
STACK_S = 0.5  # for a rank to say what it is doing


class Aborted(Exception):
    """The driver told this agent to stop; the driver knows why."""


def hear(driver: Connection) -> list[Message]:
    """What the driver has said; call it when there is something to read.

    Raises:
        Aborted: It has said `abort`.
        RendezvousError: It is gone.
    """
    try:
        messages = driver.messages()
    except EOFError as error:
        raise RendezvousError(f"the driver is gone: {error}") from error
    if any(message.kind == "abort" for message in messages):
        raise Aborted
    return messages


class Relay:
    """Carries messages between driver and rank until the driver says that it is over.

    Args:
        number: Of the rank.
        driver: The connection.
        start_rank: Starts the rank; called again for each further generation.
        join: What to tell the driver of this agent's shards and checkpoints, once its rank may start.
        folder: The scratch folder; the root leaves its result there, as `result`.
        place: Where the rank is.
        timeouts: Deadlines.
        store: Where the rank's shares of checkpoints are brought; None where they stay in the scratch folder.
    """

    def __init__(
        self,
        number: int,
        driver: Connection,
        start_rank: Callable[[], RankProcess],
        join: Callable[[], dict[str, Any]],
        folder: Path,
        place: Place,
        timeouts: Timeouts,
        store: Store | None = None,
    ) -> None:
        self._number, self._driver, self._start_rank, self._join = number, driver, start_rank, join
        self._folder, self._place, self._timeouts, self._store = folder, place, timeouts, store
        self._rank = start_rank()
        self._meet_new_rank()
        self._heard: deque[Message] = deque()  # from the driver, to be obeyed
        self._output = Output(timeouts.heartbeat_s)

    @property
    def rank_has_ended(self) -> bool:
        return self._rank.has_ended()

    def close(self) -> None:
        """Kill the rank if it still runs."""
        self._rank.close()

    def run(self) -> None:
        """Relay until the driver says `finish`.

        Raises:
            Aborted: The driver said `abort`.
            RendezvousError: The driver is gone.
        """
        with selectors.DefaultSelector() as self._selector:
            self._selector.register(self._driver, selectors.EVENT_READ, self._hear)
            self._listen_to_rank()
            self._finished = False
            while not self._finished:
                for key, _ in self._selector.select(timeout=self._timeouts.heartbeat_s):
                    if key.fileobj in self._selector.get_map():
                        key.data()
                    if self._heard:
                        self._obey()
                        break  # What else was readable may belong to a rank that is no more.
                self._look_at_the_clock()

    def join(self) -> None:
        """Tell the driver that the rank may start."""
        self._place.phase = Phase.JOIN
        self._tell("join", **self._join())

    def _tell(self, kind: str, body: bytes = b"", **fields: Any) -> None:
        """Send the driver something of the rank of this generation."""
        self._driver.send(kind, body, **{**fields, "generation": self._place.generation})

    def _listen_to_rank(self) -> None:
        self._selector.register(self._rank.channel, selectors.EVENT_READ, self._from_rank)
        self._selector.register(self._rank.pmi, selectors.EVENT_READ, self._from_pmi)
        self._selector.register(self._rank.output, selectors.EVENT_READ, self._from_output)
        self._selector.register(self._rank.ended, selectors.EVENT_READ, self._rank_ended)

    def _meet_new_rank(self) -> None:
        self._launch = secrets.randbits(32)
        self._pmi_unfinished = b""
        self._ended: dict[str, Any] | None = None  # the rank's last word, "done" or "failed"
        self._ended_at = 0.0
        self._stack_at: float | None = None

    def check_driver(self) -> None:
        """Look what the driver has said while the shards are being written.

        Raises:
            Aborted, RendezvousError: As in `run`.
        """
        while _is_readable(self._driver):
            self._hear()
        self._check_driver_is_heard()
        for message in self._heard:
            if message.kind == "restart":  # for the others: this rank has not begun
                self._place.generation = message.fields["generation"]
        self._heard.clear()

    def _hear(self) -> None:
        self._heard.extend(hear(self._driver))

    def _obey(self) -> None:
        while self._heard:
            message = self._heard.popleft()
            match message.kind:
                case "member":
                    self._place.phase = None
                    self._add_own_share(message.fields.get("resume"))
                    with contextlib.suppress(OSError):  # It has ended, and `_rank_ended` will say so.
                        self._rank.channel.send("start", **message.fields)
                case "pmi":
                    self._rank.note_shared_memory()
                    with contextlib.suppress(OSError):
                        self._rank.pmi.sendall(message.fields["line"].encode() + b"\n")
                case "restart":
                    self._begin_again(message.fields["generation"])
                case "dump":
                    self._rank.dump_stack()
                    self._stack_at = time.monotonic() + STACK_S
                case "regroup":
                    self._place.ask_to_regroup()
                case "finish":
                    self._finished = True

    def _add_own_share(self, resume: dict[str, Any] | None) -> None:
        """Where the driver names a checkpoint and no places, it is one that all agents have on their disks."""
        if resume is not None and "shares" not in resume:
            path = local_shares(self._folder / LOCAL_FOLDER, self._number)[resume["id"]]
            resume["shares"] = {str(self._number): str(path)}

    def _begin_again(self, generation: int) -> None:
        """Let another rank take the place of this one, whatever it is doing."""
        self._rank.kill()
        self._from_output()
        self._send_log(last=True)
        for source in (self._rank.channel, self._rank.pmi, self._rank.output, self._rank.ended):
            self._forget(source)
        self._rank.close()
        release_shared_memory(self._folder)
        (self._folder / "result").unlink(missing_ok=True)
        self._place.restart(generation)
        self._meet_new_rank()
        self._rank = self._start_rank()
        self._listen_to_rank()
        self.join()

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
            elif message.kind == "saved" and self._store is not None and "cause" not in message.fields:
                generation = self._place.generation
                uploaded = partial(self._uploaded, generation, self._rank.channel)
                upload_share(self._store, self._number, self._launch, message.fields, uploaded)
            else:
                self._tell(message.kind, message.body, **message.fields)

    def _uploaded(self, generation: int, channel: Channel, fields: dict[str, Any]) -> None:
        """Called in the thread of the upload."""
        with contextlib.suppress(RendezvousError):  # The relay finds out.
            self._driver.send("saved", generation=generation, **fields)
        with contextlib.suppress(OSError):  # The rank has ended.
            channel.send("uploaded", id=fields["id"])

    def _from_pmi(self) -> None:
        with contextlib.suppress(ConnectionError):
            data = self._rank.pmi.recv(1 << 16)
            if data:
                self._rank.note_shared_memory()
                *lines, self._pmi_unfinished = (self._pmi_unfinished + data).split(b"\n")
                for line in lines:
                    self._tell("pmi", line=line.decode(errors="replace"))
                return
        self._forget(self._rank.pmi)

    def _from_output(self) -> None:
        lines = self._rank.read_output()
        if self._rank.output_ended:
            self._forget(self._rank.output)  # A pipe at its end is always readable.
        self._output.add(lines)

    def _forget(self, source: Any) -> None:
        if source in self._selector.get_map():
            self._selector.unregister(source)

    def _rank_ended(self) -> None:
        """The process is gone: all that it said is in the buffers now."""
        self._forget(self._rank.ended)
        while self._rank.channel in self._selector.get_map() and _is_readable(self._rank.channel):
            self._from_rank()
        self._from_output()
        self._send_log(last=True)
        if self._ended is None:
            self._rank.has_ended()
            self._report_failure({"error": "RankDied", "cause": self._rank.how_it_ended()})
        elif self._ended["kind"] == "done" and self._send_result():
            self._tell("done", **self._ended["fields"])

    def _send_result(self) -> bool:
        """The root leaves its result as a file; the driver gets it piece by piece. Return whether it still wants it."""
        with contextlib.suppress(FileNotFoundError), open(self._folder / "result", "rb") as file:
            while piece := file.read(RESULT_PIECE_BYTES):
                while _is_readable(self._driver):
                    self._hear()
                if any(message.kind == "restart" for message in self._heard):
                    return False
                self._tell("result", piece)
        return True

    def _report_failure(self, fields: dict[str, Any]) -> None:
        self._from_output()
        self._send_log(last=True)
        cause = fields["cause"][-CAUSE_CHARACTERS:]
        tail = list(self._rank.tail)
        self._tell("failed", **{**self._place.at_failure(), **fields, "cause": cause, "log_tail": tail})

    def _send_log(self, *, last: bool = False) -> None:
        text = self._output.take(last=last)
        if text:
            self._driver.send("log", text.encode())

    def _look_at_the_clock(self) -> None:
        self._send_log()
        now = time.monotonic()
        if self._stack_at is not None and now > self._stack_at:
            self._stack_at = None
            self._tell("stack", "\n".join(self._rank.tail).encode())
        self._check_driver_is_heard()
        if self._ended and not self._rank.has_ended() and now - self._ended_at > self._timeouts.teardown_s:
            log.warning("rank %d has finished but does not exit; killed", self._number)
            self._rank.kill()

    def _check_driver_is_heard(self) -> None:
        silent_s = time.monotonic() - self._driver.heard_at
        # This process may have been stopped or busy itself: then the driver's words lie there unread.
        if silent_s <= self._timeouts.silence_s or _is_readable(self._driver):
            return
        self._rank.kill()
        cause = (
            f"rank {self._number} has not heard of the driver for {silent_s:.0f} s and ends: the driver is stopped, or the "
            "network between them is gone. Setting: Timeouts.silence_s"
        )
        with contextlib.suppress(RendezvousError):  # It may go on later, and should know then why nobody is there.
            self._tell("failed", error="RendezvousTimeoutError", cause=cause, stage_lost=True)
        raise RendezvousError(cause)


def _is_readable(channel: Any) -> bool:
    return bool(select.select([channel], [], [], 0)[0])
