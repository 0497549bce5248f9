"""What the messages of agents mean for a fit: who takes part, when ranks start, and what is done after a failure.

No thread and no socket: `server` hears the agents and lets the `Controller` know, all in one thread; what decides is in `group`
and `recovery`. A group of ranks lives for one generation. What is still on its way from an earlier one is not heard any more.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from allreduce_spark.errors import AllReduceSparkError, ProtocolError, RankFailedError
from allreduce_spark.rendezvous import pmi
from allreduce_spark.rendezvous.group import (
    Failure,
    Join,
    ShardReport,
    Station,
    add_failure,
    first_cause,
    form_group,
    nodes_of,
)
from allreduce_spark.rendezvous.protocol import Message, Phase
from allreduce_spark.rendezvous.recovery import Restarts, place_of

__all__ = ["Agent", "Controller", "Hooks", "failure_on_driver"]

rank_log = logging.getLogger("allreduce_spark.rank")

# A rank that lost the others in a collective may be heard before the death that caused it: wait so long for the cause.
GRACE_S = 0.4
READY_POLL_S = 0.05


@dataclass(frozen=True)
class Hooks:
    """What the maker of a rendezvous decides and hears. Called in the rendezvous thread; what one of them raises ends the fit.

    Attributes:
        approve: Called with all `Join`s, in rank order, before any rank starts; returns fields that every agent gets with
            its membership, or raises an `AllReduceSparkError` that ends the fit.
        resume: Called with all `Join`s each time before ranks start; returns what they are to go on from, for every agent, or
            None for the beginning.
        on_progress: Called with each progress report of the root and each change of phase.
        on_result: Called with a rank, and each piece of its result, in order.
        on_saved: Called with a rank, and what it says of a checkpoint.
        on_restart: Called with the cause, before the ranks are started again: the pieces of a result that have come count no
            more.
        is_ready: Whether `approve` and `resume` can answer at once. Until then ranks wait, and all else goes on.
    """

    approve: Callable[[Sequence[Join]], dict[str, Any]]
    resume: Callable[[Sequence[Join]], dict[str, Any] | None] = lambda joins: None
    on_progress: Callable[[dict[str, Any]], object] = lambda fields: None
    on_result: Callable[[int, bytes], object] = lambda rank, piece: None
    on_saved: Callable[[int, dict[str, Any]], object] = lambda rank, fields: None
    on_restart: Callable[[Failure], object] = lambda cause: None
    is_ready: Callable[[], bool] = lambda: True


@dataclass
class Agent:
    """One agent: what sends it a message, and its rank once it has said hello."""

    send: Callable[..., None]
    rank: int | None = None
    is_gone: bool = False


class Controller:
    """Leads the agents of one fit from hello to `finish` or `abort`.

    Args:
        num_ranks: How many agents must come.
        hooks: Of whoever made the rendezvous.
        restarts: How often ranks may be started again.
        call_later: That of the event loop.

    Attributes:
        finished: Set once the outcome is known.
        failures: Those of this generation, in order of time.
        regroups: Whether the ranks have ended because more of them can go on, and not because their work is done.
    """

    def __init__(
        self,
        num_ranks: int,
        hooks: Hooks,
        restarts: Restarts,
        call_later: Callable[[float, Callable[[], None]], asyncio.TimerHandle],
    ) -> None:
        self._num_ranks, self._hooks, self._restarts, self._call_later = num_ranks, hooks, restarts, call_later
        self.finished = threading.Event()
        self.failures: list[Failure] = []
        self.regroups = False
        self._agents: dict[int, Agent] = {}
        self._stations: dict[int, Station] = {}
        self._generation = 0
        self._approved: dict[str, Any] | None = None
        self._keys: pmi.KeySpace | None = None
        self._settling: asyncio.TimerHandle | None = None
        self._refusal = ""
        self._handlers: dict[str, Callable[..., None]] = {
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

    @property
    def stations(self) -> list[Station]:
        """Where the ranks are whose agents have said hello, in any order."""
        return list(self._stations.values())

    @property
    def failure(self) -> Failure | None:
        """The first cause, and why it was the last one; None where nothing has failed in this generation."""
        failures = self.failures
        if not failures:
            return None
        cause = first_cause(failures)
        return replace(cause, cause=f"{cause.cause}\n({self._refusal})") if self._refusal else cause

    @property
    def stage_is_lost(self) -> bool:
        """Whether a failure means that the barrier stage itself cannot go on."""
        return any(failure.stage_lost for failure in self.failures)

    def tell(self, rank: int, kind: str, **fields: Any) -> None:
        """Send a message to the agent of a rank."""
        self._agents[rank].send(kind, **fields)

    def tell_all(self, kind: str, **fields: Any) -> None:
        """Send a message to all agents that have said hello."""
        for agent in self._agents.values():
            agent.send(kind, **fields)

    # What comes in

    def hear(self, agent: Agent, message: Message) -> None:
        """Take in what an agent says.

        Raises:
            ProtocolError: It makes no sense.
        """
        if agent.rank is not None:
            self._stations[agent.rank].heard_at = time.monotonic()
        if message.kind != "hello" and message.kind not in self._handlers:
            raise ProtocolError(f"an agent sent a message of unknown kind {message.kind!r}")
        if message.fields.pop("generation", self._generation) != self._generation:
            return  # said before it knew that the ranks are started again
        try:
            if message.kind == "hello":
                self._on_hello(agent, **message.fields)
            elif agent.rank is None:
                raise ProtocolError("an agent spoke before it said hello")
            else:
                self._handlers[message.kind](self._stations[agent.rank], message.body, **message.fields)
        except (TypeError, ValueError, KeyError) as error:
            raise ProtocolError(f"an agent sent a wrong '{message.kind}' message: {error!r}") from error

    def lose(self, agent: Agent, why: str) -> None:
        """The connection of an agent has ended."""
        agent.is_gone = True
        if agent.rank is None or self._stations[agent.rank].done or self.finished.is_set():
            return
        station = self._stations[agent.rank]
        station.done = True
        cause = f"the agent is gone ({why}): its executor or Python worker died, or the task was killed"
        self.fail(Failure("AgentLost", cause, *station.whereabouts, consequence=True, stage_lost=True))

    def fail(self, failure: Failure) -> None:
        """Something has failed: end the fit or start the ranks again, as soon as the cause is clear."""
        if self.finished.is_set():
            return
        known, self.failures = self.failures, add_failure(self.failures, failure)
        if not first_cause(self.failures).consequence:
            self._settle()
        elif not known:
            self._settling = self._call_later(GRACE_S, self._settle)

    # What is done after a failure

    def _settle(self) -> None:
        """The cause is known: start the ranks again, or end the fit."""
        if self.finished.is_set():
            return
        if self._settling is not None:
            self._settling.cancel()
        cause = first_cause(self.failures)
        here = [agent for agent in self._agents.values() if not agent.is_gone]
        if not self.stage_is_lost and len(here) == self._num_ranks:
            refusal = self._restarts.refusal(self.failures, place_of(self.stations))
            if refusal is None:
                self._restart(cause)
                return
            self._refusal = refusal
        self.tell_all("abort", cause=cause.cause[:4096])
        self.finished.set()

    def _restart(self, cause: Failure) -> None:
        """Open a new generation: the agents kill their ranks, start others, and join again."""
        self._generation += 1
        rank_log.warning("all ranks are started again (generation %d): %s", self._generation, cause.text)
        self.failures, self._keys, now = [], None, time.monotonic()
        self._call(self._hooks.on_restart, cause)
        for rank, before in self._stations.items():
            # One that still writes its rows down has nothing to start again, and hears of it when it comes to it.
            phase = Phase.RESTART if before.join else Phase.SPOOL
            self._stations[rank] = Station(rank, before.host, heard_at=now, changed_at=now, phase=phase)
        self.tell_all("restart", generation=self._generation, cause=cause.cause[:4096])
        self._call(self._hooks.on_progress, {"phase": Phase.RESTART.value})

    def _call(self, hook: Callable[..., Any], *arguments: Any) -> Any:
        """Call one of the hooks. What it raises ends the fit; afterwards none is called any more."""
        if self.failures:
            return None
        try:
            return hook(*arguments)
        except (Exception, SystemExit) as error:  # noqa: BLE001  whatever it is: the fit would hang if nobody heard of it
            self.fail(failure_on_driver(error))
            return None

    # The messages

    def _on_hello(self, agent: Agent, *, rank: int, host: str) -> None:
        if self.finished.is_set() or rank in self._agents or not 0 <= rank < self._num_ranks:
            # Spark ran the stage a second time by itself: the generation it belongs to is over.
            agent.send("abort", cause="this attempt of the barrier stage comes too late")
            return
        now = time.monotonic()
        self._stations[rank] = Station(rank, host, heard_at=now, changed_at=now)
        self._agents[rank], agent.rank = agent, rank
        if len(self._agents) == self._num_ranks:
            self._call(self._hooks.on_progress, {"phase": Phase.SPOOL.value})

    def _on_heartbeat(
        self,
        station: Station,
        body: bytes,
        *,
        phase: str,
        epoch: int,
        step: int,
        is_waiting: bool = False,
        waited_s: float = 0,
    ) -> None:
        station.note_waiting(bool(is_waiting), float(waited_s), int(epoch), int(step), time.monotonic())
        self._move(station, Phase(phase), int(epoch), int(step))

    def _move(self, station: Station, phase: Phase, epoch: int = 0, step: int = 0) -> None:
        before = station.phase
        station.move_to(phase, epoch, step, time.monotonic())
        if station.rank == 0 and station.phase is not before:
            self._call(self._hooks.on_progress, {"phase": station.phase.value})

    def _on_join(
        self,
        station: Station,
        body: bytes,
        *,
        host_key: str,
        shards: list[dict[str, Any]],
        saved: list[str],
        gpus: Sequence[str] = (),
        nccl: bool = False,
    ) -> None:
        reports = tuple(ShardReport(**shard) for shard in shards)
        ids, addresses = tuple(map(str, saved)), tuple(map(str, gpus))
        station.join = Join(station.rank, station.host, host_key, reports, ids, addresses, bool(nccl))
        self._move(station, Phase.JOIN)
        joins = [self._stations[rank].join for rank in sorted(self._stations)]
        if len(joins) == self._num_ranks and all(joins):
            self._start_ranks([join for join in joins if join is not None], self._generation)

    def _start_ranks(self, joins: list[Join], generation: int) -> None:
        if generation != self._generation or self.finished.is_set():
            return  # It has failed while it waited here.
        if not self._hooks.is_ready():
            self._call_later(READY_POLL_S, partial(self._start_ranks, joins, generation))
            return
        if self._approved is None:
            self._approved = self._call(self._hooks.approve, joins)
        resume = self._call(self._hooks.resume, joins)
        if self._approved is None or self.failures:
            return  # One of them has raised, or the fit had failed before.
        name = f"allreduce_spark-{secrets.token_hex(8)}"
        self._keys = pmi.KeySpace(name, self._num_ranks, pmi.process_mapping(nodes_of(joins)))
        for rank, membership in enumerate(form_group(joins, self._generation, name)):
            self.tell(rank, "member", membership=asdict(membership), approved=self._approved, resume=resume)
            self._move(self._stations[rank], Phase.IMPORT)

    def _on_pmi(self, station: Station, body: bytes, *, line: str) -> None:
        if self._keys is None:
            raise ProtocolError("PMI before the group was formed")
        try:
            replies = self._keys.answer(station.rank, line)
        except RankFailedError as error:
            # MPI gives up where a peer is gone, so the peer's death may be the cause and still be on its way here.
            self.fail(Failure("MPIAbort", error.cause, *station.whereabouts, consequence=True))
            return
        for rank, reply in replies:
            self.tell(rank, "pmi", line=reply)

    def _on_log(self, station: Station, body: bytes) -> None:
        for line in body.decode(errors="replace").split("\n"):
            rank_log.info("[rank %d on %s] %s", station.rank, station.host, line)

    def _on_progress(self, station: Station, body: bytes, **fields: Any) -> None:
        if station.rank == 0:
            self._call(self._hooks.on_progress, fields)

    def _on_result(self, station: Station, body: bytes) -> None:
        self._move(station, Phase.RESULT)  # A heartbeat that says so may have to wait until all pieces are sent.
        self._call(self._hooks.on_result, station.rank, body)

    def _on_saved(self, station: Station, body: bytes, **fields: Any) -> None:
        self._call(self._hooks.on_saved, station.rank, fields)

    def _on_stack(self, station: Station, body: bytes) -> None:
        station.stack = tuple(body.decode(errors="replace").split("\n"))

    def _on_failed(self, station: Station, body: bytes, **fields: Any) -> None:
        fields["log_tail"] = tuple(fields.get("log_tail", ()))
        known = dict(zip(("rank", "host", "phase", "epoch", "step"), station.whereabouts, strict=True))
        # Before it has joined, its rows are not all on disk, and cannot be read a second time in this stage.
        lost = fields.get("error") == "RankDied" and station.join is None and self._generation == 0
        failure = Failure(**{**known, "stage_lost": lost, **fields})
        station.done = True
        self.fail(failure)

    def _on_done(self, station: Station, body: bytes, *, regroups: bool = False) -> None:
        station.done = True
        self.regroups = regroups
        # An agent that is lost is done as well, so a failure that waits for its cause must not look like success.
        everybody = len(self._stations) == self._num_ranks and all(other.done for other in self.stations)
        if everybody and not self.failures:
            self.tell_all("finish")
            self.finished.set()


def failure_on_driver(error: BaseException) -> Failure:
    """What has gone wrong on the driver itself: a decision of this library, or a mistake, which is shown with its traceback."""
    name = type(error).__name__
    if isinstance(error, AllReduceSparkError):
        return Failure(name, str(error), phase=Phase.JOIN.value)
    return Failure(name, f"on the driver: {name}: {error}\n{''.join(traceback.format_exception(error))}")
