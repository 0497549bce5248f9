"""Trials in parallel: ask for a setting, let it be tried in a thread, tell what came of it, until enough have been tried.

What a trial is made of is not known here: `search` makes each a fit on a gang of ranks. All decisions fall in the thread of the
user, to which the threads of the trials send what happens, so the study and the books need no lock.
"""

from __future__ import annotations

import contextlib
import logging
import math
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Literal

from pyspark import InheritableThread

from allreduce_spark.errors import AllReduceSparkError, ConfigError, SearchError
from allreduce_spark.spark.tuning.display import SearchDisplay
from allreduce_spark.spark.tuning.result import KeptModel, SearchResult, Trial, best_first
from allreduce_spark.spark.tuning.study import Direction, State, Study

__all__ = ["EndSearch", "Outcome", "RunningTrial", "SearchLimits", "TrialStopped", "run_trials"]

log = logging.getLogger(__name__)

LOOK_EVERY_S = 0.2
# A trial that is told to stop looks up within a tenth of a second, and then has its fit's own deadline for ending its ranks.
STOP_S = 60.0


class TrialStopped(Exception):
    """Raised by `RunningTrial.check`."""


class EndSearch(Exception):
    """Raised by the work of a trial where every other trial would fail for the same cause; the cause is raised to the user."""


@dataclass(frozen=True)
class Outcome:
    """What came of a trial that was not stopped.

    Attributes:
        value: Of the objective.
        epochs: How many epochs were trained.
        history: Name of a metric -> its value after each epoch.
        keep: Packs the trained model; called if the trial is among the best. None where there is no model.
    """

    value: float
    epochs: int = 0
    history: dict[str, list[Any]] = field(default_factory=dict)
    keep: Callable[[], KeptModel] | None = None


@dataclass(frozen=True)
class SearchLimits:
    """How far a search goes.

    Attributes:
        max_trials: How many settings are tried, unless the sampler runs out of them before.
        max_parallel: How many at once.
        timeout_s: After so long, in seconds, what still runs is stopped and nothing new begun; None for no such limit.
        keep_models: How many of the best models are kept.
        on_failure: "record" to note the error of a trial that fails and go on, "raise" to end the search with it.
    """

    max_trials: int
    max_parallel: int = 1
    timeout_s: float | None = None
    keep_models: int = 5
    on_failure: Literal["record", "raise"] = "record"

    def __post_init__(self) -> None:
        for name, at_least in (("max_trials", 1), ("max_parallel", 1), ("keep_models", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
                raise ConfigError(f"{name} must be an integer of at least {at_least}, got {value!r}.")
        if self.timeout_s is not None and not (isinstance(self.timeout_s, Real) and 0 < self.timeout_s < math.inf):
            raise ConfigError(f"timeout_s must be a positive number of seconds or None, got {self.timeout_s!r}.")
        if self.on_failure not in ("record", "raise"):
            raise ConfigError(f"on_failure must be 'record' or 'raise', got {self.on_failure!r}.")


class RunningTrial:
    """A trial that runs, as its work sees it.

    Attributes:
        number, params: What is tried.
    """

    def __init__(self, number: int, params: dict[str, Any], events: queue.SimpleQueue[Any]) -> None:
        self.number, self.params = number, params
        self._events = events
        self._stop = threading.Event()

    def report(self, epochs: int, value: float | None, logs: dict[str, Any]) -> None:
        """Tell how it goes after so many epochs, from any thread; whether to go on will be known at some later `check`."""
        self._events.put((self.number, _Report(epochs, value, logs)))

    def check(self) -> None:
        """To be called often, in the thread of the work.

        Raises:
            TrialStopped: It is to end now.
        """
        if self._stop.is_set():
            raise TrialStopped

    def stop(self) -> None:
        self._stop.set()


# Called in the user's thread with number and params; what it returns is called in a thread of its own, and is the trial.
Begin = Callable[[int, dict[str, Any]], Callable[[RunningTrial], Outcome]]


def run_trials(
    study: Study, begin: Begin, limits: SearchLimits, *, objective: str, direction: Direction, display: SearchDisplay
) -> SearchResult:
    """Try settings until the limits are reached. The threads of the trials inherit the caller's Spark job group.

    An `AllReduceSparkError` of `begin`, and whatever the work raises, is the failure of that trial; everything else that
    `begin` raises ends the search. However it ends, no trial runs any more afterwards.

    Args:
        study: Fresh.
        begin: Makes the work of a trial, in this thread.
        limits: See there.
        objective: Name of the values, for people.
        direction: Of the study.
        display: Shows the progress.

    Raises:
        SearchError: No trial was complete.
        KeyboardInterrupt: Ctrl-C.
        Exception: The cause of an `EndSearch`; with `on_failure="raise"`, the first error.
    """
    loop = _Loop(study, begin, limits, direction, display)
    try:
        loop.run()
    finally:
        loop.stop_all()
    trials = tuple(sorted(loop.ended, key=lambda trial: trial.number))
    if not any(trial.state == "complete" for trial in trials):
        raise _nothing_found(trials, limits) from next((trial.error for trial in trials if trial.error), None)
    return SearchResult(trials, objective, direction, loop.kept)


@dataclass(frozen=True)
class _Report:
    epochs: int
    value: float | None
    logs: dict[str, Any]


@dataclass
class _Entry:
    """The books about a trial that runs."""

    handle: RunningTrial
    thread: threading.Thread | None = None
    started_at: float = field(default_factory=time.monotonic)
    epochs: int = 0
    value: float | None = None
    history: dict[str, list[Any]] = field(default_factory=dict)
    verdict: State | None = None  # why it was told to stop


class _Loop:
    def __init__(
        self, study: Study, begin: Begin, limits: SearchLimits, direction: Direction, display: SearchDisplay
    ) -> None:
        self._study, self._begin, self._limits = study, begin, limits
        self._direction, self._display = direction, display
        self._events: queue.SimpleQueue[tuple[int, _Report | Outcome | BaseException]] = queue.SimpleQueue()
        self._running: dict[int, _Entry] = {}
        self._deadline = math.inf if limits.timeout_s is None else time.monotonic() + limits.timeout_s
        self.ended: list[Trial] = []
        self.kept: dict[int, KeptModel] = {}

    def run(self) -> None:
        while True:
            self._start_trials()
            if not self._running:
                return
            self._display.draw(len(self._running))
            with contextlib.suppress(queue.Empty):
                self._handle(*self._events.get(timeout=LOOK_EVERY_S))

    def stop_all(self) -> None:
        """End all trials that run, and wait for them."""
        for entry in self._running.values():
            entry.handle.stop()
        deadline = time.monotonic() + STOP_S
        for number, entry in self._running.items():
            if entry.thread is not None:
                entry.thread.join(max(0.0, deadline - time.monotonic()))
                if entry.thread.is_alive():
                    log.warning("trial %d has not ended %.0f s after it was told to", number, STOP_S)

    def _start_trials(self) -> None:
        if time.monotonic() > self._deadline:
            for entry in self._running.values():
                self._tell_to_stop(entry, "stopped")
            return
        while len(self._running) < self._limits.max_parallel and not self._study.exhausted:
            if len(self.ended) + len(self._running) == self._limits.max_trials:
                return
            self._start_trial()

    def _start_trial(self) -> None:
        number, params = self._study.ask()
        entry = self._running[number] = _Entry(RunningTrial(number, params, self._events))
        try:
            work = self._begin(number, dict(params))
        except (AllReduceSparkError, EndSearch) as error:
            self._end(entry, error)
            return
        entry.thread = InheritableThread(
            target=_work_of_trial, args=(work, entry.handle, self._events), name=f"allreduce-spark-trial-{number}"
        )
        entry.thread.daemon = True
        entry.thread.start()

    def _handle(self, number: int, event: _Report | Outcome | BaseException) -> None:
        entry = self._running[number]
        if isinstance(event, _Report):
            self._note(entry, event)
        else:
            if entry.thread is not None:
                entry.thread.join()
            self._end(entry, event)

    def _note(self, entry: _Entry, report: _Report) -> None:
        entry.epochs = report.epochs
        for name, value in report.logs.items():
            entry.history.setdefault(name, []).append(value)
        if report.value is None:
            return
        entry.value = report.value
        if not math.isfinite(report.value):
            self._tell_to_stop(entry, "failed")
        elif self._study.is_hopeless(entry.handle.number, report.epochs, report.value):
            self._tell_to_stop(entry, "pruned")

    def _tell_to_stop(self, entry: _Entry, verdict: State) -> None:
        entry.verdict = entry.verdict or verdict
        entry.handle.stop()

    def _end(self, entry: _Entry, event: Outcome | BaseException) -> None:
        """Close the books of a trial. One that had come to its end before it noticed that it was to stop is complete."""
        number = entry.handle.number
        state, error, keep = entry.verdict or "failed", None, None
        if isinstance(event, Outcome):
            entry.value, entry.epochs, entry.history, keep = event.value, event.epochs, event.history, event.keep
            state = "complete" if math.isfinite(event.value) else "failed"
        elif isinstance(event, EndSearch):
            assert event.__cause__ is not None
            raise event.__cause__
        elif not isinstance(event, Exception):
            raise event
        elif not isinstance(event, TrialStopped):
            state, error = "failed", event
        if state == "failed" and error is None:
            error = SearchError(f"the objective was {entry.value} after {entry.epochs} epochs.")
        del self._running[number]
        if error is not None and self._limits.on_failure == "raise":
            raise error
        self._study.tell(number, state, entry.value)
        trial = Trial(
            number=number,
            params=entry.handle.params,
            state=state,
            value=entry.value,
            epochs=entry.epochs,
            duration_s=time.monotonic() - entry.started_at,
            history=entry.history,
            error=_without_frames(error),
        )
        self.ended.append(trial)
        self._keep_best(trial, keep)
        best = best_first(tuple(self.ended), self._direction)[0]
        self._display.show(trial, best if best.state == "complete" else None)

    def _keep_best(self, trial: Trial, keep: Callable[[], KeptModel] | None) -> None:
        complete = tuple(other for other in self.ended if other.state == "complete")
        best = {other.number for other in best_first(complete, self._direction)[: self._limits.keep_models]}
        if keep is not None and trial.number in best:
            self.kept[trial.number] = keep()
        self.kept = {number: model for number, model in self.kept.items() if number in best}


def _work_of_trial(
    work: Callable[[RunningTrial], Outcome], handle: RunningTrial, events: queue.SimpleQueue[Any]
) -> None:
    try:
        events.put((handle.number, work(handle)))
    except BaseException as error:  # noqa: BLE001 - whatever it is: the user's thread waits for it
        events.put((handle.number, error))


def _without_frames(error: Exception | None) -> Exception | None:
    if error is not None:
        error.__cause__ = error.__context__ = None
        error.__traceback__ = None
    return error


def _nothing_found(trials: tuple[Trial, ...], limits: SearchLimits) -> SearchError:
    failed = [trial for trial in trials if trial.state == "failed"]
    if failed and len(failed) == len(trials):
        first = failed[0]
        return SearchError(
            f"all {len(trials)} trials of the search have failed. The first, with {first.params}: "
            f"{type(first.error).__name__}: {first.error}"
        )
    states = ", ".join(f"{sum(t.state == state for t in trials)} {state}" for state in ("pruned", "stopped", "failed"))
    return SearchError(
        f"no trial of the search was complete: of {len(trials)}, {states} (timeout_s={limits.timeout_s}). Give the search "
        "more time, or trials fewer epochs."
    )
