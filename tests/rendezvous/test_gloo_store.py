"""Gloo's key-value store on loopback: as Horovod speaks to it, over the words of PMI."""

from __future__ import annotations

import http.client
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from allreduce_spark.errors import RendezvousError
from allreduce_spark.rendezvous.gloo_store import KeyValues, serve_gloo
from allreduce_spark.rendezvous.pmi import KeySpace


@contextmanager
def connected(space: KeySpace, rank: int = 0) -> Iterator[socket.socket]:
    """The rank's end of a PMI connection whose other end is answered from `space`."""
    ours, ranks_end = socket.socketpair()

    def answer() -> None:
        with ours, ours.makefile("r", newline="\n") as lines:
            for line in lines:
                for _, reply in space.answer(rank, line):
                    ours.sendall(reply.encode() + b"\n")

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        yield ranks_end
    finally:
        ranks_end.close()
        thread.join()


@pytest.fixture
def space() -> KeySpace:
    return KeySpace("test-1", 2, "(vector,(0,1,2))")


def ask(address: str, port: int, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
    """As Horovod does: it makes `http://ADDRESS:PORT/SCOPE/KEY` of what it is told, and sends what follows the host."""
    host, _, word = address.partition("/")
    connection = http.client.HTTPConnection(host, timeout=10)
    connection.request(method, f"/{word}:{port}/{path}", body)
    answer = connection.getresponse()
    content = answer.status, answer.read()
    connection.close()
    return content


@pytest.mark.parametrize("size", [0, 1, 136, 756, 757, 1600, 100_000])
def test_what_one_rank_puts_another_gets_whatever_its_size(space, size):
    value = bytes(number % 256 for number in range(size))
    with connected(space, 0) as first, connected(space, 1) as second:
        KeyValues(first).put("global/0", value)
        assert KeyValues(second).get("global/0") == value
        assert KeyValues(second).get("global/1") is None


def test_gloo_puts_and_gets_over_http(space):
    with (
        connected(space, 0) as first,
        connected(space, 1) as second,
        serve_gloo(first) as of_first,
        serve_gloo(second) as of_second,
    ):
        assert ask(*of_first, "PUT", "local_node0/0", b"\0\xffaddress = \n") == (200, b"")
        assert ask(*of_second, "GET", "local_node0/0") == (200, b"\0\xffaddress = \n")
        assert ask(*of_second, "GET", "local_node0/1") == (404, b"")
        assert ask(*of_first, "DELETE", "global/0") == (200, b"")


def test_a_key_that_is_put_while_it_is_asked_for_is_found_at_once(space):
    with connected(space, 0) as first, connected(space, 1) as second:
        late = threading.Timer(0.1, KeyValues(first).put, ["global/0", b"here"])
        with serve_gloo(second) as store:
            late.start()
            assert ask(*store, "GET", "global/0") == (200, b"here")
        late.join()


def test_whoever_does_not_know_the_word_gets_and_changes_nothing(space):
    with connected(space) as connection, serve_gloo(connection) as (address, port):
        ask(address, port, "PUT", "global/0", b"mine")
        stranger = address.partition("/")[0] + "/guessed"
        assert ask(stranger, port, "GET", "global/0") == (404, b"")
        assert ask(stranger, port, "PUT", "global/0", b"theirs") == (404, b"")
        assert ask(address, port, "GET", "global/0") == (200, b"mine")


def test_it_listens_on_loopback_alone_and_only_while_it_is_needed(space):
    with connected(space) as connection:
        with serve_gloo(connection) as (address, port):
            assert address.startswith("127.0.0.1:")
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=5)


def test_a_value_that_the_key_space_does_not_take_is_an_error(space):
    with connected(space) as connection, pytest.raises(RendezvousError, match="does not take"):
        KeyValues(connection).put("k" * 100, b"value")


def test_an_agent_that_is_gone_is_an_error_and_not_a_missing_key(space):
    with connected(space) as connection, serve_gloo(connection) as store:
        connection.shutdown(socket.SHUT_RDWR)
        status, content = ask(*store, "GET", "global/0")
    assert status == 503
    assert b"agent" in content
