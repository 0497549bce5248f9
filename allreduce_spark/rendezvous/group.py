"""What the rendezvous decides, without any socket: who forms the group, who is overdue, and which failure came first."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from allreduce_spark.config import Timeouts
from allreduce_spark.errors import RankFailedError
from allreduce_spark.rendezvous.protocol import Phase
from allreduce_spark.world import Membership, worlds_of

__all__ = [
    "Failure",
    "Join",
    "ShardReport",
    "Station",
    "add_failure",
    "first_cause",
    "form_group",
    "nodes_of",
    "overdue",
    "shards_of",
    "stalled_for_long",
    "stragglers",
]

STEPS_TO_MEASURE = 10
SLOW, SLOW_S = 1.5, 0.02  # a rank is slow that takes so many times as long as others, and so much longer


@dataclass(frozen=True)
class ShardReport:
    """What an agent tells of one shard that it has on disk.

    Attributes:
        shard: Its number.
        rows, validation_rows: How many rows it has.
        spec, validation_spec: What a row looks like, as JSON, or None where there are none.
    """

    shard: int
    rows: int
    validation_rows: int = 0
    spec: str | None = None
    validation_spec: str | None = None


@dataclass(frozen=True)
class Join:
    """What an agent tells once its shards are on disk and it is ready to start a rank, in every generation.

    Attributes:
        rank: The agent's partition; the rank it will look after.
        host: Name of the host, for people.
        host_key: The same string for two agents exactly if their ranks can share memory.
        shards: Those of the rank.
        saved: Ids of the checkpoints of which the rank's part lies on the agent's disk.
        gpus: The GPUs that the rank may use: names that are the same for two ranks of a host exactly if they mean one GPU.
        nccl: Whether it has one, and a Horovod that can use it.
    """

    rank: int
    host: str
    host_key: str
    shards: tuple[ShardReport, ...]
    saved: tuple[str, ...] = ()
    gpus: tuple[str, ...] = ()
    nccl: bool = False


@dataclass(frozen=True)
class Failure:
    """Something that ends the fit.

    Attributes:
        error: Name of the exception class, for example "ValueError"; or of what happened, "RankDied".
        cause: What happened, for people; may be a traceback.
        consequence: True where this may well be the effect of another failure that is still on its way: a rank that
            lost the others in a collective, an agent whose connection ended.
        stage_lost: True where the barrier stage itself cannot go on: an agent, or the machine that it ran on, is gone.
    """

    error: str
    cause: str
    rank: int | None = None
    host: str | None = None
    phase: str | None = None
    epoch: int | None = None
    step: int | None = None
    log_tail: tuple[str, ...] = ()
    consequence: bool = False
    stage_lost: bool = False

    @property
    def text(self) -> str:
        """Who failed, where and why, for people; without the log."""
        return str(
            RankFailedError(
                self.cause.strip(), rank=self.rank, host=self.host, phase=self.phase, epoch=self.epoch, step=self.step
            )
        )


@dataclass
class Station:
    """Where one rank is: what its agent last said, and when (seconds of a monotonic clock).

    `changed_at` is when phase, epoch or step last moved on; `heard_at` is the last sign of life of the agent. `warned` says
    whether the log has named it for not going on, and `stack` is what its rank was doing then. `is_waiting` says whether the
    rank waits for others, and `step_s` how long it worked for one step, of late, without the waiting.
    """

    rank: int
    host: str
    heard_at: float
    changed_at: float
    phase: Phase = Phase.SPOOL
    epoch: int = 0
    step: int = 0
    done: bool = False
    warned: bool = False
    stack: tuple[str, ...] = ()
    join: Join | None = None
    is_waiting: bool = False
    step_s: float | None = None
    called_slow: bool = False
    _measured: tuple[float, float, int, int] | None = None

    def note_waiting(self, is_waiting: bool, waited_s: float, epoch: int, step: int, now: float) -> None:
        """Take from a heartbeat how the rank spends its time.

        Args:
            is_waiting: Whether it is in a collective.
            waited_s: How long it has been in collectives in all.
        """
        self.is_waiting = is_waiting
        if self._measured is None or epoch != self._measured[2] or step < self._measured[3]:
            self._measured = now, waited_s, epoch, step
        elif step >= self._measured[3] + STEPS_TO_MEASURE:
            before, waited_before, _, step_before = self._measured
            self.step_s = max(0.0, now - before - (waited_s - waited_before)) / (step - step_before)
            self._measured = now, waited_s, epoch, step

    def move_to(self, phase: Phase, epoch: int, step: int, now: float) -> None:
        if phase in (Phase.SPOOL, Phase.RESTART, Phase.JOIN) and _ORDER[phase] < _ORDER[self.phase]:
            return  # It left before the agent had joined, or knew that the group is formed.
        if (phase, epoch, step) != (self.phase, self.epoch, self.step):
            self.phase, self.epoch, self.step, self.changed_at = phase, epoch, step, now
            self.warned, self.stack = False, ()

    @property
    def place(self) -> tuple[int, int, int]:
        """How far the rank has come; comparable between ranks."""
        # Validation belongs to the epoch it ends, so epoch and step count, and the phase does not, while there are steps.
        if self.phase.has_step:
            return (1, self.epoch, self.step)
        return (0 if _ORDER[self.phase] < _ORDER[Phase.FIRST_STEP] else 2, _ORDER[self.phase], 0)

    @property
    def whereabouts(self) -> tuple[int, str, str, int | None, int | None]:
        """(rank, host, phase, epoch, step) as a `Failure` names them."""
        epoch, step = (self.epoch, self.step) if self.phase.has_step else (None, None)
        return self.rank, self.host, self.phase.value, epoch, step


_ORDER = {phase: index for index, phase in enumerate(Phase)}


def nodes_of(joins: Sequence[Join]) -> list[int]:
    """Number the hosts of the ranks, in rank order, counted from the lowest rank's."""
    return [world.node_rank for world in worlds_of([join.host_key for join in joins])]


def shards_of(joins: Sequence[Join]) -> list[ShardReport]:
    """The shards of all ranks, in the order of their numbers."""
    return sorted((shard for join in joins for shard in join.shards), key=lambda shard: shard.shard)


def form_group(joins: Sequence[Join], generation: int, key_space: str) -> tuple[Membership, ...]:
    """Tell every rank its place. `joins` is in rank order and complete."""
    shards = shards_of(joins)
    rows = tuple(shard.rows for shard in shards)
    validation_rows = tuple(shard.validation_rows for shard in shards)
    return tuple(
        Membership(world, generation, key_space, rows, validation_rows)
        for world in worlds_of([join.host_key for join in joins])
    )


def add_failure(failures: Sequence[Failure], new: Failure) -> list[Failure]:
    """The failures in order of time, with a new one.

    What a rank reports after its first failure belongs to that one: MPI gives up because a peer is gone, and then ends the
    process. That end must not be taken for the cause, but it brings the log.
    """
    for index, known in enumerate(failures):
        if new.rank is not None and new.rank == known.rank:
            both = replace(known, cause=f"{known.cause}; then {new.cause}", log_tail=new.log_tail or known.log_tail)
            return [*failures[:index], both, *failures[index + 1 :]]
    return [*failures, new]


def first_cause(failures: Sequence[Failure]) -> Failure:
    """The failure to show: the first that is nobody's consequence, else the first. `failures` is in order of time."""
    return next((failure for failure in failures if not failure.consequence), failures[0])


_SETTING_OF_PHASE = {
    Phase.SLOTS: "slots_s",
    Phase.START: "start_s",
    Phase.SPOOL: "spool_s",
    Phase.RESTART: "init_s",
    Phase.JOIN: "spool_s",
    Phase.IMPORT: "import_s",
    Phase.INIT: "init_s",
    Phase.FIRST_STEP: "step_s",
    Phase.TRAIN: "step_s",
    Phase.VALIDATE: "step_s",
    Phase.CHECKPOINT: "checkpoint_s",
    Phase.FUNCTION: "function_s",
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
            stage_lost=True,
        )
    for station in stations:
        if not station.done and now - station.heard_at > timeouts.silence_s:
            return Failure(
                "RendezvousTimeoutError",
                f"the driver has not heard of this rank's agent for {now - station.heard_at:.0f} s; its host or its "
                "network is gone, or it is stopped. Setting: Timeouts.silence_s",
                *station.whereabouts,
                stage_lost=True,
            )
    return _stalled(laggards(stations), now, timeouts)


def laggards(stations: Sequence[Station]) -> list[Station]:
    """Those ranks that are furthest behind, by their numbers.

    Only they can be to blame if nothing goes on: all others wait for them, and with good reason, however long. And where
    several are equally far behind, they can only wait for each other since the last of them has come there.
    """
    working = [station for station in stations if not station.done and station.phase is not Phase.JOIN]
    furthest_behind = min((station.place for station in working), default=None)
    behind = [station for station in working if station.place == furthest_behind]
    busy = [station for station in behind if not station.is_waiting]  # the others wait for these, in the same step
    return sorted(busy or behind, key=lambda station: station.rank)


def stalled_for_long(stations: Sequence[Station], now: float, timeouts: Timeouts) -> list[Station]:
    """The ranks that are to be named in the log, because they are in the midst of steps and none of them goes on."""
    last = [station for station in laggards(stations) if station.phase.has_step and station.phase is not Phase.FUNCTION]
    if not last or now - max(station.changed_at for station in last) <= timeouts.stall_warning_s:
        return []
    return [station for station in last if not station.warned]


def stragglers(stations: Sequence[Station]) -> list[str]:
    """What to say, once, of ranks that keep the others waiting at every step, because they work so much longer for it."""
    # What a function of the user's own does between two collectives need not be the same on all ranks.
    measured = [station for station in stations if station.step_s is not None and station.phase is not Phase.FUNCTION]
    if len(measured) < 2:
        return []
    usual = statistics.median(station.step_s or 0.0 for station in measured)
    slow = [
        station
        for station in measured
        if not station.called_slow and (station.step_s or 0.0) > max(SLOW * usual, usual + SLOW_S)
    ]
    for station in slow:
        station.called_slow = True
    return [
        f"rank {station.rank} on {station.host} works {1000 * (station.step_s or 0.0):.0f} ms for a step, the ranks in the "
        f"middle {1000 * usual:.0f} ms, and all wait for it: is its machine slower, or busy with something else?"
        for station in slow
    ]


def _stalled(behind: Sequence[Station], now: float, timeouts: Timeouts) -> Failure | None:
    """Whether those that are furthest behind have not gone on for too long."""
    if not behind:
        return None
    last = max(behind, key=lambda station: station.changed_at)
    setting = _SETTING_OF_PHASE[last.phase]
    stalled_s, limit_s = now - last.changed_at, getattr(timeouts, setting)
    if last.phase is Phase.CHECKPOINT:
        limit_s += timeouts.silence_s  # the rank gives it up by itself, and goes on: that is to be heard first
    if stalled_s <= limit_s:
        return None
    also = [station.rank for station in behind if station is not last]
    at = f" at epoch {last.epoch}, step {last.step}" if last.phase.has_step else ""
    so_have = f"; so have ranks {also}" if also else ", and the others wait for it"
    return Failure(
        "RendezvousTimeoutError",
        f"this rank has been in phase '{last.phase.value}'{at} for {stalled_s:.0f} s without going on{so_have}. "
        f"Setting: Timeouts.{setting}",
        *last.whereabouts,
        log_tail=last.stack,
    )
