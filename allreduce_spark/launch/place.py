"""Where a rank is, as its agent tells it the driver: what the rank's status page says, and what the agent alone can know."""

from __future__ import annotations

from typing import Any

from allreduce_spark.rendezvous.protocol import Phase
from allreduce_spark.rendezvous.status import StatusPage

__all__ = ["Place"]


class Place:
    """Where this rank is: its status page says it, except before the ranks are let go and once the rank has finished."""

    def __init__(self, status: StatusPage) -> None:
        self._status = status
        self.generation = 0
        self.phase: Phase | None = Phase.SPOOL

    def read(self) -> dict[str, Any]:
        """As heartbeats tell it."""
        phase, epoch, step = self._status.read()
        is_waiting, waited_s = self._status.read_waiting()
        return {
            "generation": self.generation,
            "phase": (self.phase or phase).value,
            "epoch": epoch,
            "step": step,
            "is_waiting": is_waiting,
            "waited_s": waited_s,
        }

    def restart(self, generation: int) -> None:
        """The rank is dead, and another one is to come."""
        self.generation, self.phase = generation, Phase.RESTART
        self._status.write(Phase.IMPORT)
        self._status.write_waiting(False, 0.0)
        self._status.ask_to_regroup(False)

    def ask_to_regroup(self) -> None:
        self._status.ask_to_regroup()

    def at_failure(self) -> dict[str, Any]:
        """As reports of a failure tell it: what the rank itself has said last."""
        phase, epoch, step = self._status.read()
        return {"phase": phase.value} | ({"epoch": epoch, "step": step} if phase.has_step else {})
