"""Messages <-> frames: one codec, used by driver, agent and rank. No sockets here: bytes in, messages out.

A frame is

    header length   4 bytes, big endian
    body length     4 bytes, big endian
    header          JSON: {"kind": ..., and the fields of that kind}
    body            raw bytes; most kinds have none
    tag             16 bytes; on the network only

On the network a `Cipher` encrypts header and body and makes the tag, which holds for the lengths and for the frame's
number as well: so a frame can be neither read nor changed, nor left out, nor sent again, nor sent back. `handshake` says
where its keys come from. The channel between an agent and its rank is a socket pair inside one machine, and has no cipher.
Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

from allreduce_spark.errors import ProtocolError

__all__ = ["MAX_BODY_BYTES", "MAX_HEADER_BYTES", "Cipher", "Codec", "Message", "Phase"]

MAX_HEADER_BYTES = 1 << 20
MAX_BODY_BYTES = 1 << 22
TAG_BYTES = 16
_LENGTHS = struct.Struct(">II")

# A name means the same in every message. Whoever receives one of these need not look at its type again.
_TYPES_OF_FIELDS: dict[str, tuple[type, ...]] = {
    "rank": (int, type(None)),
    "host": (str, type(None)),
    "host_key": (str,),
    "gpus": (list,),
    "generation": (int,),
    "phase": (str, type(None)),
    "epoch": (int, type(None)),
    "step": (int, type(None)),
    "waited_s": (int, float),
    "is_waiting": (bool,),
    "line": (str,),
    "error": (str,),
    "cause": (str,),
    "log_tail": (list,),
    "consequence": (bool,),
    "stage_lost": (bool,),
}


class Phase(str, Enum):
    """What a fit waits for: the driver in the first two, then a rank or its agent. The order is that of a rank's life."""

    SLOTS = "slots"
    START = "start"
    SPOOL = "spool"
    RESTART = "restart"
    JOIN = "join"
    IMPORT = "import"
    INIT = "init"
    FIRST_STEP = "first step"
    TRAIN = "train"
    VALIDATE = "validate"
    CHECKPOINT = "checkpoint"
    FUNCTION = "function"
    RESULT = "result"
    TEARDOWN = "teardown"

    @property
    def has_step(self) -> bool:
        """Whether a rank in this phase is at some optimizer step; in a function of the user's own, at some collective."""
        return self in (Phase.FIRST_STEP, Phase.TRAIN, Phase.VALIDATE, Phase.CHECKPOINT, Phase.FUNCTION)


@dataclass(frozen=True)
class Message:
    """One message: its kind, its JSON fields, and raw bytes."""

    kind: str
    fields: dict[str, Any] = field(default_factory=dict)
    body: bytes = b""


class Cipher(Protocol):
    """Both directions of one private connection. It counts the frames of each, so each frame is to be given to it once."""

    def seal(self, content: bytes, lengths: bytes) -> bytes:
        """Encrypt the next frame's content; the tag at its end holds for `lengths` too."""

    def unseal(self, sealed: bytes | bytearray | memoryview, lengths: bytes) -> bytes:
        """The content of the next frame.

        Raises:
            ProtocolError: It is not what the other end sealed as its next frame.
        """


class Codec:
    """Both directions of one connection: `encode` what is sent, `feed` what is received.

    Args:
        cipher: Keeps the frames private; None where the connection does not leave the machine.
    """

    def __init__(self, cipher: Cipher | None = None) -> None:
        self._cipher = cipher
        self._tag_bytes = TAG_BYTES if cipher else 0
        self._buffer = bytearray()

    @property
    def is_between_messages(self) -> bool:
        """Whether all bytes received so far belong to complete messages."""
        return not self._buffer

    def encode(self, message: Message) -> bytes:
        """Turn a message into one frame.

        Raises:
            ProtocolError: The message is over the limits.
        """
        # Not in ASCII: escaped, the log of a rank that draws progress bars would be three times as long. A file name that
        # is not UTF-8 leaves lone surrogates in a message; `json.loads` lets them pass too.
        text = json.dumps({**message.fields, "kind": message.kind}, ensure_ascii=False, separators=(",", ":"))
        header = text.encode(errors="surrogatepass")
        if len(header) > MAX_HEADER_BYTES or len(message.body) > MAX_BODY_BYTES:
            raise ProtocolError(
                f"a '{message.kind}' message of {len(header)} + {len(message.body)} bytes is over the limit of "
                f"{MAX_HEADER_BYTES} + {MAX_BODY_BYTES}"
            )
        lengths = _LENGTHS.pack(len(header), len(message.body))
        if self._cipher is None:
            return b"".join((lengths, header, message.body))
        return lengths + self._cipher.seal(header + message.body, lengths)

    def feed(self, data: bytes) -> Iterator[Message]:
        """Yield the messages that are complete once `data` has been received.

        Raises:
            ProtocolError: The bytes are no frame, are over the limits, or were tampered with. The connection cannot be
                used any more.
        """
        self._buffer += data
        while len(self._buffer) >= _LENGTHS.size:
            header_bytes, body_bytes = _LENGTHS.unpack_from(self._buffer)
            if header_bytes > MAX_HEADER_BYTES or body_bytes > MAX_BODY_BYTES:
                raise ProtocolError(f"received a frame that claims {header_bytes} + {body_bytes} bytes: over the limit")
            end = _LENGTHS.size + header_bytes + body_bytes + self._tag_bytes
            if len(self._buffer) < end:
                return
            with memoryview(self._buffer) as view, view[_LENGTHS.size : end] as rest:
                content = self._cipher.unseal(rest, bytes(view[: _LENGTHS.size])) if self._cipher else bytes(rest)
            del self._buffer[:end]
            yield _parse(content, header_bytes)


def _parse(content: bytes, header_bytes: int) -> Message:
    try:
        fields = json.loads(content[:header_bytes])
        kind = fields.pop("kind")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ProtocolError(f"received a frame whose header is no message: {error}") from error
    if not isinstance(kind, str):
        raise ProtocolError(f"received a frame whose kind is {kind!r:.200}")
    for name in _TYPES_OF_FIELDS.keys() & fields.keys():
        value = fields[name]
        # `isinstance` would take True for a number; and numbers are to fit where C code or a float takes them.
        if type(value) not in _TYPES_OF_FIELDS[name] or (type(value) is int and not -(2**63) <= value < 2**63):
            raise ProtocolError(f"received a '{kind:.200}' message with {name}={value!r:.200}")
    return Message(kind, fields, content[header_bytes:])
