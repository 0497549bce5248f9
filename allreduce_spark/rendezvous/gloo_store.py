"""Gloo's key-value store for one rank: HTTP on loopback, kept by the driver in the key space that MPI would use.

Horovod's Gloo asks an HTTP server for the addresses of the other ranks: it puts its own under a key, and gets theirs, again and
again until they are there. That server knows no authentication. So it does not listen on a network: every rank serves itself,
on 127.0.0.1, and passes each request on in the words of `pmi`, over the connection to its agent and from there to the driver.
A random word in each path keeps out other users of the host.

PMI's values are short lines of text, so a value travels as base64, in pieces: `KEY` holds their number and the first of them,
`KEY#1` the next.
"""

from __future__ import annotations

import base64
import contextlib
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from allreduce_spark.errors import RendezvousError
from allreduce_spark.rendezvous.pmi import VALUE_LIMIT

__all__ = ["KeyValues", "serve_gloo"]

PIECE_CHARACTERS = VALUE_LIMIT - 16  # beside the number of pieces
READ_BYTES = 1 << 16
LONGEST_VALUE = 1 << 20  # the addresses for 8,000 ranks
ANSWER_WITHIN_S = 1.0  # for a key that nobody has put yet; then Gloo asks again
ASK_AGAIN_S, ASK_AGAIN_LATER_S = 0.02, 0.3


class KeyValues:
    """Bytes by key, shared by the ranks of a generation: the rank's end of a PMI connection. Safe to call from several threads.

    Args:
        connection: As `PMI_FD` names it; MPI must not use it meanwhile. Its timeout is the deadline of each answer.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection, self._received = connection, b""
        self._asking = threading.Lock()
        self._space = self._ask("get_my_kvsname", "my_kvsname").partition("kvsname=")[2]

    def put(self, key: str, value: bytes) -> None:
        """Set a key.

        Raises:
            RendezvousError: The agent is gone, or the key space does not take it.
        """
        text = base64.urlsafe_b64encode(value).decode()
        pieces = [text[start : start + PIECE_CHARACTERS] for start in range(0, len(text), PIECE_CHARACTERS)] or [""]
        for number, piece in reversed(list(enumerate(pieces))):  # whoever finds the first finds all
            name, content = (f"{key}#{number}", piece) if number else (key, f"{len(pieces)}:{piece}")
            answer = self._ask(f"put kvsname={self._space} key={name} value={content}", "put_result")
            if "rc=0" not in answer.split():
                raise RendezvousError(f"the key space does not take {name!r}: {answer}")

    def get(self, key: str) -> bytes | None:
        """The value of a key, or None where nobody has set it.

        Raises:
            RendezvousError: The agent is gone.
        """
        first = self._get(key)
        if first is None:
            return None
        count, _, text = first.partition(":")
        return base64.urlsafe_b64decode(text + "".join(self._get(f"{key}#{n}") or "" for n in range(1, int(count))))

    def _get(self, key: str) -> str | None:
        answer = self._ask(f"get kvsname={self._space} key={key}", "get_result")
        words, _, value = answer.partition(" value=")
        return value if "rc=0" in words.split() else None

    def _ask(self, words: str, answered_by: str) -> str:
        try:
            with self._asking:
                self._connection.sendall(f"cmd={words}\n".encode())
                while b"\n" not in self._received:
                    data = self._connection.recv(READ_BYTES)
                    if not data:
                        raise RendezvousError("the agent closed the connection over which the ranks find each other")
                    self._received += data
                line, _, self._received = self._received.partition(b"\n")
        except OSError as error:
            raise RendezvousError(f"the agent cannot be asked where the other ranks are: {error}") from error
        answer = line.decode(errors="replace")
        if not answer.startswith(f"cmd={answered_by} "):
            raise RendezvousError(f"the agent answered {answer[:200]!r} to cmd={words[:80]!r}")
        return answer


@contextlib.contextmanager
def serve_gloo(connection: socket.socket) -> Iterator[tuple[str, int]]:
    """Serve the store while this rank opens its communicator.

    Args:
        connection: As for `KeyValues`.

    Yields:
        What Horovod is to be told as its rendezvous server: address and port. The "address" is more than that, because of the
        random word: Horovod makes the URL `http://ADDRESS:PORT/SCOPE/KEY` of it.

    Raises:
        RendezvousError: The agent is gone.
    """
    values, word = KeyValues(connection), secrets.token_urlsafe(16)

    def answer(path: str, body: bytes | None) -> bytes | None:
        """Put `body`, or get where there is none; None where there is no such key."""
        given, _, key = path.lstrip("/").partition("/")
        if not secrets.compare_digest(given.partition(":")[0].encode(), word.encode()):
            return None
        if body is not None:
            values.put(key, body)
            return b""
        deadline, pause_s = time.monotonic() + ANSWER_WITHIN_S, ASK_AGAIN_S
        while (value := values.get(key)) is None and time.monotonic() < deadline:
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, ASK_AGAIN_LATER_S)
        return value

    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(answer))
    thread = threading.Thread(target=server.serve_forever, args=(ASK_AGAIN_S,), name="gloo-store", daemon=True)
    thread.start()
    try:
        port = server.server_address[1]
        yield f"127.0.0.1:{port}/{word}", port
    finally:
        server.shutdown()
        server.server_close()


def _handler(answer: Callable[[str, bytes | None], bytes | None]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = 10.0

        def do_GET(self) -> None:
            self._reply(None)

        def do_PUT(self) -> None:
            length = int(self.headers["Content-Length"])
            self._reply(self.rfile.read(min(length, LONGEST_VALUE)))

        def do_DELETE(self) -> None:  # Gloo's goodbye; the driver forgets the key space as a whole
            self._send(200, b"")

        def _reply(self, body: bytes | None) -> None:
            try:
                value = answer(self.path, body)
            except RendezvousError as error:
                self._send(503, str(error).encode())
            else:
                self._send(404 if value is None else 200, value or b"")

        def _send(self, status: int, content: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002  a name of the standard library
            """Nothing: paths hold the random word."""

    return Handler
