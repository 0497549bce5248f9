"""The driver's end of the rendezvous: gather the agents, tell each its place, watch them, and spread the first failure.

`Rendezvous` runs an asyncio loop in one thread of the driver, so nothing in it needs a lock: all state belongs to that
thread, and what decides is in `group`. Promises:

* Every agent that has connected gets, exactly once, either `finish` or `abort`.
* The failure that is reported is the first that is not the effect of another one (`group.first_cause`).
* Nobody is waited for without a deadline (`config.Timeouts`).

Not promised: that a fit survives a failure. The group is given up as a whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from allreduce_spark.config import Timeouts
from allreduce_spark.errors import AllReduceSparkError, ProtocolError, RankFailedError, RendezvousError
from allreduce_spark.rendezvous import pmi
from allreduce_spark.rendezvous.gate import Gate, Guest
from allreduce_spark.rendezvous.group import (
    Failure,
    Join,
    Station,
    add_failure,
    first_cause,
    form_group,
    nodes_of,
    overdue,
)
from allreduce_spark.rendezvous.protocol import Message, Phase

__all__ = ["Rendezvous"]

log = logging.getLogger(__name__)
rank_log = logging.getLogger("allreduce_spark.rank")

# A rank that lost the others in a collective may be heard before the death that caused it: wait so long for the cause.
GRACE_S = 0.4


class _Agent:
    """One agent: its connection, and the rank behind it once it has said hello."""

    def __init__(self, guest: Guest) -> None:
        self.guest, self.send = guest, guest.send
        self.station: Station | None = None


class Rendezvous:
    """The meeting point of one fit.

    Args:
        num_ranks: How many agents must come.
        key: Secret of this fit, at least 32 random bytes; whoever holds it is let in.
        timeouts: Deadlines.
        approve: Called with all `Join`s, in rank order, before any rank starts; returns fields that every agent gets with
            its membership, or raises an `AllReduceSparkError` that ends the fit.
        on_progress: Called in the rendezvous thread with each progress report of the root and each change of phase.
        on_result: Called in the rendezvous thread with each piece of the root's result, in order.

    What one of these three raises ends the fit.
    """

    def __init__(
        self,
        num_ranks: int,
        key: bytes,
        timeouts: Timeouts,
        *,
        approve: Callable[[Sequence[Join]], dict[str, Any]],
        on_progress: Callable[[dict[str, Any]], object] = lambda fields: None,
        on_result: Callable[[bytes], object] = lambda piece: None,
    ) -> None:
        self._num_ranks, self._timeouts = num_ranks, timeouts
        self._gate = Gate(key, num_ranks, self._attend)
        self._approve, self._show_progress, self._keep_result = approve, on_progress, on_result
        self._handlers: dict[str, Callable[..., None]] = {
            "hello": self._on_hello,
            "heartbeat": self._on_heartbeat,
            "join": self._on_join,
            "pmi": self._on_pmi,
            "log": self._on_log,
            "progress": self._on_progress,
            "result": self._on_result,
            "failed": self._on_failed,
            "done": self._on_done,
        }
        self._agents: dict[int, _Agent] = {}
        self._failures: list[Failure] = []
        self._keys: pmi.KeySpace | None = None
        self._finished = threading.Event()
        self._deserted = threading.Event()
        self._deserted.set()
        self._connected = 0
        self._started_at = time.monotonic()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="allreduce-spark-rendezvous", daemon=True)
        self.address: tuple[str, int] | None = None
        self.result: dict[str, Any] | None = None

    def start(self, host: str) -> tuple[str, int]:
        """Listen on a free port of `host` and return the address.

        Raises:
            RendezvousError: Nobody can listen there.
        """
        self._started_at = time.monotonic()
        self._thread.start()
        try:
            self.address = asyncio.run_coroutine_threadsafe(self._listen(host), self._loop).result()
        except (OSError, UnicodeError) as error:  # UnicodeError: it cannot be the name of a host
            self.close()
            raise RendezvousError(
                f"the driver cannot listen on {host!r}: {error}. It is the address that executors use to reach the driver "
                "(spark.driver.bindAddress or spark.driver.host)."
            ) from error
        return self.address

    def wait(self, timeout_s: float) -> bool:
        """Wait until the outcome is known, `timeout_s` at most; return whether it is."""
        return self._finished.wait(timeout_s)

    def begin_start(self) -> None:
        """Count `start_s` from now: until now no agent could have been started. From any thread."""
        self._started_at = time.monotonic()

    @property
    def failure(self) -> Failure | None:
        """What ended the fit, or None where it has not failed."""
        return first_cause(self._failures) if self._failures else None

    def fail(self, failure: Failure) -> None:
        """End the fit, from any thread. Only the first cause counts."""
        with contextlib.suppress(RuntimeError):  # The loop is closed: the fit is over already.
            self._loop.call_soon_threadsafe(self._fail, failure)

    def wait_for_departure(self, timeout_s: float) -> bool:
        """Wait until no agent is connected, `timeout_s` at most; return whether that is so. Their ranks are dead then."""
        return self._deserted.wait(timeout_s)

    def close(self) -> None:
        """Wait for the agents to leave, `teardown_s` at most, then stop listening."""
        if self._loop.is_closed():
            return
        if not self._thread.is_alive():  # never started
            self._loop.close()
            return
        if not self.wait_for_departure(self._timeouts.teardown_s):
            log.warning("agents are still connected %.0f s after the end of the fit", self._timeouts.teardown_s)
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # Everything below runs in the rendezvous thread.

    async def _listen(self, host: str) -> tuple[str, int]:
        address = await self._gate.open(host)
        self._watcher = asyncio.create_task(self._watch())
        return address

    async def _stop(self) -> None:
        self._gate.close()
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _attend(self, guest: Guest) -> None:
        """Listen to one agent for as long as it is there. Strangers do not come so far, so nobody waits for them to go."""
        agent = _Agent(guest)
        self._connected += 1
        self._deserted.clear()
        try:
            await self._converse(agent)
        except (OSError, AllReduceSparkError) as error:
            self._lost(agent, str(error))
        except Exception as error:  # noqa: BLE001  A mistake of ours is to end the fit, not only this connection.
            self._fail(_failure_on_driver(error))
        else:
            self._lost(agent, "its connection to the driver ended")
        finally:
            self._connected -= 1
            if not self._connected:
                self._deserted.set()

    async def _converse(self, agent: _Agent) -> None:
        async for message in agent.guest.messages():
            if agent.station is not None:
                agent.station.heard_at = time.monotonic()
            if message.kind not in self._handlers:
                raise ProtocolError(f"an agent sent a message of unknown kind {message.kind!r}")
            try:
                self._handlers[message.kind](agent, message, **message.fields)
            except (TypeError, ValueError, KeyError) as error:
                raise ProtocolError(f"an agent sent a wrong '{message.kind}' message: {error!r}") from error

    def _on_hello(self, agent: _Agent, message: Message, *, rank: int, host: str) -> None:
        if self._finished.is_set() or rank in self._agents or not 0 <= rank < self._num_ranks:
            # Spark ran the stage a second time by itself: the generation it belongs to is over.
            agent.send("abort", cause="this attempt of the barrier stage comes too late")
            return
        now = time.monotonic()
        agent.station = Station(rank, host, heard_at=now, changed_at=now)
        self._agents[rank] = agent
        if len(self._agents) == self._num_ranks:
            self._call(self._show_progress, {"phase": Phase.SPOOL.value})

    def _on_heartbeat(self, agent: _Agent, message: Message, *, phase: str, epoch: int, step: int) -> None:
        self._move(_station(agent), Phase(phase), int(epoch), int(step))

    def _move(self, station: Station, phase: Phase, epoch: int = 0, step: int = 0) -> None:
        before = station.phase
        station.move_to(phase, epoch, step, time.monotonic())
        if station.rank == 0 and station.phase is not before:
            self._call(self._show_progress, {"phase": station.phase.value})

    def _on_join(self, agent: _Agent, message: Message, **fields: Any) -> None:
        station = _station(agent)
        station.join = Join(rank=station.rank, host=station.host, **fields)
        self._move(station, Phase.JOIN)
        joins = [other.station.join for _, other in sorted(self._agents.items()) if other.station]
        if len(joins) == self._num_ranks and all(joins):
            self._open_generation([join for join in joins if join is not None])

    def _open_generation(self, joins: list[Join]) -> None:
        approved = self._call(self._approve, joins)
        if approved is None:
            return  # It has raised, or the fit had failed before.
        name = f"allreduce_spark-{secrets.token_hex(8)}"
        self._keys = pmi.KeySpace(name, self._num_ranks, pmi.process_mapping(nodes_of(joins)))
        for membership, agent in zip(form_group(joins, 0, name), self._ranked(), strict=True):
            agent.send("member", membership=asdict(membership), approved=approved)
            self._move(_station(agent), Phase.IMPORT)

    def _on_pmi(self, agent: _Agent, message: Message, *, line: str) -> None:
        if self._keys is None:
            raise ProtocolError("PMI before the group was formed")
        station = _station(agent)
        try:
            replies = self._keys.answer(station.rank, line)
        except RankFailedError as error:
            # MPI gives up where a peer is gone, so the peer's death may be the cause and still be on its way here.
            self._fail(Failure("MPIAbort", error.cause, *station.whereabouts, consequence=True))
            return
        for rank, reply in replies:
            self._agents[rank].send("pmi", line=reply)

    def _on_log(self, agent: _Agent, message: Message) -> None:
        station = _station(agent)
        for line in message.body.decode(errors="replace").split("\n"):
            rank_log.info("[rank %d on %s] %s", station.rank, station.host, line)

    def _on_progress(self, agent: _Agent, message: Message, **fields: Any) -> None:
        if _station(agent).rank == 0:
            self._call(self._show_progress, fields)

    def _on_result(self, agent: _Agent, message: Message) -> None:
        station = _station(agent)
        if station.rank == 0:
            self._move(station, Phase.RESULT)  # A heartbeat that says so may have to wait until all pieces are sent.
            self._call(self._keep_result, message.body)

    def _on_failed(self, agent: _Agent, message: Message, **fields: Any) -> None:
        station = _station(agent)
        fields["log_tail"] = tuple(fields.get("log_tail", ()))
        known = dict(zip(("rank", "host", "phase", "epoch", "step"), station.whereabouts, strict=True))
        failure = Failure(**{**known, **fields})
        station.done = True
        self._fail(failure)

    def _on_done(self, agent: _Agent, message: Message, **fields: Any) -> None:
        station = _station(agent)
        station.done = True
        if station.rank == 0:
            self.result = fields
        # An agent that is lost is done as well, so a failure that waits for its cause must not look like success.
        everybody = len(self._agents) == self._num_ranks and all(_station(other).done for other in self._ranked())
        if everybody and not self._failures:
            for other in self._ranked():
                other.send("finish")
            self._finished.set()

    def _lost(self, agent: _Agent, why: str) -> None:
        if agent.station is None or agent.station.done or self._finished.is_set():
            return
        station = agent.station
        station.done = True
        self._fail(
            Failure(
                "AgentLost",
                f"the agent is gone ({why}): its executor or Python worker died, or the task was killed",
                *station.whereabouts,
                consequence=True,
            )
        )

    def _call(self, callback: Callable[..., Any], argument: Any) -> Any:
        """Tell the code that made this rendezvous something. What it raises ends the fit; afterwards it is told no more."""
        if self._failures:
            return None
        try:
            return callback(argument)
        except (Exception, SystemExit) as error:  # noqa: BLE001  whatever it is: the fit would hang if nobody heard of it
            self._fail(_failure_on_driver(error))
            return None

    def _fail(self, failure: Failure) -> None:
        if self._finished.is_set():
            return
        known, self._failures = self._failures, add_failure(self._failures, failure)
        if not first_cause(self._failures).consequence:
            self._spread_failure()
        elif not known:
            self._loop.call_later(GRACE_S, self._spread_failure)

    def _spread_failure(self) -> None:
        if self._finished.is_set():
            return
        cause = first_cause(self._failures)
        for agent in self._agents.values():
            agent.send("abort", cause=cause.cause[:4096])
        self._finished.set()

    async def _watch(self) -> None:
        try:
            while not self._finished.is_set():
                await asyncio.sleep(self._timeouts.heartbeat_s)
                for agent in self._agents.values():
                    agent.send("heartbeat")
                stations = [_station(agent) for agent in self._agents.values()]
                late = overdue(stations, self._num_ranks, self._started_at, time.monotonic(), self._timeouts)
                if late is not None:
                    self._fail(late)
        except Exception as error:  # noqa: BLE001  without the watch, no deadline would hold
            self._fail(_failure_on_driver(error))

    def _ranked(self) -> list[_Agent]:
        return [agent for _, agent in sorted(self._agents.items())]


def _station(agent: _Agent) -> Station:
    if agent.station is None:
        raise ProtocolError("an agent spoke before it said hello")
    return agent.station


def _failure_on_driver(error: BaseException) -> Failure:
    name = type(error).__name__
    if isinstance(error, AllReduceSparkError):
        return Failure(name, str(error), phase=Phase.JOIN.value)
    return Failure(name, f"on the driver: {name}: {error}\n{''.join(traceback.format_exception(error))}")
