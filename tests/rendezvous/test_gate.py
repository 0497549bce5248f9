"""The driver's door, over real sockets: who holds the key gets in whoever else stands there, and nobody else does."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from allreduce_spark.config import Timeouts
from allreduce_spark.errors import RendezvousError
from allreduce_spark.rendezvous import gate, handshake
from allreduce_spark.rendezvous.client import Connection
from allreduce_spark.rendezvous.gate import Gate, Guest
from allreduce_spark.rendezvous.protocol import Codec, Message

KEY = bytes(range(32))
WAIT_S = 60.0


async def echo(guest: Guest) -> None:
    async for message in guest.messages():
        guest.send("echo", **message.fields)


class Door:
    """A gate of this machine. Its guests are answered with what they say; `ends` tells how their connections ended."""

    def __init__(self, expected: int = 1, attend: Callable[[Guest], Awaitable[None]] = echo) -> None:
        self._attend_to = attend
        self.ends: list[BaseException | None] = []
        self.gate = Gate(KEY, expected, self._attend)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.address: tuple[str, int] = self._do(self.gate.open("127.0.0.1"))

    async def _attend(self, guest: Guest) -> None:
        try:
            await self._attend_to(guest)
        except Exception as error:
            self.ends.append(error)
        else:
            self.ends.append(None)

    def _do(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def end_of_a_guest(self) -> BaseException | None:
        """How the connection of the guest ended that has left first, and is not asked for yet."""
        eventually(lambda: self.ends, "a guest has left")
        return self.ends.pop(0)

    def close(self) -> None:
        async def stop() -> None:
            self.gate.close()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        self._do(stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def eventually(is_so: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < deadline, f"not within {WAIT_S} s: {what}"
        time.sleep(0.01)


@pytest.fixture
def open_door():
    doors = []

    def make(**arguments) -> Door:
        doors.append(Door(**arguments))
        return doors[-1]

    yield make
    for door in doors:
        door.close()


def converse(connection: Connection) -> None:
    """Say a word nobody can guess, and hear it."""
    word = secrets.token_hex(8)
    connection.send("say", word=word)
    assert connection.receive(WAIT_S).fields == {"word": word}


@contextlib.contextmanager
def agent_at(door: Door) -> Iterator[Connection]:
    with contextlib.closing(Connection(door.address, KEY)) as connection:
        converse(connection)
        yield connection


def stranger_at(door: Door) -> socket.socket:
    return socket.create_connection(door.address, timeout=WAIT_S)


def is_sent_away(stranger: socket.socket) -> bool:
    """Wait until the stranger is hung up on."""
    try:
        while stranger.recv(1000):
            pass
    except ConnectionResetError:
        pass  # Something that it had said was still unread.
    return True


def enter_by_hand(door: Door) -> tuple[socket.socket, Codec, bytes]:
    """What an agent does: its socket, its codec, and the bytes with which it answered the challenge."""
    sock = stranger_at(door)
    answer = handshake.Answer(KEY, sock.recv(handshake.CHALLENGE_BYTES, socket.MSG_WAITALL))
    sock.sendall(answer.data)
    return sock, answer.check(sock.recv(handshake.REPLY_BYTES, socket.MSG_WAITALL)), answer.data


# Who gets in


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_who_holds_the_key_gets_in_and_is_answered(host, open_door):
    door = open_door()
    with contextlib.closing(Connection((host, door.address[1]), KEY)) as connection:
        converse(connection)
    assert door.end_of_a_guest() is None


def test_who_holds_another_key_is_refused(open_door, caplog):
    door = open_door()
    with pytest.raises(RendezvousError, match="hung up"):
        Connection(door.address, b"another key", Timeouts(start_s=2))
    eventually(lambda: "it does not hold the key of this fit" in caplog.text, "the warning")
    with agent_at(door):
        pass


def test_an_answer_that_was_recorded_opens_nothing(open_door):
    door = open_door()
    sock, _, recorded = enter_by_hand(door)
    with sock, stranger_at(door) as stranger:
        stranger.sendall(recorded)
        assert is_sent_away(stranger)


def test_after_the_gate_is_closed_nobody_listens(open_door):
    door = open_door()
    with agent_at(door):
        pass
    door._loop.call_soon_threadsafe(door.gate.close)
    eventually(lambda: not _listens(door), "nobody listens")


def _listens(door: Door) -> bool:
    try:
        stranger_at(door).close()
    except ConnectionRefusedError:
        return False
    except ConnectionResetError:
        pass  # It was closed in this moment.
    return True


# Frames that nobody has sealed as the next one


def replayed(codec: Codec, sock: socket.socket) -> bytes:
    frame = codec.encode(Message("say", {"word": "one"}))
    return frame + frame


def reordered(codec: Codec, sock: socket.socket) -> bytes:
    one, two = (codec.encode(Message("say", {"word": word})) for word in ("one", "two"))
    return two + one


def left_out(codec: Codec, sock: socket.socket) -> bytes:
    codec.encode(Message("say", {"word": "one"}))
    return codec.encode(Message("say", {"word": "two"}))


def reflected(codec: Codec, sock: socket.socket) -> bytes:
    sock.sendall(codec.encode(Message("say", {"word": "one"})))
    return sock.recv(1000)


def altered(codec: Codec, sock: socket.socket) -> bytes:
    frame = bytearray(codec.encode(Message("say", {"word": "one"})))
    frame[len(frame) // 2] ^= 1
    return bytes(frame)


def plain(codec: Codec, sock: socket.socket) -> bytes:
    return Codec().encode(Message("say", {"word": "one"})) + bytes(16)


def huge(codec: Codec, sock: socket.socket) -> bytes:
    return b"\xff" * 8


def truncated(codec: Codec, sock: socket.socket) -> bytes:
    return codec.encode(Message("say", {"word": "one"}))[:-1]


FORGERIES = [
    (replayed, 1, "tag is wrong"),
    (reordered, 0, "tag is wrong"),
    (left_out, 0, "tag is wrong"),
    (reflected, 0, "tag is wrong"),
    (altered, 0, "tag is wrong"),
    (plain, 0, "tag is wrong"),
    (huge, 0, "over the limit"),
    (truncated, 0, "in the middle of a message"),
]


@pytest.mark.parametrize(("forge", "understood", "error"), FORGERIES)
def test_a_connection_into_which_somebody_interferes_ends_and_the_others_go_on(open_door, forge, understood, error):
    door = open_door()
    with agent_at(door) as agent:
        sock, codec, _ = enter_by_hand(door)
        with sock:
            sock.sendall(forge(codec, sock))
            sock.shutdown(socket.SHUT_WR)
            received = bytearray()
            while data := sock.recv(1000):
                received += data
            assert len(list(codec.feed(bytes(received)))) == understood
        assert error in str(door.end_of_a_guest())
        converse(agent)


def test_a_guest_that_reads_nothing_is_hung_up_on_before_memory_grows(open_door, monkeypatch):
    monkeypatch.setattr(gate, "MAX_UNSENT_BYTES", 1 << 20)
    sizes = []

    async def talk(guest: Guest) -> None:
        while not guest._writer.is_closing():
            guest.send("pmi", line="x" * 50_000)
            sizes.append(guest._unsent_bytes)
            await asyncio.sleep(0)
        await echo(guest)

    door = open_door(attend=talk)
    sock, _, _ = enter_by_hand(door)
    with sock:
        assert "unread" in str(door.end_of_a_guest())
    assert max(sizes) < (1 << 20) + 100_000


# Crowds


def test_a_stranger_who_sends_a_byte_at_a_time_has_no_more_time_than_others(open_door, monkeypatch):
    monkeypatch.setattr(gate, "HANDSHAKE_S", 0.5)
    door = open_door()
    with stranger_at(door) as slow, stranger_at(door) as silent:
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < handshake.ANSWER_BYTES:
                slow.sendall(handshake.MAGIC[:1])
                sent += 1
                time.sleep(0.05)
        assert sent < handshake.ANSWER_BYTES
        assert is_sent_away(silent)
    with agent_at(door):
        pass


def test_where_too_many_wait_the_oldest_stranger_has_to_go_and_the_newcomer_is_heard(open_door, monkeypatch):
    monkeypatch.setattr(gate, "MAX_STRANGERS", 2)
    door = open_door(expected=1)
    strangers = []
    for _ in range(5):
        strangers.append(stranger_at(door))
        assert len(strangers[-1].recv(1000)) == handshake.CHALLENGE_BYTES
    assert all(is_sent_away(stranger) for stranger in strangers[:2])
    for stranger in strangers[2:]:
        stranger.settimeout(0.1)
        with pytest.raises(TimeoutError):
            stranger.recv(1)
    with agent_at(door):
        pass
    for stranger in strangers:
        stranger.close()


def test_many_agents_may_come_at_once(open_door, monkeypatch):
    monkeypatch.setattr(gate, "MAX_STRANGERS", 0)
    door = open_door(expected=40)
    with contextlib.ExitStack() as stack:
        by_hand = [stack.enter_context(stranger_at(door)) for _ in range(40)]
        for sock in by_hand:
            assert len(sock.recv(1000)) == handshake.CHALLENGE_BYTES


def test_refusals_are_told_at_once_and_then_in_summaries(open_door, monkeypatch, caplog):
    monkeypatch.setattr(gate, "REPORT_S", 0.5)
    door = open_door()
    for _ in range(300):
        stranger_at(door).close()

    def told() -> int:
        numbers = [message.split()[1] for message in caplog.messages if message.startswith("refused")]
        return sum(1 if number == "a" else int(number) for number in numbers)

    eventually(lambda: told() == 300, "all are told")
    assert caplog.messages[0].startswith("refused a connection from 127.0.0.1")
    assert caplog.messages[1].startswith("refused ")
    assert "more connections; the last from 127.0.0.1" in caplog.messages[1]
    assert len(caplog.messages) < 100


@contextlib.contextmanager
def open_files_limited_to(limit: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(limit, soft), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def lowest_free_descriptor() -> int:
    descriptor = os.open("/dev/null", os.O_RDONLY)
    os.close(descriptor)
    return descriptor


@contextlib.contextmanager
def crowd_at(door: Door, strangers: int, at_once: int) -> Iterator[subprocess.Popen[str]]:
    """A process that is ready to send a crowd, and then an agent, as soon as it gets a line."""
    arguments = [str(door.address[1]), str(strangers), str(at_once)]
    with subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("stranger.py")), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(gate.__file__).parents[2])},
    ) as process:
        process.stdin.write(KEY.hex() + "\n")
        process.stdin.flush()
        assert process.stdout.readline() == "the crowd comes\n"
        yield process
        process.stdin.close()
        assert process.wait(WAIT_S) == 0


def go(process: subprocess.Popen[str]) -> None:
    process.stdin.write("\n")
    process.stdin.flush()


def test_ten_thousand_connections_neither_keep_an_agent_out_nor_disturb_a_conversation(open_door):
    # 1024 open files is what most systems allow a process, and so it is here, for the driver and for the crowd.
    with open_files_limited_to(1024):
        door = open_door(expected=4)
        with agent_at(door) as agent, crowd_at(door, strangers=10_000, at_once=700) as crowd:
            comes = threading.Thread(target=lambda: said.append(crowd.stdout.readline()))
            said: list[str] = []
            go(crowd)
            comes.start()
            got_in = 0
            while comes.is_alive():
                converse(agent)
                with agent_at(door):
                    got_in += 1
            comes.join()
            assert said == ["the crowd is there\n"]
            assert got_in > 0
            assert crowd.stdout.readline() == "I hold the key\n"
            converse(agent)


def test_an_agent_gets_in_though_strangers_have_taken_all_files_that_the_process_may_open(open_door):
    door = open_door()
    with agent_at(door) as agent, crowd_at(door, strangers=60, at_once=60) as crowd:
        with open_files_limited_to(lowest_free_descriptor() + 8):
            go(crowd)
            assert crowd.stdout.readline() == "the crowd is there\n"
            assert crowd.stdout.readline() == "I hold the key\n"
        converse(agent)


def test_where_nobody_can_be_accepted_the_gate_tries_again_in_peace_and_lets_the_agent_in_later(open_door, monkeypatch):
    monkeypatch.setattr(gate, "PAUSE_S", 0.02)
    door = open_door()
    turns = 0
    accept = door.gate._accept

    def counted(listener: socket.socket) -> None:
        nonlocal turns
        turns += 1
        accept(listener)

    monkeypatch.setattr(door.gate, "_accept", counted)
    with crowd_at(door, strangers=0, at_once=0) as crowd:
        with open_files_limited_to(lowest_free_descriptor()):
            go(crowd)
            assert crowd.stdout.readline() == "the crowd is there\n"
            eventually(lambda: turns > 3, "the gate has tried several times")
            before, refused_before = turns, door.gate._refusals._untold
            time.sleep(1)
            assert turns - before < 200, "the loop turns without a rest"
            assert door.gate._refusals._untold > refused_before
        assert crowd.stdout.readline() == "I hold the key\n"
