"""What the rendezvous decides, without any socket: who forms the group, who is overdue, and which failure came first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from allreduce_spark.config import Timeouts
from allreduce_spark.rendezvous.protocol import Phase
from allreduce_spark.world import Membership, worlds_of

__all__ = ["Failure", "Join", "Station", "first_cause", "form_group", "nodes_of", "overdue"]


@dataclass(frozen=True)
class Join:
    """What an agent tells once its shard is on disk.

    Attributes:
        rank: The agent's partition; the rank it will look after.
        host: Name of the host, for people.
        host_key: The same string for two agents exactly if their ranks can share memory.
        rows, validation_rows: Rows of the agent's shard.
        spec, validation_spec: What a row looks like, as JSON, or None where the shard is empty.
    """

    rank: int
    host: str
    host_key: str
    rows: int
    validation_rows: int = 0
    spec: dict[str, Any] | None = None
    validation_spec: dict[str, Any] | None = None


@dataclass(frozen=True)
class Failure:
    """Something that ends the fit.

    Attributes:
        error: Name of the exception class, for example "ValueError"; or of what happened, "RankDied".
        cause: What happened, for people; may be a traceback.
        consequence: True where this may well be the effect of another failure that is still on its way: a rank that
            lost the others in a collective, an agent whose connection ended.
    """

    error: str
    cause: str
    rank: int | None = None
    host: str | None = None
    phase: str | None = None
    step: int | None = None
    log_tail: tuple[str, ...] = ()
    consequence: bool = False


@dataclass
class Station:
    """Where one rank is: what its agent last said, and when (seconds of a monotonic clock).

    `changed_at` is when phase, epoch or step last moved on; `heard_at` is the last sign of life of the agent.
    """

    rank: int
    host: str
    heard_at: float
    changed_at: float
    phase: Phase = Phase.SPOOL
    epoch: int = 0
    step: int = 0
    done: bool = False
    join: Join | None = None

    def move_to(self, phase: Phase, epoch: int, step: int, now: float) -> None:
        if (phase, epoch, step) != (self.phase, self.epoch, self.step):
            self.phase, self.epoch, self.step, self.changed_at = phase, epoch, step, now

    @property
    def place(self) -> tuple[int, int, int]:
        """How far the rank has come; comparable between ranks."""
        # Validation belongs to the epoch it ends, so phase counts after epoch once training has begun.
        order = list(Phase).index(self.phase)
        training = order >= list(Phase).index(Phase.FIRST_STEP)
        return (1, self.epoch, self.step) if training else (0, order, 0)


def nodes_of(joins: Sequence[Join]) -> list[int]:
    """Number the hosts of the ranks, in rank order, counted from the lowest rank's."""
    return [world.node_rank for world in worlds_of([join.host_key for join in joins])]


def form_group(joins: Sequence[Join], generation: int, key_space: str) -> tuple[Membership, ...]:
    """Tell every rank its place. `joins` is in rank order and complete."""
    rows = tuple(join.rows for join in joins)
    validation_rows = tuple(join.validation_rows for join in joins)
    return tuple(
        Membership(world, generation, key_space, rows, validation_rows)
        for world in worlds_of([join.host_key for join in joins])
    )


def first_cause(failures: Sequence[Failure]) -> Failure:
    """The failure to show: the first that is nobody's consequence, else the first. `failures` is in order of time."""
    return next((failure for failure in failures if not failure.consequence), failures[0])


_SETTING_OF_PHASE = {
    Phase.START: "start_s",
    Phase.SPOOL: "spool_s",
    Phase.JOIN: "spool_s",
    Phase.IMPORT: "import_s",
    Phase.INIT: "init_s",
    Phase.FIRST_STEP: "step_s",
    Phase.TRAIN: "step_s",
    Phase.VALIDATE: "step_s",
    Phase.RESULT: "result_s",
    Phase.TEARDOWN: "teardown_s",
}


def overdue(
    stations: Sequence[Station], num_ranks: int, started_at: float, now: float, timeouts: Timeouts
) -> Failure | None:
    """Find the wait that has gone on for too long, if there is one, and say who waited for whom.

    Args:
        stations: The agents that have connected, in any order.
        num_ranks: How many should have.
        started_at: When the barrier stage was submitted.
        now: The present, on the same monotonic clock as all other times.
    """
    missing = sorted(set(range(num_ranks)) - {station.rank for station in stations})
    if missing and now - started_at > timeouts.start_s:
        return Failure(
            "RendezvousTimeoutError",
            f"the driver waited {now - started_at:.0f} s for {num_ranks} agents, and those of ranks {missing} did not "
            "connect. Are the slots busy with other jobs, or can the executors not reach the driver's port? "
            "Setting: Timeouts.start_s",
            phase=Phase.START.value,
        )
    for station in stations:
        if not station.done and now - station.heard_at > timeouts.silence_s:
            return Failure(
                "RendezvousTimeoutError",
                f"the driver has not heard of this rank's agent for {now - station.heard_at:.0f} s; its host or its "
                "network is gone, or it is stopped. Setting: Timeouts.silence_s",
                *(station.rank, station.host, station.phase.value, station.step),
            )
    waiting = [station for station in stations if not station.done and station.phase is not Phase.JOIN]
    # Whoever is furthest behind holds up all the others.
    for station in sorted(waiting, key=lambda station: station.place):
        setting = _SETTING_OF_PHASE[station.phase]
        stalled_s = now - station.changed_at
        if stalled_s > getattr(timeouts, setting):
            return Failure(
                "RendezvousTimeoutError",
                f"this rank has been in phase '{station.phase.value}' at epoch {station.epoch}, step {station.step} "
                f"for {stalled_s:.0f} s without going on, and the others wait for it. Setting: Timeouts.{setting}",
                *(station.rank, station.host, station.phase.value, station.step),
            )
    return None
