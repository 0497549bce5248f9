"""What a user sees while a fit runs: a progress bar (verbose=1), a line per epoch (verbose=2), or nothing (verbose=0)."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any, TextIO

from tqdm.auto import tqdm

from allreduce_spark.errors import ConfigError
from allreduce_spark.rendezvous.protocol import Phase

__all__ = ["Display", "Nobody", "erasing", "verbosity_of"]

WAITING_FOR = {
    Phase.SLOTS: "counting slots",
    Phase.START: "waiting for Spark to start their tasks",
    Phase.SPOOL: "writing the rows to local disks",
    Phase.JOIN: "waiting for the rows of all ranks",
    Phase.IMPORT: "importing Keras, loading the model",
    Phase.INIT: "connecting to each other",
    Phase.FIRST_STEP: "compiling the first step",
}


class Display:
    """Shows the progress of one fit.

    `report` is called in the thread of the rendezvous and only takes notes; `draw` is called in the user's thread.

    Args:
        verbose: As in Keras: 0 silent, 1 a bar, 2 a line per epoch.
        epochs: Index of the last epoch, plus one.
        num_ranks: For the text of the bar; None where it is not known yet.
    """

    def __init__(self, verbose: int, epochs: int, num_ranks: int | None) -> None:
        self._verbose, self._epochs, self._num_ranks = verbose, epochs, num_ranks
        self._lock = threading.Lock()
        self._notes: list[dict[str, Any]] = []
        self._bar: tqdm | None = None
        self._epoch: int | None = None
        self._epoch_started_at = time.monotonic()
        self._phase: Phase | None = None
        self._ticked_at = 0.0

    def report(self, fields: dict[str, Any]) -> None:
        with self._lock:
            if (
                self._notes
                and not self._notes[-1].get("epoch_done")
                and "epoch" in fields
                and "epoch" in self._notes[-1]
            ):
                self._notes[-1] = fields  # nobody has seen the older one
            else:
                self._notes.append(fields)

    def draw(self) -> None:
        with self._lock:
            notes, self._notes = self._notes, []
        for fields in notes:
            if "phase" in fields:
                self.show_phase(fields["phase"])
            else:
                self._show_step(**fields)
        if self._bar is not None and self._epoch is None and time.monotonic() - self._ticked_at > 1:
            self._ticked_at = time.monotonic()
            self._bar.refresh()  # the clock beside the phase goes on

    def show_phase(self, phase: Phase | str) -> None:
        """What everybody waits for before the first step; later, that all ranks begin again."""
        if self._epoch is not None and Phase(phase) in (Phase.START, Phase.RESTART) and self._bar is not None:
            self._bar.set_postfix_str("ranks are started again")
        if self._epoch is not None or Phase(phase) is self._phase or Phase(phase) not in WAITING_FOR:
            return
        self._phase = Phase(phase)
        self._epoch_started_at = time.monotonic()
        if self._verbose == 1:
            text = f"{WAITING_FOR[self._phase]} ({self._phase.value})"
            if self._num_ranks is not None:
                text = f"{self._num_ranks} ranks: {text}"
            if self._bar is None:
                self._bar = tqdm(desc=text, bar_format="{desc} [{elapsed}]" + erasing(sys.stderr), leave=False)
            self._bar.set_description_str(text)

    def _show_step(
        self, epoch: int, steps_done: int, steps: int, rows: int, logs: dict[str, float], epoch_done: bool
    ) -> None:
        if epoch != self._epoch:
            self._begin_epoch(epoch, steps)
        elapsed = max(time.monotonic() - self._epoch_started_at, 1e-9)
        text = " - ".join(f"{name}: {value:.4g}" for name, value in logs.items())
        if self._bar is not None and self._verbose == 1:
            self._bar.set_postfix_str(f"{text} - {rows / elapsed:.0f} rows/s" if text else "", refresh=False)
            self._bar.update(steps_done - self._bar.n)
            if epoch_done:
                self._bar.refresh()
        elif self._verbose == 2 and epoch_done:
            line = f"Epoch {epoch + 1}/{self._epochs} - {steps} steps - {elapsed:.1f}s - {text}"
            tqdm.write(line + erasing(sys.stdout))
            sys.stdout.flush()
        if epoch_done:
            self._epoch_started_at = time.monotonic()

    def _begin_epoch(self, epoch: int, steps: int) -> None:
        self._close_bar()
        self._epoch = epoch
        if self._verbose == 1:
            self._bar = tqdm(total=steps, desc=f"Epoch {epoch + 1}/{self._epochs}", unit="step")

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def close(self) -> None:
        self.draw()
        self._close_bar()


class Nobody:
    """Looks at nothing: what there is to see of a function is its own affair."""

    def show_phase(self, phase: Phase) -> None:
        pass

    def report(self, fields: dict[str, Any]) -> None:
        pass

    def draw(self) -> None:
        pass


def erasing(stream: TextIO) -> str:
    """What erases the rest of a line on a terminal: Spark draws a bar of its own there, and ours may be shorter."""
    return "\x1b[K" if stream.isatty() else ""


def verbosity_of(verbose: int | str) -> int:
    """What the argument `verbose` of a fit means: 0, 1 or 2. "auto" is a bar where somebody looks, else a line per epoch.

    Raises:
        ConfigError: It is none of them, nor "auto".
    """
    if verbose == "auto":
        return 1 if sys.stderr.isatty() or "ipykernel" in sys.modules else 2
    if isinstance(verbose, bool) or verbose not in (0, 1, 2):
        raise ConfigError(f"verbose must be 0, 1, 2 or 'auto', got {verbose!r}")
    return int(verbose)
