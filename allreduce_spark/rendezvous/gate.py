"""The driver's door: who connects must show that it holds the key of the fit, soon, and only so many may try at once.

A stranger is a connection that has not shown it yet. What strangers can do is bounded, however many there are:

* each has `HANDSHAKE_S` in all, not per byte, and is read no further than an answer is long;
* where there are more than the limit, the one that has waited longest has to go. So a newcomer is always heard, and an
  agent gets in, as long as its answer is faster than a whole limit of further strangers; else it tries again;
* the same where the process may open no more files;
* each turn of the loop accepts only some, so that conversations with agents go on;
* refusals are logged at once only if there was none lately, and in a summary otherwise.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import secrets
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from allreduce_spark.errors import AuthenticationError
from allreduce_spark.rendezvous import handshake
from allreduce_spark.rendezvous.protocol import Codec, Message

__all__ = ["Gate", "Guest"]

log = logging.getLogger(__name__)

HANDSHAKE_S = 10.0
MAX_STRANGERS = 256  # beside the agents themselves, which may all come at once
ACCEPT_AT_ONCE = 32
REPORT_S = 10.0
PAUSE_S = 0.2  # where nobody can be accepted and no stranger is there to be sent away
READ_BYTES = 1 << 18
# What the driver says is short, and an agent reads all the time: one that leaves so much unread has stopped.
MAX_UNSENT_BYTES = 1 << 24


class Guest:
    """One authenticated connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, codec: Codec) -> None:
        self._reader, self._writer, self._codec = reader, writer, codec
        self._unsent_bytes = 0

    def send(self, kind: str, **fields: Any) -> None:
        """Send a message, unless the other end is gone: whoever listens to `messages` finds out.

        One that does not read is hung up on as soon as `MAX_UNSENT_BYTES` wait for it.
        """
        if self._writer.is_closing():
            return
        self._writer.write(self._codec.encode(Message(kind, fields)))
        self._unsent_bytes = self._writer.transport.get_write_buffer_size()
        if self._unsent_bytes > MAX_UNSENT_BYTES:
            self._writer.transport.abort()

    async def messages(self) -> AsyncIterator[Message]:
        """All messages until the other end closes the connection.

        Raises:
            OSError: The connection is lost, or the other end does not read.
            ProtocolError: The other end has sent what is no frame of ours.
        """
        while data := await self._reader.read(READ_BYTES):
            for message in self._codec.feed(data):
                yield message
        if self._unsent_bytes > MAX_UNSENT_BYTES:
            raise ConnectionAbortedError(f"it left {self._unsent_bytes} bytes from the driver unread")
        if not self._codec.is_between_messages:
            raise ConnectionResetError("its connection ended in the middle of a message")


class Gate:
    """Listens, and lets in who holds the key. Belongs to the event loop in which it is opened.

    Args:
        key: Secret of the fit.
        expected: How many will come that hold it.
        attend: Called with each guest; its connection is closed when that returns.
    """

    def __init__(self, key: bytes, expected: int, attend: Callable[[Guest], Awaitable[None]]) -> None:
        self._key, self._attend = key, attend
        self._max_strangers = MAX_STRANGERS + expected
        self._strangers: dict[asyncio.Task[None], str] = {}  # in the order in which they came
        self._guests: set[asyncio.Task[None]] = set()
        self._refusals = _Refusals()
        self._listener: socket.socket | None = None

    async def open(self, host: str) -> tuple[str, int]:
        """Listen on a free port of `host`; return the address.

        Raises:
            OSError, UnicodeError: Nobody can listen there.
        """
        self._loop = asyncio.get_running_loop()
        found = await self._loop.getaddrinfo(host, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, wanted = found[0]
        self._listener = socket.create_server(wanted, family=family, backlog=socket.SOMAXCONN)
        self._listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # What it accepts inherits this.
        self._listener.setblocking(False)
        self._listen()
        address: tuple[str, int] = self._listener.getsockname()[:2]
        return address

    def close(self) -> None:
        """Let nobody in any more."""
        if self._listener is not None:
            self._loop.remove_reader(self._listener)
            self._listener.close()
            self._listener = None
            self._refusals.report()

    def _listen(self) -> None:
        if self._listener is not None:
            self._loop.add_reader(self._listener, self._accept, self._listener)

    def _accept(self, listener: socket.socket) -> None:
        """Take in those that wait; called again by the loop where that were not all."""
        for _ in range(ACCEPT_AT_ONCE):
            try:
                sock, address = listener.accept()
            except BlockingIOError:
                return
            except ConnectionError:
                continue  # It has gone already.
            except OSError as error:
                self._make_room(listener, error)
                return
            sock.setblocking(False)
            task = self._loop.create_task(self._serve(sock))
            self._strangers[task] = f"{address[0]}:{address[1]}"
            if len(self._strangers) > self._max_strangers:
                self._send_away_oldest(f"more than {self._max_strangers} at once")

    def _make_room(self, listener: socket.socket, error: OSError) -> None:
        """Where the process can accept nobody, because it may open no more files, say."""
        if self._strangers and error.errno in (errno.EMFILE, errno.ENFILE):
            self._send_away_oldest(str(error))
            return
        self._refusals.add("whoever comes", str(error))
        self._loop.remove_reader(listener)  # Or the loop would turn without a rest: the listener stays readable.
        self._loop.call_later(PAUSE_S, self._listen)

    def _send_away_oldest(self, why: str) -> None:
        task = next(iter(self._strangers))
        self._refusals.add(self._strangers.pop(task), why)
        task.cancel()  # It closes its socket itself: the loop may still watch that.

    async def _serve(self, sock: socket.socket) -> None:
        """One connection, from its first byte to its last."""
        task = asyncio.current_task()
        assert task is not None
        admission = None
        try:
            admission = await asyncio.wait_for(self._shake_hands(sock), HANDSHAKE_S)
        except (asyncio.TimeoutError, AuthenticationError, OSError) as error:
            self._refusals.add(self._strangers.get(task, "somebody"), str(error) or type(error).__name__)
        finally:
            self._strangers.pop(task, None)
            if admission is None:
                sock.close()
        if admission is not None:
            self._guests.add(task)
            try:
                await self._welcome(sock, *admission)
            finally:
                self._guests.discard(task)

    async def _shake_hands(self, sock: socket.socket) -> tuple[bytes, Codec]:
        """The reply that lets the agent in, still to be sent, and the codec for what follows."""
        nonce = secrets.token_bytes(handshake.NONCE_BYTES)
        await self._loop.sock_sendall(sock, handshake.challenge(nonce))
        answer = b""
        while missing := handshake.ANSWER_BYTES - len(answer):
            data = await self._loop.sock_recv(sock, missing)
            if not data:
                raise AuthenticationError("it hung up")
            answer += data
        return handshake.check_answer(self._key, nonce, answer)

    async def _welcome(self, sock: socket.socket, reply: bytes, codec: Codec) -> None:
        reader, writer = await asyncio.open_connection(sock=sock, limit=READ_BYTES)
        try:
            writer.write(reply)  # Only now: what the agent says next is heard as soon as it comes.
            await self._attend(Guest(reader, writer, codec))
        finally:
            writer.close()


class _Refusals:
    """Tells people who was refused: the first at once, those that follow within `REPORT_S` in one line."""

    def __init__(self) -> None:
        self._untold = 0
        self._last = ""
        self._timer: asyncio.TimerHandle | None = None

    def add(self, who: str, why: str) -> None:
        self._untold, self._last = self._untold + 1, f"{who}: {why}"
        if self._timer is None:
            log.warning("refused a connection from %s", self._last)
            self._untold = 0
            self._timer = asyncio.get_running_loop().call_later(REPORT_S, self.report)

    def report(self) -> None:
        """Tell what has not been told yet. Where there was nothing, the next refusal is told at once again."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._untold:
            log.warning("refused %d more connections; the last from %s", self._untold, self._last)
            self._untold = 0
            self._timer = asyncio.get_running_loop().call_later(REPORT_S, self.report)
