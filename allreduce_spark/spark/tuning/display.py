"""What a user sees while a search runs: a bar with the best value (verbose=1), a line per trial (verbose=2), or nothing (0)."""

from __future__ import annotations

import sys
import time

from tqdm.auto import tqdm

from allreduce_spark.spark.progress import erasing
from allreduce_spark.spark.tuning.result import Trial

__all__ = ["SearchDisplay"]


class SearchDisplay:
    """Shows the progress of one search; used in the user's thread only.

    Args:
        verbose: 0 silent, 1 a bar, 2 a line per trial.
        max_trials: How long the bar is.
        objective: Name of the values.
    """

    def __init__(self, verbose: int, max_trials: int, objective: str) -> None:
        self._verbose, self._objective = verbose, objective
        self._bar = tqdm(total=max_trials, desc="Trials", unit="trial") if verbose == 1 else None
        self._running, self._drawn_at = 0, 0.0
        self._best = ""

    def draw(self, running: int) -> None:
        """How many trials run now; to be called often."""
        if self._bar is not None and (running != self._running or time.monotonic() - self._drawn_at > 1):
            self._running, self._drawn_at = running, time.monotonic()
            self._bar.set_postfix_str(f"{self._best}{running} running")

    def show(self, trial: Trial, best: Trial | None) -> None:
        """A trial has ended; the best so far, if one is complete."""
        if self._bar is not None:
            if best is not None:
                self._best = f"best {self._objective}: {best.value:.4g} (trial {best.number}), "
            self._bar.update()
        elif self._verbose == 2:
            value = "" if trial.value is None else f" - {self._objective}: {trial.value:.4g}"
            params = ", ".join(
                f"{name}={setting:.4g}" if isinstance(setting, float) else f"{name}={setting!r}"
                for name, setting in trial.params.items()
            )
            error = "" if trial.error is None else f" - {type(trial.error).__name__}: {trial.error}"
            took = f"{trial.epochs} epochs - {trial.duration_s:.1f}s"
            tqdm.write(f"Trial {trial.number} {trial.state}{value} - {took} - {params}{error}{erasing(sys.stdout)}")
            sys.stdout.flush()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
