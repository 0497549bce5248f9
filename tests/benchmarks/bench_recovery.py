"""What checkpoints cost while all goes well, and how long the training stands still when it does not.

Overhead: mean seconds per optimizer step, by turns without checkpoints, with one every 2 s on the executors' disks, and with
one every 2 s that is brought to a store. A step of 25 million parameters with Adam has 300 MB of state.

Recovery: seconds from `kill -9` of a rank, or of an agent (a Python worker of Spark), to the end of the next optimizer step.

Times are those at which rank 0 ends its steps, by a callback that writes them to a file; both sides have it.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
from table import print_table

from allreduce_spark import Checkpoint, SparkModel

NUM_RANKS = 2
EVERY_S = 2.0
WARM_UP = 10  # steps
GOALS = {"overhead": 0.03, "rank": 3.0, "agent": 15.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="how often the sides take turns")
    parser.add_argument("--steps", type=int, default=120, help="optimizer steps of each fit whose overhead is measured")
    parser.add_argument("--kills", type=int, default=5, help="how many ranks, and how many agents, are killed")
    arguments = parser.parse_args()
    with spark_session(), tempfile.TemporaryDirectory(prefix="allreduce_spark-benchmark-") as folder:
        show_overhead(Path(folder), arguments.rounds, arguments.steps)
        show_recovery(Path(folder), arguments.kills)


@contextlib.contextmanager
def spark_session() -> Iterator[None]:
    from pyspark.sql import SparkSession

    spark = SparkSession.builder.master(f"local[{NUM_RANKS}]").config("spark.ui.enabled", "false").getOrCreate()
    spark.sparkContext.setLogLevel("OFF")  # it prints a page for each worker that is killed
    try:
        yield
    finally:
        spark.stop()


class Clock(keras.callbacks.Callback):
    """Writes down when each step of rank 0 ends, and which process each rank is."""

    def __init__(self, folder: Path, pause_s: float = 0.0) -> None:
        super().__init__()
        self.folder, self.pause_s = folder, pause_s

    def on_train_begin(self, logs: Any = None) -> None:
        (self.folder / f"rank-{os.environ['PMI_RANK']}").write_text(str(os.getpid()))

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        time.sleep(self.pause_s)
        if os.environ["PMI_RANK"] == "0":
            with open(self.folder / "steps", "a") as file:
                file.write(f"{time.time()}\n")


def steps_of(folder: Path) -> list[float]:
    path = folder / "steps"
    return [float(line) for line in path.read_text().splitlines()] if path.exists() else []


def show_overhead(folder: Path, rounds: int, steps: int) -> None:
    sides: dict[str, dict[str, Any]] = {"without": {"max_restarts": 0}, "local disk": {}, "store": {}}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(rounds):
        for side, arguments in sides.items():
            place = folder / f"{side}-{number}"
            place.mkdir()
            if side != "without":
                path = str(place / "store") if side == "store" else None
                arguments = {"checkpoint": Checkpoint(path, every_s=EVERY_S, keep=1)}
            fit(large_model(), place, steps, Clock(place), **arguments)
            ends = steps_of(place)[WARM_UP:]
            seconds[side].append((ends[-1] - ends[0]) / (len(ends) - 1))
    print(
        f"\n25 M parameters, Adam, {NUM_RANKS} ranks, {os.cpu_count()} cores, medians of {rounds} fits of {steps} steps"
    )
    usual = statistics.median(seconds["without"])
    rows = []
    for side, means in seconds.items():
        median = statistics.median(means)
        rows.append([side, f"{1000 * median:.1f}", f"{1000 * min(means):.1f} - {1000 * max(means):.1f}"])
        rows[-1].append(f"{median / usual - 1:+.1%}")
    print_table([f"checkpoint every {EVERY_S:g} s", "ms per step", "range", "overhead"], rows)
    print(f"goal: at most {GOALS['overhead']:.0%}")


def show_recovery(folder: Path, kills: int) -> None:
    rows = []
    for victim in ("rank", "agent"):
        place = folder / f"killed-{victim}"
        place.mkdir()
        moments: list[float] = []
        killer = threading.Thread(target=kill_again_and_again, args=(victim, place, kills, moments), daemon=True)
        killer.start()
        checkpoint = Checkpoint(str(place / "store"), every_steps=5)
        fit(small_model(), place, 40 * (kills + 1), Clock(place, 0.05), checkpoint=checkpoint)
        killer.join()
        ends = steps_of(place)
        waits = [standstill(moment, ends) for moment in moments]
        rows.append([f"kill -9 of {'a ' if victim == 'rank' else 'an '}{victim}", f"{statistics.median(waits):.2f}"])
        rows[-1] += [f"{min(waits):.2f} - {max(waits):.2f}", f"{GOALS[victim]:g}"]
    print(f"\nseconds to the end of the next step, medians of {kills} kills")
    print_table(["", "median", "range", "goal"], rows)


def standstill(moment: float, ends: list[float]) -> float:
    """Seconds from a kill to the end of the step behind the gap; one or two more may end before the others notice."""
    after = [moment, *(end for end in ends if end > moment)][:15]
    gaps = [later - earlier for earlier, later in itertools.pairwise(after)]
    return after[gaps.index(max(gaps)) + 1] - moment


def kill_again_and_again(victim: str, place: Path, kills: int, moments: list[float]) -> None:
    for number in range(kills):
        seen = len(steps_of(place))
        while len(steps_of(place)) < seen + 20:
            time.sleep(0.01)
        pid = int((place / f"rank-{number % NUM_RANKS}").read_text())
        if victim == "agent":
            pid = parent_of(parent_of(pid))  # between them is the warm process
        moments.append(time.time())
        os.kill(pid, signal.SIGKILL)


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/status").read_text().split("PPid:")[1].split()[0])


def large_model() -> keras.Model:
    hidden = [keras.layers.Dense(units, activation="relu") for units in (4096, 4096, 1024)]
    model = keras.Sequential([keras.Input((784,)), *hidden, keras.layers.Dense(10, activation="softmax")])
    model.compile("adam", "sparse_categorical_crossentropy")
    return model


def small_model() -> keras.Model:
    model = keras.Sequential([keras.Input((784,)), keras.layers.Dense(64, activation="relu"), keras.layers.Dense(10)])
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def fit(model: keras.Model, place: Path, steps: int, clock: Clock, **arguments: Any) -> None:
    random = np.random.default_rng(0)
    rows = 64 * NUM_RANKS * steps
    data = random.standard_normal((rows, 784), np.float32), random.integers(0, 10, rows)
    SparkModel(model, num_ranks=NUM_RANKS).fit(data, batch_size=64, verbose=0, callbacks=[clock], **arguments)


if __name__ == "__main__":
    main()
