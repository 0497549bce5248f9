"""Where the wall time of `SparkModel.fit` goes, from call to return, in a young Spark session and in a warm one.

The phases are those of the slower rank; they follow each other without gaps, so they add up to the whole:

    prepare          in fit(): check the cluster, pack the model, cut the data into blocks
    stage start      the barrier stage is submitted -> all agents have connected (cold: Python workers are started)
    spool            -> all shards are on disk; the ranks begin to import TensorFlow meanwhile
    import, load     -> the rest of that: TensorFlow is imported and the model loaded on all ranks
    communicator     -> MPI is open
    first step       -> the model is built and traced, the first step is done
    steady state     -> the last step is done
    result           -> the root has written its result
    teardown         -> the ranks have ended, the result has come to the driver, the Spark job is over
    take over        -> fit() returns

The times are read off the status pages that the ranks write anyway, every few milliseconds and from outside, so that
nothing is measured that a user would not have. Beside them stands what importing TensorFlow takes alone, and in two
processes at once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from table import print_table

from allreduce_spark.rendezvous.protocol import Phase
from allreduce_spark.rendezvous.status import StatusPage

NUM_RANKS = 2
ROWS, FEATURES, CLASSES = 20_000, 784, 10
POLL_S = 0.004
GOAL_S = 3.0

# What each phase ends with; see the table above.
PHASES = {
    "prepare": "submitted",
    "stage start": "connected",
    "spool": "spooled",
    "import, load": Phase.INIT.value,
    "communicator": Phase.FIRST_STEP.value,
    "first step": Phase.TRAIN.value,
    "steady state": Phase.RESULT.value,
    "result": Phase.TEARDOWN.value,
    "teardown": "stage ended",
    "take over": "returned",
}
UNTIL_FIRST_STEP = list(PHASES)[: list(PHASES).index("first step") + 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sessions", type=int, default=3, help="how many Spark sessions, of two fits each")
    parser.add_argument("--one-session", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one_session:
        print(json.dumps(two_fits()))
        return
    fits: list[list[dict[str, float]]] = []
    imports: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(arguments.sessions):
        for processes, seconds in imports.items():
            seconds.append(time_import(processes))
        command = [sys.executable, __file__, "--one-session"]
        ended = subprocess.run(command, capture_output=True, text=True)
        if ended.returncode:
            sys.exit(f"a session failed:\n{ended.stdout}{ended.stderr}")
        fits.append(json.loads(ended.stdout.splitlines()[-1]))
    show(fits, imports)


# In the benchmark's own process.


def time_import(processes: int) -> float:
    """Seconds that `processes` Pythons take at once to import TensorFlow and Keras and to end."""
    begin = time.monotonic()
    command = [sys.executable, "-c", "import tensorflow, keras"]
    running = [subprocess.Popen(command, stderr=subprocess.DEVNULL) for _ in range(processes)]
    for process in running:
        process.wait()
    return time.monotonic() - begin


def show(fits: list[list[dict[str, float]]], imports: dict[int, list[float]]) -> None:
    names = ["first fit", "second fit"]
    print(f"\nSparkModel.fit on local[{NUM_RANKS}], {ROWS:,} rows, 1 epoch; seconds, medians of {len(fits)} sessions")
    table = []
    for row, phases in [(phase, [phase]) for phase in PHASES] + [
        ("fit() -> first step", UNTIL_FIRST_STEP),
        ("all", list(PHASES)),
    ]:
        cells = [row]
        for index in range(len(names)):
            seconds = [sum(session[index][phase] for phase in phases) for session in fits]
            cells += [f"{statistics.median(seconds):.2f}", f"{min(seconds):.2f} - {max(seconds):.2f}"]
        table.append(cells)
    print_table(["phase", names[0], "range", names[1], "range"], table)
    alone, at_once = (statistics.median(seconds) for seconds in imports.values())
    print(f"import tensorflow, keras: {alone:.2f} s alone, {at_once:.2f} s in two processes at once")
    for index, name in enumerate(names):
        # Per session: a slow minute is slow for both.
        over = [
            sum(session[index][phase] for phase in UNTIL_FIRST_STEP) - seconds
            for session, seconds in zip(fits, imports[NUM_RANKS], strict=True)
        ]
        print(
            f"{name}: the first step is done {statistics.median(over):.2f} s after the time of two imports at once "
            f"({statistics.median(over) + at_once - alone:.2f} s after that of one); goal: at most {GOAL_S:g} s"
        )


# In a session of its own.


def two_fits() -> list[dict[str, float]]:
    """Start Spark, fit twice; the seconds of each phase of both fits."""
    from pyspark.sql import SparkSession

    random = np.random.default_rng(0)
    x = random.standard_normal((ROWS, FEATURES), np.float32)
    y = random.integers(0, CLASSES, ROWS)
    with tempfile.TemporaryDirectory(prefix="allreduce_spark-benchmark-") as folder:
        os.environ["SPARK_LOCAL_DIRS"] = folder  # where agents make their scratch folders
        builder = SparkSession.builder.master(f"local[{NUM_RANKS}]").config("spark.ui.enabled", "false")
        spark = builder.getOrCreate()
        try:
            return [timed_fit(Path(folder), (x, y)) for _ in range(2)]
        finally:
            spark.stop()


def timed_fit(folder: Path, data: tuple[np.ndarray, np.ndarray]) -> dict[str, float]:
    import keras

    from allreduce_spark import SparkModel

    hidden = [keras.layers.Dense(512, activation="relu") for _ in range(2)]
    model = keras.Sequential([keras.Input((FEATURES,)), *hidden, keras.layers.Dense(CLASSES, activation="softmax")])
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    spark_model = SparkModel(model, num_ranks=NUM_RANKS)

    watch = Watch(folder)
    begin = time.monotonic()
    with watch, noted_stage(watch.times):
        spark_model.fit(data, batch_size=64, verbose=0)
        watch.times["returned"] = time.monotonic()
    seconds, before = {}, begin
    for phase, end in PHASES.items():
        # The shards may be complete before the slower agent is seen to have connected, say: no phase is negative.
        now = max(before, watch.times[end])
        seconds[phase], before = now - before, now
    return seconds


@contextlib.contextmanager
def noted_stage(times: dict[str, float]) -> Iterator[None]:
    """Note when fit() submits its barrier stage and when it has that behind it, which nothing outside can see."""
    from allreduce_spark.spark.stage import run_stage

    def noted(*arguments: Any) -> Any:
        times["submitted"] = time.monotonic()
        try:
            return run_stage(*arguments)
        finally:
            times["stage ended"] = time.monotonic()

    with mock.patch("allreduce_spark.spark.ranks.run_stage", noted):
        yield


class Watch:
    """Notes, in a thread, when the slowest rank was first seen to have come so far.

    Attributes:
        times: From the name of an event (see `PHASES`) to its time, by `time.monotonic`.
    """

    def __init__(self, folder: Path) -> None:
        self.times: dict[str, float] = {}
        self._folder = folder
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._pages: dict[Path, StatusPage] = {}

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(POLL_S):
            if len(self._pages) < NUM_RANKS:
                self._look_for_pages()
            else:
                self._look_at_pages()

    def _look_for_pages(self) -> None:
        # Agents make the page right after they have connected, just before they start the rank.
        for path in self._folder.glob("blockmgr-*/allreduce_spark-*/status"):
            if path not in self._pages and path.stat().st_size:
                self._pages[path] = StatusPage(path)
        if len(self._pages) == NUM_RANKS:
            self._note("connected")

    def _look_at_pages(self) -> None:
        if all(any(page.parent.glob("train-*.arrow")) for page in self._pages):
            self._note("spooled")
        order = list(Phase)
        behind = min(order.index(page.read()[0]) for page in self._pages.values())
        for phase in order[: behind + 1]:
            self._note(phase.value)

    def _note(self, event: str) -> None:
        self.times.setdefault(event, time.monotonic())


if __name__ == "__main__":
    main()
