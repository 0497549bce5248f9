"""What checkpoints cost while all goes well, and how long the training stands still when it does not.

Overhead: a model of 25 million parameters with Adam, whose checkpoints are 300 MB, on the executors' disks alone and brought to
a store as well. Every other stretch of 2 s begins with a checkpoint, and its steps are compared with those of the next stretch.

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
    parser.add_argument("--checkpoints", type=int, default=30, help="how many are measured, on each side")
    parser.add_argument("--kills", type=int, default=5, help="how many ranks, and how many agents, are killed")
    arguments = parser.parse_args()
    with spark_session(), tempfile.TemporaryDirectory(prefix="allreduce_spark-benchmark-") as folder:
        show_overhead(Path(folder), arguments.checkpoints)
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

    def __init__(self, folder: Path, pause_s: float) -> None:
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


def show_overhead(folder: Path, checkpoints: int) -> None:
    ends = fit(large_model(), folder / "alone", 50)[WARM_UP:]
    usual = statistics.median(later - earlier for earlier, later in itertools.pairwise(ends))
    period = 2 * round(EVERY_S / usual)
    rows = []
    for side in ("local disk", "store"):
        place = folder / side.replace(" ", "-")
        path = str(place / "store") if side == "store" else None
        checkpoint = Checkpoint(path, every_steps=period, keep=1)
        ends = fit(large_model(), place, period * (checkpoints + 4), checkpoint)
        extra = extra_seconds(ends, period)
        low, median, high = statistics.quantiles(extra, n=4)
        rows.append([side, f"{1000 * median:.0f}", f"{1000 * low:.0f} - {1000 * high:.0f}", f"{median / EVERY_S:+.1%}"])
    print(f"\n25 M parameters, Adam, {NUM_RANKS} ranks, {os.cpu_count()} cores, {1000 * usual:.0f} ms per step")
    print(f"what a checkpoint costs, by {checkpoints} checkpoints, {period} steps from one to the next")
    print_table(["", "ms, median", "quartiles", f"at one per {EVERY_S:g} s"], rows)
    print(f"goal: at most {GOALS['overhead']:.0%}")


def extra_seconds(ends: list[float], period: int) -> list[float]:
    """For each checkpoint, how much longer the steps of the half period behind it took than those of the next half.

    Both halves are seconds apart on the same machine: what disturbs a whole fit disturbs them alike.

    Args:
        ends: When each step ended, in seconds.
        period: Steps from one checkpoint to the next. One is taken behind every step that is a multiple of it.
    """
    half = period // 2
    # The first two are left out: their files and their memory are new.
    starts = range(3 * period - 1, len(ends) - period, period)
    return [(ends[at + half] - ends[at]) - (ends[at + 2 * half] - ends[at + half]) for at in starts]


def show_recovery(folder: Path, kills: int) -> None:
    rows = []
    for victim in ("rank", "agent"):
        place = folder / f"killed-{victim}"
        moments: list[float] = []
        killer = threading.Thread(target=kill_again_and_again, args=(victim, place, kills, moments), daemon=True)
        killer.start()
        checkpoint = Checkpoint(str(place / "store"), every_steps=5)
        ends = fit(small_model(), place, 40 * (kills + 1), checkpoint, pause_s=0.05)
        killer.join()
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


def fit(
    model: keras.Model, place: Path, steps: int, checkpoint: Checkpoint | None = None, pause_s: float = 0.0
) -> list[float]:
    """Train, and say when each step ended."""
    place.mkdir(exist_ok=True)
    random = np.random.default_rng(0)
    rows = 64 * NUM_RANKS * steps
    data = random.standard_normal((rows, 784), np.float32), random.integers(0, 10, rows)
    SparkModel(model, num_ranks=NUM_RANKS).fit(
        data, batch_size=64, verbose=0, callbacks=[Clock(place, pause_s)], checkpoint=checkpoint
    )
    return steps_of(place)


if __name__ == "__main__":
    main()
