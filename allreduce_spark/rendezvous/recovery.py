"""After which failures the ranks of a fit are started again, and how often. Pure rules, no sockets."""

from __future__ import annotations

from collections.abc import Sequence

from allreduce_spark.rendezvous.group import Failure, Station, first_cause

__all__ = ["Restarts", "place_of"]

# What happens to ranks rather than being done by them. Whatever else a rank raises before its first step will come again.
_MISFORTUNES = ("RankDied", "MPIAbort", "CollectiveError", "CollectiveTimeoutError", "RendezvousTimeoutError")
_FINAL = ("ConfigError", "DataError", "MissingDependencyError", "CancelledError", "Interrupted")


class Restarts:
    """Decides, failure by failure, over all generations and barrier stages of one fit.

    Args:
        limit: How often in a row the ranks are started again without having come further than before.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._count = 0
        self._furthest: tuple[int, int] = (-1, -1)
        self._last: tuple[object, ...] | None = None

    def refusal(self, failures: Sequence[Failure], place: tuple[int, int]) -> str | None:
        """Why the fit is not to go on after this, for people; None where it is. Each call counts.

        Args:
            failures: Of one generation, in order of time; not empty.
            place: (epoch, step) of the rank that had come furthest, as far as heartbeats have told.
        """
        cause = first_cause(failures)
        if not _may_pass(cause):
            return ""
        # A rank that fails says where. The last heartbeat may be many short steps older.
        place = max([place, *((each.epoch or 0, each.step) for each in failures if each.step is not None)])
        if place > self._furthest:
            self._furthest, self._count = place, 0
        same, self._last = self._last, (cause.error, cause.cause.partition("\n")[0], cause.epoch, cause.step)
        by_chance = cause.stage_lost or "SIGKILL" in cause.cause
        if cause.step is not None and same == self._last and not by_chance:
            return "the same error came at the same step again after a restart, so it will come every time"
        if self._count >= self._limit:
            if not self._limit:
                return ""
            return f"the ranks were started again {self._count} times and came no further (max_restarts={self._limit})"
        self._count += 1
        return None


def place_of(stations: Sequence[Station]) -> tuple[int, int]:
    """(epoch, step) of the rank that has come furthest; (-1, -1) before the first step."""
    return max(((station.epoch, station.step) for station in stations if station.phase.has_step), default=(-1, -1))


def _may_pass(failure: Failure) -> bool:
    """Whether it may not happen again."""
    if failure.error in _FINAL or (failure.rank is None and not failure.stage_lost):
        return False
    return failure.stage_lost or failure.error in _MISFORTUNES or failure.step is not None
