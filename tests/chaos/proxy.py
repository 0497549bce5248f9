"""A man in the middle: agents connect to the driver through it, and it can spoil, repeat or cut off what they send."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable

__all__ = ["Proxy"]

READ_BYTES = 1 << 16


class Proxy:
    """Listens from `start` to `close`; each connection that comes is carried on to the driver.

    Args:
        driver: Returns where the driver listens now.
    """

    def __init__(self, driver: Callable[[], tuple[str, int]]) -> None:
        self._driver = driver
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._links: list[tuple[socket.socket, socket.socket]] = []
        self._lock = threading.Lock()
        self._spoil: Callable[[bytes], bytes] | None = None
        self._spoiled, self._then_close = threading.Event(), False
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    def spoil(self, deed: Callable[[bytes], bytes], *, then_close: bool = False) -> None:
        """Let `deed` change what some agent sends next; returns when that has happened.

        Args:
            deed: From the bytes that come to the bytes that go on.
            then_close: End that connection afterwards.
        """
        with self._lock:
            self._spoil, self._then_close = deed, then_close
        if not self._spoiled.wait(30):
            raise TimeoutError("no agent has sent anything")

    def reset(self, number: int) -> None:
        """End a connection as a router does that has forgotten it: both ends get an RST."""
        for end in self._links[number]:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RD)  # wakes the thread that reads from it
            end.close()

    def close(self) -> None:
        self._listener.close()
        for ends in self._links:
            for end in ends:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                agent, _ = self._listener.accept()
                driver = socket.create_connection(self._driver())
                self._links.append((agent, driver))
                threading.Thread(target=self._carry, args=(agent, driver, True), daemon=True).start()
                threading.Thread(target=self._carry, args=(driver, agent, False), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket, from_agent: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(READ_BYTES):
                if from_agent:
                    data, is_last = self._treat(data)
                    sink.sendall(data)
                    if is_last:
                        source.shutdown(socket.SHUT_RDWR)
                        break
                else:
                    sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def _treat(self, data: bytes) -> tuple[bytes, bool]:
        with self._lock:
            spoil, self._spoil = self._spoil, None
        if spoil is None:
            return data, False
        self._spoiled.set()
        return spoil(data), self._then_close
