"""How two ends of a network connection show each other that they hold the key of the fit, and agree on keys of their own.

The key itself is never sent. The two ends prove that they hold it (HMAC, RFC 2104), and exchange public keys that are
made for this one connection (X25519, RFC 7748):

    driver -> agent   magic, driver's nonce
    agent  -> driver  magic, agent's public key, HMAC(key, "agent" | both of the above)
    driver -> agent   driver's public key, HMAC(key, "driver" | all of the above)

What encrypts the frames (AES-256-GCM) are two keys, one for each direction, that HKDF (RFC 5869) makes from the shared
secret of the exchange and from the key of the fit. So who learns the key of the fit later can still not read what was
recorded before. Each frame's number is its nonce: no nonce is used twice with a key, and no frame is accepted twice.

The driver does no work with public keys before the agent has shown that it holds the key: a stranger costs it one HMAC.
This file is the only door for `cryptography`.
"""

from __future__ import annotations

import hmac

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from allreduce_spark.errors import AuthenticationError, ProtocolError
from allreduce_spark.rendezvous.protocol import Codec

__all__ = ["ANSWER_BYTES", "CHALLENGE_BYTES", "NONCE_BYTES", "REPLY_BYTES", "Answer", "challenge", "check_answer"]

MAGIC = b"allreduce_spark/2"
NONCE_BYTES = 32
PUBLIC_BYTES = 32
PROOF_BYTES = 32
KEY_BYTES = 32
CHALLENGE_BYTES = len(MAGIC) + NONCE_BYTES
ANSWER_BYTES = len(MAGIC) + PUBLIC_BYTES + PROOF_BYTES
REPLY_BYTES = PUBLIC_BYTES + PROOF_BYTES


def challenge(nonce: bytes) -> bytes:
    """The driver's first bytes on a new connection. `nonce` is random and never used again."""
    return MAGIC + nonce


class Answer:
    """The agent's part: `data` answers the driver's challenge, and `check` judges what comes back.

    Raises:
        ProtocolError: `received` is no challenge.
    """

    def __init__(self, key: bytes, received: bytes) -> None:
        if len(received) != CHALLENGE_BYTES or not received.startswith(MAGIC):
            raise ProtocolError("the other end does not speak this protocol, or another version of it")
        self._key, self._private = key, X25519PrivateKey.generate()
        public = self._private.public_key().public_bytes_raw()
        self._said = received[len(MAGIC) :] + public
        self.data = MAGIC + public + _proof(key, b"agent", self._said)

    def check(self, reply: bytes) -> Codec:
        """The codec for what follows, if `reply` shows that the other end is the driver.

        Raises:
            AuthenticationError: It does not hold the key of the fit.
        """
        public = reply[:PUBLIC_BYTES]
        said = self._said + public
        if not hmac.compare_digest(reply, public + _proof(self._key, b"driver", said)):
            raise AuthenticationError("whoever listens at the driver's address does not hold the key of this fit")
        to_agent, to_driver = _session_keys(self._key, self._private, public, said)
        return Codec(SessionCipher(to_driver, to_agent))


def check_answer(key: bytes, nonce: bytes, answer: bytes) -> tuple[bytes, Codec]:
    """The driver's part: its reply, and the codec for what follows, if `answer` shows that the agent holds `key`.

    Args:
        key: Secret of the fit.
        nonce: That of the challenge.
        answer: What the agent has sent.

    Raises:
        AuthenticationError: Whoever sent it does not hold the key.
    """
    agent_public = answer[len(MAGIC) : len(MAGIC) + PUBLIC_BYTES]
    if not hmac.compare_digest(answer, MAGIC + agent_public + _proof(key, b"agent", nonce + agent_public)):
        raise AuthenticationError("it does not hold the key of this fit")
    private = X25519PrivateKey.generate()
    public = private.public_key().public_bytes_raw()
    said = nonce + agent_public + public
    to_agent, to_driver = _session_keys(key, private, agent_public, said)
    return public + _proof(key, b"driver", said), Codec(SessionCipher(to_agent, to_driver))


class SessionCipher:
    """AES-256-GCM with a key for each direction; the number of a frame, which is never sent, is its nonce."""

    def __init__(self, send_key: bytes, receive_key: bytes) -> None:
        self._sending, self._receiving = AESGCM(send_key), AESGCM(receive_key)
        self._sent = self._received = 0

    def seal(self, content: bytes, lengths: bytes) -> bytes:
        sealed = self._sending.encrypt(_nonce(self._sent), content, lengths)
        self._sent += 1
        return sealed

    def unseal(self, sealed: bytes | bytearray | memoryview, lengths: bytes) -> bytes:
        try:
            content = self._receiving.decrypt(_nonce(self._received), sealed, lengths)
        except InvalidTag:
            raise ProtocolError("received a frame whose authentication tag is wrong") from None
        self._received += 1
        return content


def _nonce(number: int) -> bytes:
    return number.to_bytes(12, "big")


def _session_keys(key: bytes, private: X25519PrivateKey, public: bytes, said: bytes) -> tuple[bytes, bytes]:
    """The keys of the frames (to the agent, to the driver). `said` is all that both have sent, in order."""
    try:
        shared = private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:  # A public key that makes every secret zero: no honest end ever draws it.
        raise AuthenticationError("the other end's public key is none") from error
    both = HKDF(SHA256(), 2 * KEY_BYTES, salt=_proof(key, b"session", said), info=MAGIC).derive(shared)
    return both[:KEY_BYTES], both[KEY_BYTES:]


def _proof(key: bytes, purpose: bytes, said: bytes) -> bytes:
    return hmac.digest(key, MAGIC + b" " + purpose + b"|" + said, "sha256")
