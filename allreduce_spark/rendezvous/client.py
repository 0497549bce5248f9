"""The agent's end of the connection to the driver, and the agent's and the rank's ends of the channel between them.

Blocking sockets, one lock for sending. `Connection` is the authenticated one over the network; `Channel` is a socket pair
on one machine, which needs no keys. Both speak the frames of `protocol`.
"""

from __future__ import annotations

import contextlib
import secrets
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from allreduce_spark.config import Timeouts
from allreduce_spark.errors import RendezvousError, RendezvousTimeoutError
from allreduce_spark.rendezvous import handshake
from allreduce_spark.rendezvous.protocol import Codec, Message

__all__ = ["Channel", "Connection"]

CONNECT_S = 30.0  # for TCP: the host answers even where the driver is stopped, so nobody is there, or a firewall is
READ_BYTES = 1 << 18
GOODBYE_S = 1.0
DEFAULTS = Timeouts()


class Channel:
    """Messages over a connected stream socket."""

    def __init__(self, sock: socket.socket, codec: Codec | None = None) -> None:
        self._socket, self._codec = sock, codec or Codec()
        self._sending = threading.Lock()
        self._received: deque[Message] = deque()

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, kind: str, body: bytes = b"", **fields: Any) -> None:
        """Send one message; may be called from several threads.

        Raises:
            OSError: The other end is gone.
        """
        with self._sending:
            self._socket.sendall(self._codec.encode(Message(kind, fields, body)))

    def messages(self) -> list[Message]:
        """What has come in; reads the socket once, so call it when `fileno` is readable.

        Raises:
            EOFError: The other end has closed, or is gone.
        """
        try:
            data = self._socket.recv(READ_BYTES)
        except OSError as error:  # A ConnectionError, or "timed out" and "no route" where a host has vanished.
            raise EOFError(str(error)) from error
        if not data:
            where = "" if self._codec.is_between_messages else " in the middle of a message"
            raise EOFError(f"the other end closed the connection{where}")
        return list(self._codec.feed(data))

    def receive(self, timeout_s: float) -> Message:
        """The next message, waiting for it `timeout_s` at most.

        Raises:
            EOFError: The other end is gone.
            RendezvousTimeoutError: Nothing came in time.
        """
        deadline = time.monotonic() + timeout_s
        while not self._received:
            readable, _, _ = select.select([self], [], [], max(0.0, deadline - time.monotonic()))
            if not readable:
                raise RendezvousTimeoutError(f"nothing was received within {timeout_s:.0f} s")
            self._received.extend(self.messages())
        return self._received.popleft()

    def close(self) -> None:
        self._socket.close()


class Connection(Channel):
    """The agent's authenticated connection to the rendezvous. A thread sends heartbeats until `close`.

    Attributes:
        local_address: Address of this host on the interface that leads to the driver.
        heard_at: When the driver was last heard, on the monotonic clock.
    """

    def __init__(self, address: tuple[str, int], key: bytes, timeouts: Timeouts = DEFAULTS) -> None:
        """Connect and prove that both ends hold `key`, within `start_s`. Later a message has `silence_s` to be taken.

        Raises:
            RendezvousError: The driver cannot be reached, or hangs up each time.
            AuthenticationError: Whoever listens there does not hold the key.
        """
        sock, codec = _connect(address, key, timeouts.start_s)
        # Where a host vanishes, TCP itself would try for 15 minutes.
        sock.settimeout(timeouts.silence_s)
        self._silence_s = timeouts.silence_s
        super().__init__(sock, codec)
        self.local_address: str = sock.getsockname()[0]
        self.heard_at = time.monotonic()
        self._closing = threading.Event()
        self._lost = ""  # why nothing can be sent any more

    def send(self, kind: str, body: bytes = b"", **fields: Any) -> None:
        """Send one message; may be called from several threads.

        Raises:
            RendezvousError: The driver is gone.
        """
        with self._sending:
            if self._lost:
                raise RendezvousError(f"the driver is gone: {self._lost}")
            try:
                self._socket.sendall(self._codec.encode(Message(kind, fields, body)))
            except OSError as error:
                self._lost = f"a '{kind}' message could not be sent ({error})"
                if isinstance(error, TimeoutError):
                    limit = f"within {self._silence_s:g} s. Setting: Timeouts.silence_s"
                    self._lost = f"it did not take a '{kind}' message {limit}"
                # Half a frame may be on its way, so nothing may follow it; the reading side is to see the end as well.
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)
                raise RendezvousError(f"the driver is gone: {self._lost}") from error

    def messages(self) -> list[Message]:
        try:
            received = super().messages()
        except EOFError as error:
            raise EOFError(self._lost or str(error)) from error
        self.heard_at = time.monotonic()
        return received

    def start_heartbeats(self, interval_s: float, place: Callable[[], dict[str, Any]]) -> None:
        """Tell the driver every `interval_s` where the rank is: generation, phase, epoch and step."""

        def beat() -> None:
            while not self._closing.wait(interval_s):
                try:
                    self.send("heartbeat", **place())
                except RendezvousError:
                    return  # The reading side finds out and says so.

        threading.Thread(target=beat, name="allreduce-spark-heartbeat", daemon=True).start()

    def close(self) -> None:
        self._closing.set()
        # Closing with unread bytes in the buffer would reset the connection, and the driver could lose our last message:
        # so say goodbye, and read until the driver has hung up.
        deadline = time.monotonic() + GOODBYE_S
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
            while (left_s := deadline - time.monotonic()) > 0:
                self._socket.settimeout(left_s)
                if not self._socket.recv(READ_BYTES):
                    break
        super().close()


def _connect(address: tuple[str, int], key: bytes, timeout_s: float) -> tuple[socket.socket, Codec]:
    """Connect and authenticate; try again where the driver hangs up, because strangers crowd its door."""
    deadline = time.monotonic() + timeout_s
    pause_s = 0.05
    while True:
        try:
            sock = socket.create_connection(address, timeout=max(0.01, min(CONNECT_S, deadline - time.monotonic())))
        except OSError as error:
            raise RendezvousError(
                f"{socket.gethostname()} cannot reach the driver at {address[0]}:{address[1]} ({error}). Executors must be "
                "able to open TCP connections to the driver: see spark.driver.host, and firewalls between them. With Spark "
                "Connect it is on the host of rank 0's executor, and executors must be able to reach each other."
            ) from error
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return sock, _authenticate(sock, key, deadline)
        except (OSError, EOFError) as error:
            sock.close()
            if time.monotonic() + pause_s > deadline:
                raise RendezvousError(
                    f"{socket.gethostname()} was not let in by the driver at {address[0]}:{address[1]} within {timeout_s:g} s: "
                    f"it hung up, or did not answer ({error}). Setting: Timeouts.start_s"
                ) from error
        except BaseException:
            sock.close()
            raise
        # Agents that were sent away together should not come back together.
        time.sleep(secrets.SystemRandom().uniform(pause_s / 2, pause_s))
        pause_s = min(2 * pause_s, 1.0)


def _authenticate(sock: socket.socket, key: bytes, deadline: float) -> Codec:
    answer = handshake.Answer(key, _read_exactly(sock, handshake.CHALLENGE_BYTES, deadline))
    sock.sendall(answer.data)
    return answer.check(_read_exactly(sock, handshake.REPLY_BYTES, deadline))


def _read_exactly(sock: socket.socket, count: int, deadline: float) -> bytes:
    data = b""
    while len(data) < count:
        sock.settimeout(max(0.01, deadline - time.monotonic()))
        piece = sock.recv(count - len(data))
        if not piece:
            raise EOFError("the connection ended during authentication")
        data += piece
    return data
