"""Frames, without a socket: what is accepted, and everything that is refused."""

from __future__ import annotations

import itertools
import json
import pickle
import struct
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allreduce_spark.errors import ProtocolError
from allreduce_spark.rendezvous.handshake import SessionCipher
from allreduce_spark.rendezvous.protocol import _TYPES_OF_FIELDS, MAX_BODY_BYTES, TAG_BYTES, Codec, Message, Phase

TO_AGENT, TO_DRIVER = bytes(range(32)), bytes(range(32, 64))

# JSON as Python writes it: lone surrogates (a file name that is not UTF-8) and infinities included.
TEXTS = st.text(st.characters(codec=None))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
# Hypothesis also tries the words of the code that it tests, "kind" and the names whose types are fixed among them.
NAMES = TEXTS.filter(lambda name: name not in {"kind", *_TYPES_OF_FIELDS})
MESSAGES = st.builds(
    Message,
    TEXTS,
    st.dictionaries(NAMES, VALUES, max_size=4),
    st.binary(max_size=300),
)


def both_ends() -> tuple[Codec, Codec]:
    """(driver's, agent's) codec of one connection."""
    return Codec(SessionCipher(TO_AGENT, TO_DRIVER)), Codec(SessionCipher(TO_DRIVER, TO_AGENT))


def frames(sender: Codec, *kinds: str) -> list[bytes]:
    return [sender.encode(Message(kind, {"number": index}, b"body")) for index, kind in enumerate(kinds)]


# The codec


@given(messages=st.lists(MESSAGES, max_size=4), cuts=st.lists(st.integers(0, 4000)))
def test_every_message_arrives_as_it_was_however_the_stream_is_cut(messages, cuts):
    driver, agent = both_ends()
    stream = b"".join(driver.encode(message) for message in messages)
    places = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    received = [message for start, end in itertools.pairwise(places) for message in agent.feed(stream[start:end])]
    assert received == messages


def test_a_stream_may_come_byte_by_byte_and_in_both_directions():
    driver, agent = both_ends()
    for sender, receiver in ((driver, agent), (agent, driver)):
        stream = b"".join(frames(sender, "one", "two"))
        received = [message for index in range(len(stream)) for message in receiver.feed(stream[index : index + 1])]
        assert [message.kind for message in received] == ["one", "two"]


def test_without_a_cipher_frames_carry_no_tag_and_are_understood():
    assert Codec().encode(Message("done")).endswith(b'{"kind":"done"}')
    assert list(Codec().feed(Codec().encode(Message("done")))) == [Message("done")]


def test_what_is_sent_over_the_network_cannot_be_read_and_is_never_the_same_twice():
    driver, _ = both_ends()
    message = Message("result", {"word": "weights"}, b"a secret body")
    first, second = driver.encode(message), driver.encode(message)
    for frame in (first, second):
        assert not any(word in frame for word in (b"result", b"weights", b"secret", b"kind"))
    assert first[8:] != second[8:]
    assert len(first) == len(Codec().encode(message)) + TAG_BYTES


def test_a_stream_that_ends_within_a_message_is_known_to_be_cut_off():
    driver, agent = both_ends()
    whole = driver.encode(Message("done"))
    for length in range(1, len(whole)):
        _, agent = both_ends()
        assert list(agent.feed(whole[:length])) == []
        assert not agent.is_between_messages
    assert list(agent.feed(whole[-1:])) == [Message("done")]
    assert agent.is_between_messages


def test_a_frame_of_which_any_one_bit_was_changed_is_never_taken_for_a_message():
    whole = both_ends()[0].encode(Message("result", {"epoch": 3}, b"weights"))
    for place, bit in itertools.product(range(len(whole)), range(8)):
        _, agent = both_ends()
        frame = bytearray(whole)
        frame[place] ^= 1 << bit
        # A changed length makes the receiver either refuse or wait for bytes that never come; it must not make a message.
        try:
            assert list(agent.feed(bytes(frame))) == []
            assert not agent.is_between_messages
        except ProtocolError:
            pass


def test_a_byte_that_moves_from_the_header_to_the_body_is_noticed():
    driver, agent = both_ends()
    frame = driver.encode(Message("log", {}, b"text"))
    header_bytes, body_bytes = struct.unpack_from(">II", frame)
    with pytest.raises(ProtocolError, match="tag is wrong"):
        list(agent.feed(struct.pack(">II", header_bytes - 1, body_bytes + 1) + frame[8:]))


def test_a_frame_sent_again_is_refused():
    driver, agent = both_ends()
    (frame,) = frames(driver, "abort")
    assert len(list(agent.feed(frame))) == 1
    with pytest.raises(ProtocolError, match="tag is wrong"):
        list(agent.feed(frame))


def test_a_frame_that_was_left_out_is_noticed_at_the_next():
    driver, agent = both_ends()
    _, second = frames(driver, "one", "two")
    with pytest.raises(ProtocolError, match="tag is wrong"):
        list(agent.feed(second))


def test_two_frames_that_changed_places_are_refused():
    driver, agent = both_ends()
    first, second = frames(driver, "one", "two")
    with pytest.raises(ProtocolError, match="tag is wrong"):
        list(agent.feed(second + first))


def test_a_frame_sent_back_to_its_sender_is_refused():
    driver, _ = both_ends()
    (frame,) = frames(driver, "abort")
    with pytest.raises(ProtocolError, match="tag is wrong"):
        list(driver.feed(frame))


def test_a_frame_of_another_connection_is_refused():
    _, agent = both_ends()
    other = Codec(SessionCipher(b"o" * 32, b"o" * 32))
    with pytest.raises(ProtocolError, match="tag is wrong"):
        list(agent.feed(other.encode(Message("abort"))))


@pytest.mark.parametrize(
    "message", [Message("result", {}, b"x" * (MAX_BODY_BYTES + 1)), Message("log", {"a": "x" * 2**20})]
)
def test_a_message_over_the_limits_is_refused_before_it_is_sent(message):
    with pytest.raises(ProtocolError, match="over the limit"):
        Codec().encode(message)


@pytest.mark.parametrize(("header", "body"), [(2**20 + 1, 0), (0, MAX_BODY_BYTES + 1), (2**32 - 1, 2**32 - 1)])
def test_a_frame_that_claims_to_be_huge_is_refused_at_its_first_bytes(header, body):
    _, agent = both_ends()
    with pytest.raises(ProtocolError, match="over the limit"):
        list(agent.feed(struct.pack(">II", header, body)))


def test_the_longest_message_there_may_be_arrives():
    driver, agent = both_ends()
    message = Message("result", {"a": "x" * (2**20 - 100)}, bytes(MAX_BODY_BYTES))
    assert list(agent.feed(driver.encode(message))) == [message]


def test_the_longest_log_tail_fits_in_a_message_whatever_its_letters():
    for letter in ("x", "━", "\U0001d54f", "\x1b"):
        Codec().encode(Message("failed", {"cause": letter * 20_000, "log_tail": [letter * 2000] * 50}))


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"3",
        b'"kind"',
        b"{}",
        b'{"kind": 3}',
        b'{"kind": null}',
        b"{" * 100_000,
        b"[" * 100_000,
        pickle.dumps({"kind": "hello"}),
    ],
)
def test_a_header_that_is_no_message_is_a_protocol_error(header):
    with pytest.raises(ProtocolError):
        list(Codec().feed(struct.pack(">II", len(header), 0) + header))


@pytest.mark.parametrize(
    "fields",
    [
        {"rank": 1.5},
        {"rank": True},
        {"epoch": float("inf")},
        {"step": "3"},
        {"step": 2**63},
        {"waited_s": 10**400},
        {"phase": ["train"]},
        {"line": 3},
        {"cause": {"no": "text"}},
        {"cause": None},
        {"log_tail": "text"},
        {"consequence": 1},
    ],
)
def test_a_field_of_another_type_than_its_name_says_is_a_protocol_error(fields):
    with pytest.raises(ProtocolError, match=f"'failed' message with {next(iter(fields))}="):
        list(Codec().feed(Codec().encode(Message("failed", fields))))


def test_an_error_about_a_message_does_not_repeat_all_of_it():
    for message in (
        Message("x" * 100_000, {"rank": "y" * 100_000}),
        Message("failed", {"kind": 3, "cause": [0] * 100_000}),
    ):
        with pytest.raises(ProtocolError) as caught:
            list(Codec().feed(Codec().encode(message)))
        assert len(str(caught.value)) < 1000


def test_nothing_that_could_unpickle_is_imported_by_the_protocol():
    code = "import sys; import allreduce_spark.rendezvous.protocol; print(json.dumps(sorted(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", f"import json; {code}"], capture_output=True, check=True, timeout=60)
    assert not {"pickle", "_pickle", "cloudpickle", "shelve"} & set(json.loads(answer.stdout))


def test_only_phases_with_batches_have_a_step():
    assert [phase.value for phase in Phase if phase.has_step] == ["first step", "train", "validate", "checkpoint"]
