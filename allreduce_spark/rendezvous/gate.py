"""The driver's door: who connects must show that it holds the key of the fit, soon, and only so many may try at once."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from allreduce_spark.errors import RendezvousError
from allreduce_spark.rendezvous import protocol
from allreduce_spark.rendezvous.protocol import Codec, Message

__all__ = ["Gate", "Guest"]

log = logging.getLogger(__name__)

HANDSHAKE_S = 10.0
MAX_STRANGERS = 128  # beside the agents themselves, which may all come at once
READ_BYTES = 1 << 18


class Guest:
    """One authenticated connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, codec: Codec) -> None:
        self._reader, self._writer, self._codec = reader, writer, codec

    def send(self, kind: str, **fields: Any) -> None:
        """Send a message, unless the other end is gone: whoever listens to `messages` finds out."""
        if not self._writer.is_closing():
            self._writer.write(self._codec.encode(Message(kind, fields)))

    async def messages(self) -> AsyncIterator[Message]:
        """All messages until the other end closes the connection.

        Raises:
            OSError: The connection is lost.
            ProtocolError: The other end has sent what is no frame of ours.
        """
        while data := await self._reader.read(READ_BYTES):
            for message in self._codec.feed(data):
                yield message


class Gate:
    """Listens, and lets in who holds the key.

    Args:
        key: Secret of the fit.
        expected: How many will come that hold it.
        attend: Called with each guest; its connection is closed when that returns.
    """

    def __init__(self, key: bytes, expected: int, attend: Callable[[Guest], Awaitable[None]]) -> None:
        self._key, self._expected, self._attend = key, expected, attend
        self._server: asyncio.Server | None = None
        self.strangers = 0

    async def open(self, host: str) -> tuple[str, int]:
        """Listen on a free port of `host`; return the address.

        Raises:
            OSError, UnicodeError: Nobody can listen there.
        """
        self._server = await asyncio.start_server(self._serve, host, 0, backlog=self._expected + 16)
        address: tuple[str, int] = self._server.sockets[0].getsockname()[:2]
        return address

    def close(self) -> None:
        """Let nobody in any more."""
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            codec = await self._authenticate(reader, writer)
            if codec is not None:
                await self._attend(Guest(reader, writer, codec))
        finally:
            writer.close()

    async def _authenticate(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Codec | None:
        if self.strangers >= MAX_STRANGERS + self._expected:
            return None
        self.strangers += 1
        try:
            nonce = secrets.token_bytes(protocol.NONCE_BYTES)
            writer.write(protocol.challenge(nonce))
            answer = await asyncio.wait_for(reader.readexactly(protocol.ANSWER_BYTES), HANDSHAKE_S)
            proof, codec = protocol.check_answer(self._key, nonce, answer)
            writer.write(proof)
        except (asyncio.TimeoutError, asyncio.IncompleteReadError, RendezvousError, OSError) as error:
            peer = writer.get_extra_info("peername")
            log.warning("refused a connection from %s: %s", peer, str(error) or type(error).__name__)
            return None
        finally:
            self.strangers -= 1
        return codec
