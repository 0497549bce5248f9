"""The handshake, without a socket: two ends with one key understand each other, and nobody else gets in."""

from __future__ import annotations

import itertools

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from allreduce_spark.errors import AuthenticationError, ProtocolError
from allreduce_spark.rendezvous import handshake
from allreduce_spark.rendezvous.handshake import NONCE_BYTES, Answer, challenge, check_answer
from allreduce_spark.rendezvous.protocol import Codec, Message

KEY = bytes(range(32))
NONCE = b"d" * NONCE_BYTES


def shake_hands(driver_key: bytes = KEY, agent_key: bytes = KEY, nonce: bytes = NONCE) -> tuple[Codec, Codec]:
    """(driver's, agent's) codec, if each accepts the other."""
    answer = Answer(agent_key, challenge(nonce))
    reply, driver = check_answer(driver_key, nonce, answer.data)
    return driver, answer.check(reply)


def test_two_ends_with_one_key_understand_each_other():
    driver, agent = shake_hands()
    assert list(driver.feed(agent.encode(Message("hello")))) == [Message("hello")]
    assert list(agent.feed(driver.encode(Message("member")))) == [Message("member")]


def test_an_agent_without_the_key_is_refused():
    with pytest.raises(AuthenticationError, match="does not hold the key"):
        shake_hands(agent_key=b"another key")


def test_a_driver_without_the_key_is_refused():
    # It lets everybody in, but cannot say what the agent expects.
    answer = Answer(KEY, challenge(NONCE))
    reply, _ = check_answer(b"another key", NONCE, Answer(b"another key", challenge(NONCE)).data)
    with pytest.raises(AuthenticationError, match="does not hold the key"):
        answer.check(reply)


def test_every_connection_has_keys_of_its_own_even_where_the_nonce_is_the_same():
    driver, _ = shake_hands()
    _, agent = shake_hands()
    with pytest.raises(ProtocolError, match="tag is wrong"):
        list(agent.feed(driver.encode(Message("abort"))))


def test_the_key_of_the_fit_and_all_that_was_sent_do_not_give_the_keys_of_the_frames():
    """Forward secrecy: an eavesdropper who gets the key afterwards still lacks one of the two private keys."""
    answer = Answer(KEY, challenge(NONCE))
    reply, driver = check_answer(KEY, NONCE, answer.data)
    recorded = driver.encode(Message("result", {}, b"weights"))
    eavesdropper = Answer(KEY, challenge(NONCE))
    eavesdropper._said = answer._said
    codec = eavesdropper.check(reply)
    with pytest.raises(ProtocolError, match="tag is wrong"):
        list(codec.feed(recorded))
    assert [message.body for message in answer.check(reply).feed(recorded)] == [b"weights"]


def test_an_answer_overheard_once_does_not_open_a_second_connection():
    answer = Answer(KEY, challenge(b"1" * NONCE_BYTES))
    with pytest.raises(AuthenticationError):
        check_answer(KEY, b"2" * NONCE_BYTES, answer.data)


def test_a_reply_overheard_once_does_not_make_a_driver():
    old, new = Answer(KEY, challenge(NONCE)), Answer(KEY, challenge(NONCE))
    reply, _ = check_answer(KEY, NONCE, old.data)
    with pytest.raises(AuthenticationError):
        new.check(reply)


def test_what_one_end_has_said_is_no_proof_if_sent_back_to_it():
    answer = Answer(KEY, challenge(NONCE))
    with pytest.raises(AuthenticationError):
        answer.check(answer.data[len(handshake.MAGIC) :])
    # The stranger lets the driver prove itself, and claims to be an agent with that proof.
    reply, _ = check_answer(KEY, NONCE, answer.data)
    with pytest.raises(AuthenticationError):
        check_answer(KEY, NONCE, handshake.MAGIC + reply)


def test_a_public_key_from_somebody_in_the_middle_is_refused_by_both():
    middle = X25519PrivateKey.generate().public_key().public_bytes_raw()
    answer = Answer(KEY, challenge(NONCE))
    start = len(handshake.MAGIC)
    with pytest.raises(AuthenticationError):
        check_answer(KEY, NONCE, answer.data[:start] + middle + answer.data[start + len(middle) :])
    reply, _ = check_answer(KEY, NONCE, answer.data)
    with pytest.raises(AuthenticationError):
        answer.check(middle + reply[len(middle) :])


def test_any_one_bit_changed_in_any_of_the_three_messages_is_noticed():
    answer = Answer(KEY, challenge(NONCE))
    reply, _ = check_answer(KEY, NONCE, answer.data)
    for place, bit in itertools.product(range(len(answer.data)), range(8)):
        with pytest.raises(AuthenticationError):
            check_answer(KEY, NONCE, _flipped(answer.data, place, bit))
    for place, bit in itertools.product(range(len(reply)), range(8)):
        with pytest.raises(AuthenticationError):
            answer.check(_flipped(reply, place, bit))
    for place, bit in itertools.product(range(handshake.CHALLENGE_BYTES), range(8)):
        with pytest.raises((AuthenticationError, ProtocolError)):
            check_answer(KEY, NONCE, Answer(KEY, _flipped(challenge(NONCE), place, bit)).data)


def _flipped(data: bytes, place: int, bit: int) -> bytes:
    changed = bytearray(data)
    changed[place] ^= 1 << bit
    return bytes(changed)


@given(garbage=st.binary(max_size=200))
def test_garbage_is_no_challenge_no_answer_and_no_reply(garbage):
    with pytest.raises(AuthenticationError):
        check_answer(KEY, NONCE, garbage)
    with pytest.raises(AuthenticationError):
        Answer(KEY, challenge(NONCE)).check(garbage)
    with pytest.raises(ProtocolError):
        Answer(KEY, garbage)


def test_a_holder_of_the_key_whose_public_key_is_none_is_refused():
    nothing = bytes(handshake.PUBLIC_BYTES)  # With it every shared secret would be zero.
    proof = handshake._proof(KEY, b"agent", NONCE + nothing)
    with pytest.raises(AuthenticationError, match="public key"):
        check_answer(KEY, NONCE, handshake.MAGIC + nothing + proof)


@pytest.mark.parametrize("length", [0, 1, handshake.PROOF_BYTES, handshake.ANSWER_BYTES - 1])
def test_a_truncated_answer_or_reply_is_refused(length):
    answer = Answer(KEY, challenge(NONCE))
    with pytest.raises(AuthenticationError):
        check_answer(KEY, NONCE, answer.data[:length])
    reply, _ = check_answer(KEY, NONCE, answer.data)
    with pytest.raises(AuthenticationError):
        answer.check(reply[: min(length, handshake.REPLY_BYTES - 1)])


def test_a_challenge_of_another_version_is_refused():
    with pytest.raises(ProtocolError, match="another version"):
        Answer(KEY, challenge(NONCE).replace(b"/2", b"/1"))
