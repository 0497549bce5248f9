"""What stands beside one barrier stage and is no part of Spark: the rendezvous of its agents, and the files of their results.

It runs where the agents can reach it: on the driver, or, under Spark Connect, in a process beside rank 0's agent.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from allreduce_spark.checkpoint.coordinator import Coordinator
from allreduce_spark.config import Timeouts
from allreduce_spark.rendezvous.controller import Hooks
from allreduce_spark.rendezvous.group import Failure, Join
from allreduce_spark.rendezvous.recovery import Restarts
from allreduce_spark.rendezvous.server import Rendezvous

__all__ = ["EachEpochOnce", "rendezvous_for"]


@contextlib.contextmanager
def rendezvous_for(
    num_ranks: int,
    key: bytes,
    timeouts: Timeouts,
    *,
    approve: Callable[[Sequence[Join]], dict[str, Any]],
    coordinator: Coordinator,
    restarts: Restarts,
    results: Path,
    on_progress: Callable[[dict[str, Any]], None],
    is_ready: Callable[[], bool] = lambda: True,
) -> Iterator[Rendezvous]:
    """A rendezvous, to be started; at the end its agents have left.

    Args:
        approve, is_ready, on_progress: See `Hooks`.
        coordinator: Knows what each generation goes on from.
        results: The folder where what rank r sends becomes the file `result-r`.
    """
    with contextlib.closing(_Results(results)) as files:
        hooks = Hooks(
            approve=approve,
            resume=lambda joins: coordinator.resume([join.saved for join in joins]),
            on_progress=on_progress,
            on_result=files.write,
            on_saved=coordinator.note,
            on_restart=files.forget,
            is_ready=is_ready,
        )
        with contextlib.closing(Rendezvous(num_ranks, key, timeouts, hooks, restarts)) as rendezvous:
            yield rendezvous


class _Results:
    """Writes down what ranks send, piece by piece."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[int, BinaryIO] = {}

    def write(self, rank: int, piece: bytes) -> None:
        if rank not in self._files:
            self._files[rank] = (self._folder / f"result-{rank}").open("wb")
        self._files[rank].write(piece)

    def forget(self, cause: Failure) -> None:
        for file in self._files.values():
            file.seek(0)
            file.truncate()

    def close(self) -> None:
        for file in self._files.values():
            file.close()


class EachEpochOnce:
    """Passes progress on, but for that of epochs which were over before the ranks had to go back behind their end."""

    def __init__(self, report: Callable[[dict[str, Any]], None]) -> None:
        self._report, self._last_over = report, -1

    def __call__(self, fields: dict[str, Any]) -> None:
        if "epoch" in fields:
            if fields["epoch"] <= self._last_over:
                return
            if fields["epoch_done"]:
                self._last_over = fields["epoch"]
        self._report(fields)
