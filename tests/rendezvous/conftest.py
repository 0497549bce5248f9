"""A rendezvous on this machine, and agents that a test plays itself, over real sockets."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from allreduce_spark.config import Timeouts
from allreduce_spark.rendezvous.client import Connection
from allreduce_spark.rendezvous.controller import Hooks
from allreduce_spark.rendezvous.protocol import Message
from allreduce_spark.rendezvous.recovery import Restarts
from allreduce_spark.rendezvous.server import Rendezvous

KEY = b"k" * 32
WAIT_S = 20.0  # for what comes at once on a machine that is not busy
FAST = Timeouts(heartbeat_s=0.05, silence_s=20, teardown_s=5)


class FakeAgent:
    """An agent that says what the test tells it to say."""

    def __init__(self, address: tuple[str, int], rank: int, key: bytes = KEY) -> None:
        self.rank = rank
        self.connection = Connection(address, key)
        self.say("hello", rank=rank, host=f"host{rank}")

    def say(self, kind: str, body: bytes = b"", **fields: Any) -> None:
        self.connection.send(kind, body, **fields)

    def join(self, host_key: str = "machine", rows: int = 10) -> None:
        self.say("join", host_key=host_key, shards=[{"shard": self.rank, "rows": rows}], saved=[])

    def at(self, phase: str, epoch: int = 0, step: int = 0) -> None:
        self.say("heartbeat", phase=phase, epoch=epoch, step=step)

    def hear(self, timeout_s: float = WAIT_S) -> Message:
        """The next message that is no heartbeat."""
        deadline = time.monotonic() + timeout_s
        while (message := self.connection.receive(deadline - time.monotonic())).kind == "heartbeat":
            pass
        return message

    def leave(self) -> None:
        self.connection.close()


class Meeting:
    """A `Rendezvous` that listens on this machine, and everything that it told its maker."""

    def __init__(
        self, num_ranks: int, timeouts: Timeouts, restarts: Restarts | None, **hooks: Callable[..., Any]
    ) -> None:
        self.progress: list[dict[str, Any]] = []
        self.results: dict[int, bytes] = {}
        self.agents: list[FakeAgent] = []
        defaults: dict[str, Callable[..., Any]] = {
            "approve": lambda joins: {"spec": None},
            "on_progress": self.progress.append,
            "on_result": self._keep,
        }
        self.rendezvous = Rendezvous(num_ranks, KEY, timeouts, Hooks(**{**defaults, **hooks}), restarts)
        self.num_ranks = num_ranks
        self.address = self.rendezvous.start("127.0.0.1")

    def _keep(self, rank: int, piece: bytes) -> None:
        self.results[rank] = self.results.get(rank, b"") + piece

    def agent(self, rank: int) -> FakeAgent:
        self.agents.append(FakeAgent(self.address, rank))
        return self.agents[-1]

    def gather(self, host_keys: str | None = None) -> list[FakeAgent]:
        """All agents, joined and with their membership heard."""
        agents = [self.agent(rank) for rank in range(self.num_ranks)]
        for agent, host_key in zip(agents, host_keys or "a" * len(agents), strict=True):
            agent.join(host_key)
        for agent in agents:
            assert agent.hear().kind == "member"
        return agents

    def end(self) -> None:
        """Wait for the outcome, which must come."""
        assert self.rendezvous.wait(WAIT_S)

    def close(self) -> None:
        for agent in self.agents:
            with contextlib.suppress(OSError):
                agent.leave()
        self.rendezvous.close()


def rendezvous_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "allreduce-spark-rendezvous"]


@pytest.fixture
def meet():
    """Make a `Meeting`; at the end all of them are closed, and none may leave a thread."""
    meetings = []

    def make(
        num_ranks: int = 2, timeouts: Timeouts = FAST, restarts: Restarts | None = None, **hooks: Callable[..., Any]
    ) -> Meeting:
        meetings.append(Meeting(num_ranks, timeouts, restarts, **hooks))
        return meetings[-1]

    yield make
    for meeting in meetings:
        meeting.close()
    assert not rendezvous_threads()
