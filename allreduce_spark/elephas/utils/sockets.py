"""Addresses and framed bytes. Nothing here talks to anybody by itself: the parameter server that did so is gone."""

from __future__ import annotations

import os
import socket
import struct
import time

__all__ = ["determine_master", "recv_bytes", "send_bytes", "wait_until_listening"]

POLL_S = 0.05


def determine_master(port: int = 4000) -> str:
    """The "host:port" under which workers would reach the driver: SPARK_LOCAL_IP, or this machine's own address."""
    host = os.environ.get("SPARK_LOCAL_IP") or socket.gethostbyname(socket.gethostname())
    return f"{host}:{port}"


def send_bytes(sock: socket.socket, b: bytes) -> None:
    """Send the length, as four bytes in network order, and then the bytes."""
    sock.sendall(struct.pack("!I", len(b)) + b)


def recv_bytes(sock: socket.socket) -> bytes:
    """Receive what `send_bytes` sent.

    Raises:
        OSError: The other end closed the connection before the last byte.
    """
    (length,) = struct.unpack("!I", _receive_all(sock, 4))
    return _receive_all(sock, length)


def wait_until_listening(host: str, port: int, timeout: float = 30.0) -> None:
    """Wait until something accepts connections at this address.

    Raises:
        TimeoutError: Nothing does so within `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host, port), timeout=max(POLL_S, deadline - time.monotonic())).close()
            return
        except OSError as error:
            if time.monotonic() >= deadline:
                raise TimeoutError(f"nothing listens at {host}:{port} after {timeout} s: {error}") from error
            time.sleep(POLL_S)


def _receive_all(sock: socket.socket, num_bytes: int) -> bytes:
    received = bytearray()
    while len(received) < num_bytes:
        piece = sock.recv(num_bytes - len(received))
        if not piece:
            raise OSError(f"the connection was closed after {len(received)} of {num_bytes} bytes")
        received += piece
    return bytes(received)
