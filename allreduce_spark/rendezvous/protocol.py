"""Messages <-> frames: one codec, used by driver, agent and rank. No sockets here: bytes in, messages out.

A frame is

    header length   4 bytes, big endian
    body length     4 bytes, big endian
    header          JSON: {"kind": ..., and the fields of that kind}
    body            raw bytes; most kinds have none
    tag             16 bytes of HMAC-SHA256 over (sequence number, all of the above); on the network only

Before the first frame on the network the two ends prove to each other that they hold the key of the fit, without sending
it (challenge and response, RFC 2104 HMAC over both nonces):

    driver -> agent   magic, driver's nonce
    agent  -> driver  magic, agent's nonce, HMAC(key, "agent"  | driver's nonce | agent's nonce)
    driver -> agent   HMAC(key, "driver" | driver's nonce | agent's nonce)

The tag's key is derived from key and nonces for each direction, and the sequence number counts frames, so a frame can be
neither changed, nor left out, nor sent again, nor sent back. Frames are *not* encrypted in this version.
Nothing is ever unpickled.
"""

from __future__ import annotations

import hmac
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from allreduce_spark.errors import AuthenticationError, ProtocolError

__all__ = [
    "MAX_BODY_BYTES",
    "NONCE_BYTES",
    "Codec",
    "Message",
    "Phase",
    "answer_challenge",
    "check_answer",
    "session_codec",
]

MAGIC = b"allreduce_spark/1"
NONCE_BYTES = 32
PROOF_BYTES = 32
CHALLENGE_BYTES = len(MAGIC) + NONCE_BYTES
ANSWER_BYTES = len(MAGIC) + NONCE_BYTES + PROOF_BYTES
TAG_BYTES = 16
MAX_HEADER_BYTES = 1 << 20
MAX_BODY_BYTES = 1 << 22
_LENGTHS = struct.Struct(">II")


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
    RESULT = "result"
    TEARDOWN = "teardown"

    @property
    def has_step(self) -> bool:
        """Whether a rank in this phase is at some optimizer step."""
        return self in (Phase.FIRST_STEP, Phase.TRAIN, Phase.VALIDATE)


@dataclass(frozen=True)
class Message:
    """One message: its kind, its JSON fields, and raw bytes."""

    kind: str
    fields: dict[str, Any] = field(default_factory=dict)
    body: bytes = b""


class Codec:
    """Both directions of one connection: `encode` what is sent, `feed` what is received.

    Args:
        send_key, receive_key: Keys of the tags; empty where the connection needs none (a socket pair of one machine).
    """

    def __init__(self, send_key: bytes = b"", receive_key: bytes = b"") -> None:
        self._send_key, self._receive_key = send_key, receive_key
        self._sent = self._received = 0
        self._buffer = bytearray()

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
        frame = b"".join((_LENGTHS.pack(len(header), len(message.body)), header, message.body))
        tag = _tag(self._send_key, self._sent, frame) if self._send_key else b""
        self._sent += 1
        return frame + tag

    def feed(self, data: bytes) -> Iterator[Message]:
        """Yield the messages that are complete once `data` has been received.

        Raises:
            ProtocolError: The bytes are no frame, are over the limits, or were tampered with.
        """
        self._buffer += data
        tag_bytes = TAG_BYTES if self._receive_key else 0
        while len(self._buffer) >= _LENGTHS.size:
            header_bytes, body_bytes = _LENGTHS.unpack_from(self._buffer)
            if header_bytes > MAX_HEADER_BYTES or body_bytes > MAX_BODY_BYTES:
                raise ProtocolError(f"received a frame that claims {header_bytes} + {body_bytes} bytes: over the limit")
            end = _LENGTHS.size + header_bytes + body_bytes
            if len(self._buffer) < end + tag_bytes:
                return
            frame, tag = bytes(self._buffer[:end]), bytes(self._buffer[end : end + tag_bytes])
            del self._buffer[: end + tag_bytes]
            if tag_bytes and not hmac.compare_digest(tag, _tag(self._receive_key, self._received, frame)):
                raise ProtocolError("received a frame whose authentication tag is wrong")
            self._received += 1
            yield _parse(frame, header_bytes)


def _tag(key: bytes, sequence: int, frame: bytes) -> bytes:
    return hmac.digest(key, sequence.to_bytes(8, "big") + frame, "sha256")[:TAG_BYTES]


def _parse(frame: bytes, header_bytes: int) -> Message:
    start = _LENGTHS.size
    try:
        fields = json.loads(frame[start : start + header_bytes])
        kind = fields.pop("kind")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ProtocolError(f"received a frame whose header is no message: {error}") from error
    if not isinstance(kind, str):
        raise ProtocolError(f"received a frame whose kind is {kind!r}")
    return Message(kind, fields, frame[start + header_bytes :])


def challenge(driver_nonce: bytes) -> bytes:
    """The driver's first bytes on a new connection."""
    return MAGIC + driver_nonce


def answer_challenge(key: bytes, received: bytes, agent_nonce: bytes) -> tuple[bytes, bytes, Codec]:
    """The agent's answer to `received`, the proof that the driver must send next, and the codec for what follows.

    Raises:
        ProtocolError: `received` is no challenge.
    """
    if len(received) != CHALLENGE_BYTES or not received.startswith(MAGIC):
        raise ProtocolError("the other end does not speak this protocol, or another version of it")
    driver_nonce = received[len(MAGIC) :]
    nonces = driver_nonce + agent_nonce
    answer = MAGIC + agent_nonce + _proof(key, b"agent", nonces)
    return answer, _proof(key, b"driver", nonces), session_codec(key, nonces, driver=False)


def check_answer(key: bytes, driver_nonce: bytes, answer: bytes) -> tuple[bytes, Codec]:
    """The driver's proof, and the codec for what follows, if `answer` shows that the agent holds `key`.

    Raises:
        AuthenticationError: It does not.
    """
    agent_nonce = answer[len(MAGIC) : len(MAGIC) + NONCE_BYTES]
    nonces = driver_nonce + agent_nonce
    if not hmac.compare_digest(answer, MAGIC + agent_nonce + _proof(key, b"agent", nonces)):
        raise AuthenticationError("a connection to the rendezvous did not hold the key of this fit")
    return _proof(key, b"driver", nonces), session_codec(key, nonces, driver=True)


def session_codec(key: bytes, nonces: bytes, *, driver: bool) -> Codec:
    """The codec of one authenticated connection, for the driver's or the agent's end."""
    to_agent, to_driver = _proof(key, b"to agent", nonces), _proof(key, b"to driver", nonces)
    return Codec(to_agent, to_driver) if driver else Codec(to_driver, to_agent)


def _proof(key: bytes, purpose: bytes, nonces: bytes) -> bytes:
    return hmac.digest(key, purpose + b"|" + nonces, "sha256")
