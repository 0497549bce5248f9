"""Faults: networks that lose packets or hosts, connections that break, and strangers at the driver's port."""

from __future__ import annotations

import contextlib
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator

from fault import fault
from places import INTERFACE
from proxy import Proxy
from scene import Scene, Settings, run

from allreduce_spark.rendezvous import handshake

PAUSE_S = 10.0


@fault(
    place="namespaces",
    settings=Settings(elastic=True, pace_s=0.15, timeouts={"silence_s": 5.0, "start_s": 25.0}),
    limit_s=240.0,
)
def partition_and_heal(scene: Scene) -> None:
    """A worker's host is off the network for longer than `silence_s`, and then comes back."""
    scene.wait_for_a_step(last=15)
    worker = scene.place.hosts[2]
    port = [*worker.on_switch, "ip", "link", "set", worker.ports[INTERFACE]]
    scene.strike()
    run([*port, "down"])
    time.sleep(PAUSE_S)
    run([*port, "up"])


@fault(place="namespaces", needs=("iptables",), limit_s=240.0)
def packet_loss(scene: Scene) -> None:
    """One in twenty packets to a worker's host is lost, from some step to the end."""
    scene.wait_for_a_step()
    scene.strike()
    lose = ["iptables", "-A", "INPUT", "-m", "statistic", "--mode", "random", "--probability", "0.05", "-j", "DROP"]
    run([*scene.place.hosts[2].enter, *lose])


@contextlib.contextmanager
def proxied(scene: Scene) -> Iterator[None]:
    """Agents find the driver by way of `scene.proxy` only."""
    proxy = scene.proxy = Proxy(scene.rendezvous)
    (scene.folder / "proxy").write_text(str(proxy.port))
    with contextlib.closing(proxy):
        yield


@fault(around=proxied)
def connection_reset(scene: Scene) -> None:
    """An agent's connection to the driver."""
    scene.wait_for_a_step()
    scene.strike()
    scene.proxy.reset(scene.random.randrange(2))


@fault(around=proxied)
def truncated_frame(scene: Scene) -> None:
    """Half a frame, and then the end of the connection."""
    _spoil(scene, lambda data: data[: len(data) // 2], then_close=True)


@fault(around=proxied)
def garbage_frame(scene: Scene) -> None:
    """Bytes that no agent has sent, within its connection."""
    noise = scene.random.randbytes(64)
    _spoil(scene, lambda data: noise + data)


@fault(around=proxied)
def changed_frame(scene: Scene) -> None:
    """A single bit of what an agent has sent."""
    _spoil(scene, lambda data: data[:-1] + bytes([data[-1] ^ 1]))


@fault(around=proxied)
def replayed_frame(scene: Scene) -> None:
    """What an agent has sent, a second time."""
    _spoil(scene, lambda data: data + data)


@fault(said="refused a connection")
def wrong_key(scene: Scene) -> None:
    """Somebody who speaks the protocol, but holds another key, then noise, then half a greeting, then nothing at all."""
    scene.wait_for_a_step()
    scene.strike()
    with contextlib.ExitStack() as strangers:
        for number in range(8):
            sock = strangers.enter_context(scene.stranger())
            challenge = sock.recv(handshake.CHALLENGE_BYTES, socket.MSG_WAITALL)
            answer = handshake.Answer(b"x" * 32, challenge).data
            noise = scene.random.randbytes(len(answer))
            sock.sendall((answer, noise, answer[: len(answer) // 2], b"")[number % 4])
            with contextlib.suppress(ConnectionError):
                if number % 4 < 2 and sock.recv(1):
                    raise AssertionError("the driver has answered a stranger")
        scene.wait_for_more_steps(5)


@fault(settings=Settings(pace_s=0.3), limit_s=240.0)
def ten_thousand_connections(scene: Scene) -> None:
    """To the driver's port: more at once than it has room for, again and again."""
    scene.wait_for_a_step(last=10)
    address = scene.rendezvous()
    scene.strike()
    open_ones: deque[socket.socket] = deque()
    refused = 0
    for _ in range(10_000):
        try:
            open_ones.append(socket.create_connection(address, timeout=10))
        except OSError:
            refused += 1
        if len(open_ones) > 500:
            open_ones.popleft().close()
    for sock in open_ones:
        sock.close()
    if refused > 1_000:
        raise AssertionError(f"{refused} of 10,000 connections came to nothing: that is no test")


def _spoil(scene: Scene, deed: Callable[[bytes], bytes], *, then_close: bool = False) -> None:
    scene.wait_for_a_step()
    scene.strike()
    scene.proxy.spoil(deed, then_close=then_close)
