"""The agent's and the rank's ends of their connections."""

from __future__ import annotations

import contextlib
import secrets
import select
import socket
import threading
import time

import pytest

from allreduce_spark.config import Timeouts
from allreduce_spark.errors import AuthenticationError, ProtocolError, RendezvousError, RendezvousTimeoutError
from allreduce_spark.rendezvous import client, handshake
from allreduce_spark.rendezvous.client import Channel, Connection
from allreduce_spark.rendezvous.protocol import Codec, Message

KEY = b"k" * 32


@pytest.fixture
def channels():
    """Both ends of a channel between agent and rank."""
    ends = tuple(Channel(sock) for sock in socket.socketpair())
    yield ends
    for end in ends:
        end.close()


@pytest.fixture
def raw():
    """A channel, and the bare socket at its other end."""
    mine, other = socket.socketpair()
    channel = Channel(mine)
    yield channel, other
    channel.close()
    other.close()


# The channel


def test_messages_go_both_ways_in_order(channels):
    agent, rank = channels
    for number in range(3):
        agent.send("start", number=number)
        rank.send("progress", b"body", number=number)
    assert [rank.receive(20) for _ in range(3)] == [Message("start", {"number": number}) for number in range(3)]
    assert agent.messages() == [Message("progress", {"number": number}, b"body") for number in range(3)]


def test_a_frame_that_comes_in_pieces_is_one_message_for_either_way_of_reading(raw):
    channel, other = raw
    frame = Codec().encode(Message("start", {"x": 1}, b"body"))
    for read in (lambda: [channel.receive(20)], lambda: [m for _ in range(2) for m in channel.messages()]):
        other.sendall(frame[:9])
        threading.Timer(0.1, other.sendall, [frame[9:]]).start()
        assert read() == [Message("start", {"x": 1}, b"body")]


def test_a_message_larger_than_any_buffer_arrives(channels):
    agent, rank = channels
    body = secrets.token_bytes(3 << 20)
    sender = threading.Thread(target=rank.send, args=("result", body))
    sender.start()
    assert agent.receive(20).body == body
    sender.join()


def test_nothing_within_the_time_is_a_timeout_and_the_channel_still_works(channels):
    agent, rank = channels
    started = time.monotonic()
    with pytest.raises(RendezvousTimeoutError, match="nothing was received"):
        rank.receive(0.1)
    assert time.monotonic() - started >= 0.1
    agent.send("start")
    assert rank.receive(20).kind == "start"


def test_half_a_message_within_the_time_is_a_timeout_too(raw):
    channel, other = raw
    other.sendall(Codec().encode(Message("start"))[:-1])
    with pytest.raises(RendezvousTimeoutError):
        channel.receive(0.2)


def test_the_other_ends_end_is_eof_after_all_that_it_said(channels):
    agent, rank = channels
    rank.send("done")
    rank.close()
    assert agent.receive(20).kind == "done"
    with pytest.raises(EOFError):
        agent.receive(20)
    with pytest.raises(OSError, match="pipe"):
        agent.send("start")


def test_garbage_is_a_protocol_error(raw):
    channel, other = raw
    other.sendall(b"\xff" * 100)
    with pytest.raises(ProtocolError):
        channel.receive(20)


def test_frames_of_several_threads_do_not_mix(channels):
    agent, rank = channels
    body = bytes(200_000)  # larger than the buffer of a socket, so that each takes several writes

    def send_some(number: int) -> None:
        for _ in range(5):
            rank.send("result", body, number=number)

    threads = [threading.Thread(target=send_some, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    received = [agent.receive(20) for _ in range(20)]
    assert sorted(message.fields["number"] for message in received) == sorted([0, 1, 2, 3] * 5)
    assert all(message.body == body for message in received)
    for thread in threads:
        thread.join()


# The connection to the driver


@pytest.fixture
def listener():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def answer(listener: socket.socket, *replies: bytes) -> threading.Thread:
    """Play a driver that sends these bytes, reading something between them; then hangs up."""

    def run() -> None:
        with listener.accept()[0] as sock, contextlib.suppress(OSError):
            for index, reply in enumerate(replies):
                if index:
                    sock.recv(1000)
                sock.sendall(reply)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


CHALLENGE = handshake.challenge(b"d" * handshake.NONCE_BYTES)


@pytest.mark.parametrize(
    ("replies", "error", "message"),
    [
        ([], RendezvousError, "hung up"),
        ([CHALLENGE[:10]], RendezvousError, "hung up"),
        ([CHALLENGE, b""], RendezvousError, "hung up"),
        ([CHALLENGE, b"too short"], RendezvousError, "hung up"),
        ([b"HTTP/1.1 400 Bad Request\r\n" * 10], ProtocolError, "does not speak this protocol"),
        ([CHALLENGE, bytes(handshake.REPLY_BYTES)], AuthenticationError, "does not hold the key"),
    ],
)
def test_whoever_is_not_the_driver_is_not_trusted(listener, replies, error, message):
    driver = answer(listener, *replies)
    with pytest.raises(error, match=message):
        Connection(listener.getsockname(), KEY, Timeouts(start_s=0.5 if error is RendezvousError else 20))
    driver.join()


def test_a_driver_that_cannot_be_reached_is_named_with_what_to_look_at(listener):
    address = listener.getsockname()
    listener.close()
    with pytest.raises(RendezvousError, match=rf"cannot reach the driver at 127.0.0.1:{address[1]}.*spark.driver.host"):
        Connection(address, KEY)


def test_a_driver_that_is_stopped_is_given_up_after_start_s(listener):
    with pytest.raises(RendezvousError, match=r"was not let in by the driver at .* within 0.2 s.*Timeouts.start_s"):
        Connection(listener.getsockname(), KEY, Timeouts(start_s=0.2))


def test_a_listener_that_says_a_byte_at_a_time_is_given_up_as_soon(listener):
    given_up = threading.Event()

    def drip() -> None:
        with listener.accept()[0] as sock, contextlib.suppress(OSError):
            for byte in CHALLENGE:
                sock.sendall(bytes([byte]))
                if given_up.wait(0.1):
                    return

    driver = threading.Thread(target=drip)
    driver.start()
    with pytest.raises(RendezvousError, match="timed out"):
        Connection(listener.getsockname(), KEY, Timeouts(start_s=0.5))
    given_up.set()
    driver.join()


def test_an_agent_that_was_sent_away_from_a_crowded_door_comes_again(listener):
    def send_away_twice() -> None:
        for _ in range(2):
            listener.accept()[0].close()
        drivers.append(let_in(listener))

    drivers: list[Channel] = []
    thread = threading.Thread(target=send_away_twice)
    thread.start()
    with contextlib.closing(Connection(listener.getsockname(), KEY)) as connection:
        thread.join()
        connection.send("hello")
        assert drivers[0].receive(20).kind == "hello"
        drivers[0].close()


def let_in(listener: socket.socket) -> Channel:
    """Play a driver that holds the key; return its end of the connection."""
    sock = listener.accept()[0]
    nonce = secrets.token_bytes(handshake.NONCE_BYTES)
    sock.sendall(handshake.challenge(nonce))
    reply, codec = handshake.check_answer(KEY, nonce, sock.recv(handshake.ANSWER_BYTES, socket.MSG_WAITALL))
    sock.sendall(reply)
    return Channel(sock, codec)


@pytest.fixture
def pair(listener):
    """An agent's connection, and a channel that speaks for the driver."""

    drivers: list[Channel] = []
    thread = threading.Thread(target=lambda: drivers.append(let_in(listener)))
    thread.start()
    connection = Connection(listener.getsockname(), KEY, Timeouts(heartbeat_s=0.1, silence_s=0.5))
    thread.join()
    yield connection, drivers[0]
    drivers[0].close()
    connection.close()


def test_the_address_of_this_host_is_that_of_the_route_to_the_driver(pair):
    assert pair[0].local_address == "127.0.0.1"


def test_hearing_the_driver_is_noted(pair):
    connection, driver = pair
    connection.heard_at = 0.0
    driver.send("heartbeat")
    select.select([connection], [], [], 20)
    connection.messages()
    assert connection.heard_at > 0


def test_heartbeats_say_where_the_rank_is_until_the_connection_is_closed(pair):
    connection, driver = pair
    steps = iter(range(10**6))
    connection.start_heartbeats(0.02, lambda: {"phase": "train", "epoch": 1, "step": next(steps)})
    beats = [driver.receive(20).fields for _ in range(3)]
    assert beats == [{"phase": "train", "epoch": 1, "step": step} for step in range(3)]
    threading.Timer(0.1, driver.close).start()
    connection.close()
    deadline = time.monotonic() + 20
    while any(thread.name == "allreduce-spark-heartbeat" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def send_many(connection: Connection, kind: str, body: bytes = b"") -> None:
    for _ in range(200):
        connection.send(kind, body)
        time.sleep(0.01)


def test_a_driver_that_is_gone_is_a_rendezvous_error_for_who_sends_and_eof_for_who_reads(pair):
    connection, driver = pair
    driver.close()
    with pytest.raises(RendezvousError, match="the driver is gone"):
        send_many(connection, "progress")
    with pytest.raises(EOFError):
        connection.receive(20)


def test_a_driver_that_takes_nothing_is_given_up_and_the_reading_side_learns_of_it(pair):
    connection, _ = pair
    reason = r"did not take a 'result' message within 0.5 s.*Timeouts.silence_s"
    with pytest.raises(RendezvousError, match=reason):
        send_many(connection, "result", bytes(1 << 20))
    with pytest.raises(RendezvousError, match=reason):
        connection.send("heartbeat")  # of another thread: half a frame is on its way
    with pytest.raises(EOFError, match=reason):
        connection.receive(20)


def test_the_last_message_is_not_lost_though_the_agent_has_not_read_all(pair):
    connection, driver = pair
    for _ in range(100):
        driver.send("heartbeat")
    connection.send("failed", cause="the last word")
    closing = threading.Thread(target=connection.close)
    closing.start()
    assert driver.receive(20).fields == {"cause": "the last word"}
    with pytest.raises(EOFError):
        driver.receive(20)
    driver.close()
    closing.join()


def test_closing_waits_only_a_moment_for_a_driver_that_does_not_hang_up_whatever_it_says(pair, monkeypatch):
    monkeypatch.setattr(client, "GOODBYE_S", 0.3)
    connection, driver = pair
    is_closed = threading.Event()

    def go_on() -> None:
        with contextlib.suppress(OSError):
            while not is_closed.wait(0.01):
                driver.send("heartbeat")

    speaking = threading.Thread(target=go_on)
    speaking.start()
    connection.close()
    is_closed.set()
    speaking.join()
