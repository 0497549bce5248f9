"""The driver's end of the rendezvous: gather the agents, tell each its place, watch them, and spread the first failure.

`Rendezvous` runs an asyncio loop in one thread of the driver, so nothing in it needs a lock: all state belongs to that
thread, and what decides is in `group`. Promises:

* Every agent that has connected gets, exactly once, either `finish` or `abort`.
* After a failure that may pass, all agents get `restart`, and their ranks form a new generation (`recovery.Restarts` decides).
  What is still on its way from an earlier generation is not heard any more.
* The failure that is reported is the first that is not the effect of another one (`group.first_cause`).
* Nobody is waited for without a deadline (`config.Timeouts`).

Not promised: that a barrier stage survives the loss of an agent. Then the stage is given up as a whole (`stage_is_lost`).
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
from dataclasses import asdict, replace
from typing import Any

from allreduce_spark.config import Timeouts
from allreduce_spark.errors import AllReduceSparkError, ProtocolError, RankFailedError, RendezvousError
from allreduce_spark.rendezvous import pmi
from allreduce_spark.rendezvous.gate import Gate, Guest
from allreduce_spark.rendezvous.group import (
    Failure,
    Join,
    ShardReport,
    Station,
    add_failure,
    first_cause,
    form_group,
    nodes_of,
    overdue,
    stalled_for_long,
    stragglers,
)
from allreduce_spark.rendezvous.protocol import Message, Phase
from allreduce_spark.rendezvous.recovery import Restarts, place_of

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
        self.is_gone = False


class Rendezvous:
    """The meeting point of one fit.

    Args:
        num_ranks: How many agents must come.
        key: Secret of this fit, at least 32 random bytes; whoever holds it is let in.
        timeouts: Deadlines.
        approve: Called with all `Join`s, in rank order, before any rank starts; returns fields that every agent gets with
            its membership, or raises an `AllReduceSparkError` that ends the fit.
        restarts: How often ranks may be started again.
        resume: Called with all `Join`s each time before ranks start; returns what they are to go on from, for every agent, or
            None for the beginning.
        on_progress: Called in the rendezvous thread with each progress report of the root and each change of phase.
        on_result: Called in the rendezvous thread with each piece of the root's result, in order.
        on_saved: Called in the rendezvous thread with a rank, and what it says of a checkpoint.
        on_restart: Called in the rendezvous thread with the cause, before the ranks are started again: the pieces of a result
            that have come count no more.

    What one of these raises ends the fit.

    Attributes:
        address: Where it listens.
        regroups: Whether the ranks have ended because more of them can go on, and not because their work is done.
    """

    def __init__(
        self,
        num_ranks: int,
        key: bytes,
        timeouts: Timeouts,
        *,
        approve: Callable[[Sequence[Join]], dict[str, Any]],
        restarts: Restarts | None = None,
        resume: Callable[[Sequence[Join]], dict[str, Any] | None] = lambda joins: None,
        on_progress: Callable[[dict[str, Any]], object] = lambda fields: None,
        on_result: Callable[[bytes], object] = lambda piece: None,
        on_saved: Callable[[int, dict[str, Any]], object] = lambda rank, fields: None,
        on_restart: Callable[[Failure], object] = lambda cause: None,
    ) -> None:
        self._num_ranks, self._timeouts = num_ranks, timeouts
        self._gate = Gate(key, num_ranks, self._attend)
        self._approve, self._show_progress, self._keep_result = approve, on_progress, on_result
        self._restarts, self._resume, self._note_saved, self._note_restart = (
            restarts or Restarts(0),
            resume,
            on_saved,
            on_restart,
        )
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
            "saved": self._on_saved,
            "save_failed": self._on_saved,
            "stack": self._on_stack,
        }
        self._generation = 0
        self._approved: dict[str, Any] | None = None
        self._settling: asyncio.TimerHandle | None = None
        self._refusal = ""
        self.regroups = False
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
        if not self._failures:
            return None
        cause = first_cause(self._failures)
        return replace(cause, cause=f"{cause.cause}\n({self._refusal})") if self._refusal else cause

    @property
    def place(self) -> tuple[int, int]:
        """(epoch, step) of the rank that has come furthest."""
        return place_of(self._stations())

    @property
    def stage_is_lost(self) -> bool:
        """Whether it failed because an agent is gone, so that another barrier stage may do better."""
        return any(failure.stage_lost for failure in self._failures)

    def fail(self, failure: Failure) -> None:
        """End the fit, from any thread. Only the first cause counts."""
        with contextlib.suppress(RuntimeError):  # The loop is closed: the fit is over already.
            self._loop.call_soon_threadsafe(self._fail, failure)

    def regroup(self) -> None:
        """Let the ranks end with the epoch, because more of them can go on. From any thread; may be called again."""
        with contextlib.suppress(RuntimeError):  # The loop is closed: the fit is over already.
            self._loop.call_soon_threadsafe(self._tell_all, "regroup")

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
            agent.is_gone = True
            self._connected -= 1
            if not self._connected:
                self._deserted.set()

    async def _converse(self, agent: _Agent) -> None:
        async for message in agent.guest.messages():
            if agent.station is not None:
                agent.station.heard_at = time.monotonic()
            if message.kind not in self._handlers:
                raise ProtocolError(f"an agent sent a message of unknown kind {message.kind!r}")
            if message.fields.pop("generation", self._generation) != self._generation:
                continue  # said before it knew that the ranks are started again
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

    def _on_heartbeat(
        self,
        agent: _Agent,
        message: Message,
        *,
        phase: str,
        epoch: int,
        step: int,
        is_waiting: bool = False,
        waited_s: float = 0.0,
    ) -> None:
        station = _station(agent)
        station.note_waiting(bool(is_waiting), float(waited_s), int(epoch), int(step), time.monotonic())
        self._move(station, Phase(phase), int(epoch), int(step))

    def _move(self, station: Station, phase: Phase, epoch: int = 0, step: int = 0) -> None:
        before = station.phase
        station.move_to(phase, epoch, step, time.monotonic())
        if station.rank == 0 and station.phase is not before:
            self._call(self._show_progress, {"phase": station.phase.value})

    def _on_join(
        self, agent: _Agent, message: Message, *, host_key: str, shards: list[dict[str, Any]], saved: list[str]
    ) -> None:
        station = _station(agent)
        reports = tuple(ShardReport(**shard) for shard in shards)
        station.join = Join(station.rank, station.host, host_key, reports, tuple(map(str, saved)))
        self._move(station, Phase.JOIN)
        joins = [other.station.join for _, other in sorted(self._agents.items()) if other.station]
        if len(joins) == self._num_ranks and all(joins):
            self._open_generation([join for join in joins if join is not None])

    def _open_generation(self, joins: list[Join]) -> None:
        if self._approved is None:
            self._approved = self._call(self._approve, joins)
        resume = self._call(self._resume, joins)
        if self._approved is None or self._failures:
            return  # One of them has raised, or the fit had failed before.
        name = f"allreduce_spark-{secrets.token_hex(8)}"
        self._keys = pmi.KeySpace(name, self._num_ranks, pmi.process_mapping(nodes_of(joins)))
        for membership, agent in zip(form_group(joins, self._generation, name), self._ranked(), strict=True):
            agent.send("member", membership=asdict(membership), approved=self._approved, resume=resume)
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

    def _on_saved(self, agent: _Agent, message: Message, **fields: Any) -> None:
        self._call(self._note_saved, _station(agent).rank, fields)

    def _on_stack(self, agent: _Agent, message: Message) -> None:
        _station(agent).stack = tuple(message.body.decode(errors="replace").split("\n"))

    def _on_failed(self, agent: _Agent, message: Message, **fields: Any) -> None:
        station = _station(agent)
        fields["log_tail"] = tuple(fields.get("log_tail", ()))
        known = dict(zip(("rank", "host", "phase", "epoch", "step"), station.whereabouts, strict=True))
        # Before it has joined, its rows are not all on disk, and cannot be read a second time in this stage.
        lost = fields.get("error") == "RankDied" and station.join is None and self._generation == 0
        failure = Failure(**{**known, "stage_lost": lost, **fields})
        station.done = True
        self._fail(failure)

    def _on_done(self, agent: _Agent, message: Message, *, regroups: bool = False) -> None:
        _station(agent).done = True
        self.regroups = regroups
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
                stage_lost=True,
            )
        )

    def _call(self, callback: Callable[..., Any], *arguments: Any) -> Any:
        """Tell the code that made this rendezvous something. What it raises ends the fit; afterwards it is told no more."""
        if self._failures:
            return None
        try:
            return callback(*arguments)
        except (Exception, SystemExit) as error:  # noqa: BLE001  whatever it is: the fit would hang if nobody heard of it
            self._fail(_failure_on_driver(error))
            return None

    def _fail(self, failure: Failure) -> None:
        if self._finished.is_set():
            return
        known, self._failures = self._failures, add_failure(self._failures, failure)
        if not first_cause(self._failures).consequence:
            self._settle()
        elif not known:
            self._settling = self._loop.call_later(GRACE_S, self._settle)

    def _settle(self) -> None:
        """The cause is known: start the ranks again, or end the fit."""
        if self._finished.is_set():
            return
        if self._settling is not None:
            self._settling.cancel()
        cause = first_cause(self._failures)
        here = [agent for agent in self._agents.values() if not agent.is_gone]
        if not self.stage_is_lost and len(here) == self._num_ranks:
            refusal = self._restarts.refusal(self._failures, place_of(self._stations()))
            if refusal is None:
                self._restart(cause)
                return
            self._refusal = refusal
        self._tell_all("abort", cause=cause.cause[:4096])
        self._finished.set()

    def _tell_all(self, kind: str, **fields: Any) -> None:
        for agent in self._agents.values():
            agent.send(kind, **fields)

    def _restart(self, cause: Failure) -> None:
        """Open a new generation: the agents kill their ranks, start others, and join again."""
        self._generation += 1
        rank_log.warning("all ranks are started again (generation %d): %s", self._generation, cause.text)
        self._failures, self._keys, now = [], None, time.monotonic()
        self._call(self._note_restart, cause)
        for rank, agent in self._agents.items():
            before = _station(agent)
            # One that still writes its rows down has nothing to start again, and hears of it when it comes to it.
            phase = Phase.RESTART if before.join else Phase.SPOOL
            agent.station = Station(rank, before.host, heard_at=now, changed_at=now, phase=phase)
            agent.send("restart", generation=self._generation, cause=cause.cause[:4096])
        self._call(self._show_progress, {"phase": Phase.RESTART.value})

    async def _watch(self) -> None:
        try:
            while not self._finished.is_set():
                await asyncio.sleep(self._timeouts.heartbeat_s)
                self._tell_all("heartbeat")
                stations, now = self._stations(), time.monotonic()
                for station in stalled_for_long(stations, now, self._timeouts):
                    self._warn_of(station, now)
                for text in stragglers(stations):
                    rank_log.warning(text)
                late = overdue(stations, self._num_ranks, self._started_at, now, self._timeouts)
                if late is not None:
                    self._fail(late)
        except Exception as error:  # noqa: BLE001  without the watch, no deadline would hold
            self._fail(_failure_on_driver(error))

    def _warn_of(self, station: Station, now: float) -> None:
        """Name a rank that does not go on, and ask its agent for what the rank is doing."""
        station.warned = True
        rank_log.warning(
            "rank %d on %s has been at epoch %d, step %d for %.0f s; the others wait for it",
            station.rank, station.host, station.epoch, station.step, now - station.changed_at,
        )  # fmt: skip
        self._agents[station.rank].send("dump")

    def _stations(self) -> list[Station]:
        return [_station(agent) for agent in list(self._agents.values())]

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
