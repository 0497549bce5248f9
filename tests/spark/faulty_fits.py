"""A fit that would end otherwise if any of its state were lost, and faults that befall its ranks at a chosen place.

Also a program, for faults that a driver does not survive: `python faulty_fits.py '{"master": ..., ...}'`, see `main`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cloudpickle
import keras
import numpy as np
from pyspark import cloudpickle as spark_cloudpickle

from allreduce_spark import Checkpoint, SparkModel, Timeouts

for pickler in (cloudpickle, spark_cloudpickle):
    pickler.register_pickle_by_value(sys.modules[__name__])

generator = np.random.default_rng(5)
X = generator.normal(size=(93, 6)).astype("float32")  # shards of 47 and 46 rows, of which some are held out
Y = (X.sum(1, keepdims=True) + generator.normal(size=(93, 1))).astype("float32")
SETTINGS = {"epochs": 9, "batch_size": 7, "validation_split": 0.1, "seed": 11, "verbose": 0}  # six steps an epoch


def ancestor(generations: int) -> int:
    pid = os.getpid()
    for _ in range(generations):
        pid = int(Path(f"/proc/{pid}/status").read_text().split("PPid:")[1].split()[0])
    return pid


def kill_rank() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop_rank() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def kill_warm_process() -> None:
    os.kill(ancestor(1), signal.SIGKILL)
    signal.pause()  # The kernel kills this rank as well.


def kill_agent() -> None:
    os.kill(ancestor(2), signal.SIGKILL)
    signal.pause()


def kill_agent_once_saved(store: Path, epoch: int) -> None:
    """When a checkpoint of this epoch is complete: the other rank waits for this one's next step meanwhile."""
    while not any(store.glob(f"{epoch:06d}-*/manifest.json")):
        time.sleep(0.01)
    kill_agent()


def stop_agent() -> None:
    os.kill(ancestor(2), signal.SIGSTOP)
    signal.pause()


def kill_executor() -> None:
    os.kill(ancestor(4), signal.SIGKILL)  # Between them are the agent, and Spark's own daemon.
    signal.pause()


def wait_for_the_end_of_the_machine(folder: Path) -> None:
    (folder / "machine").write_text(socket.gethostname())
    signal.pause()


def exit_quietly() -> None:
    os._exit(0)


def raise_error() -> None:
    raise ConnectionError("the license server did not answer")


def limit_file_size() -> None:
    """For this process the disk is full."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))


def replace_by_file(folder: Path) -> None:
    for number in itertools.count():
        folder.rename(folder.with_name(f"{folder.name}-{number}"))
        with contextlib.suppress(FileExistsError):  # Somebody is just writing there, and has made the folder again.
            folder.touch(exist_ok=False)
            return


@dataclass(frozen=True)
class Fault:
    """What befalls a rank.

    Attributes:
        hook: When: the method of a callback, without its "on_".
        rank: Whom.
        deed: What is done, in the process of the rank.
        epoch, step: When, for hooks that come more than once.
        again: Whether it comes each time, and not only the first time.
    """

    hook: str
    rank: int
    deed: Callable[[], object]
    epoch: int | None = None
    step: int | None = None
    again: bool = False


class Faults(keras.callbacks.Callback):
    """Does to its rank what is planned, and leaves a file in `folder` for each fault that has come."""

    def __init__(self, folder: Path, *faults: Fault, pause_s: float = 0.0) -> None:
        super().__init__()
        self.folder, self.faults, self.pause_s, self.epoch = folder, faults, pause_s, 0

    def meet(self, hook: str, epoch: int | None = None, step: int | None = None) -> None:
        rank = int(os.environ["PMI_RANK"])
        for index, fault in enumerate(self.faults):
            mark = self.folder / f"fault-{index}"
            is_due = (fault.hook, fault.rank, fault.epoch, fault.step) == (hook, rank, epoch, step)
            if is_due and (fault.again or not mark.exists()):
                mark.touch()
                fault.deed()

    def on_train_begin(self, logs: Any = None) -> None:
        self.meet("train_begin")

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.epoch = epoch

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        time.sleep(self.pause_s)
        if os.environ["PMI_RANK"] == "0":
            with open(self.folder / "steps", "a") as file:
                file.write(f"{time.time()}\n")
        self.meet("train_batch_end", self.epoch, batch)

    def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
        self.meet("test_batch_end", self.epoch, batch)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.meet("epoch_end", epoch)

    def on_train_end(self, logs: Any = None) -> None:
        self.meet("train_end")


def steps_in(folder: Path) -> int:
    """How many steps the root has taken."""
    file = folder / "steps"
    return len(file.read_text().splitlines()) if file.exists() else 0


@dataclass(frozen=True)
class Outcome:
    """What a fit ends with."""

    weights: list[np.ndarray]
    optimizer: list[np.ndarray]
    history: dict[str, list[float]]

    def check_is(self, other: Outcome) -> None:
        """Both are the same, to the bit."""
        assert self.history == other.history
        for one, two in zip(self.weights + self.optimizer, other.weights + other.optimizer, strict=True):
            np.testing.assert_array_equal(one, two)

    def check_is_close_to(self, other: Outcome) -> None:
        """Both are the same but for the order in which numbers were added."""
        for name, values in self.history.items():
            np.testing.assert_allclose(values, other.history[name], rtol=1e-4, err_msg=name)
        for one, two in zip(self.weights, other.weights, strict=True):
            np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5)

    def write(self, path: Path) -> None:
        arrays = {f"{name}-{i}": a for name in ("weights", "optimizer") for i, a in enumerate(getattr(self, name))}
        np.savez(path, history=json.dumps(self.history), **arrays)

    @classmethod
    def read(cls, path: Path) -> Outcome:
        with np.load(path) as file:
            lists = [[file[key] for key in file if key.startswith(name)] for name in ("weights", "optimizer")]
            return cls(*lists, json.loads(str(file["history"])))


def compiled(dropout: float = 0.3, units: int = 16) -> keras.Model:
    keras.utils.set_random_seed(3)
    layers = [keras.layers.Dense(units, "relu"), keras.layers.Dropout(dropout), keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input((6,)), *layers])
    model.compile(keras.optimizers.Adam(0.02), "mse", metrics=["mae"])
    return model


def fit(
    *faults: Fault,
    folder: Path | None = None,
    timeouts: Timeouts | None = None,
    pause_s: float = 0.0,
    model: keras.Model | None = None,
    backend: str = "mpi",
    **arguments: Any,
) -> Outcome:
    """Fit on two ranks.

    Args:
        faults: All of them must come.
        folder: Where they leave their marks.
        pause_s: After each step.
        backend: What the ranks reduce by.
    """
    model = model or compiled()
    stopping = keras.callbacks.EarlyStopping("val_loss", min_delta=0.5, patience=1, restore_best_weights=True)
    planned = [Faults(folder, *faults, pause_s=pause_s)] if folder else []
    settings = {**SETTINGS, "checkpoint": Checkpoint(every_steps=2), "callbacks": [stopping, *planned], **arguments}
    history = SparkModel(model, num_ranks=2, backend=backend, timeouts=timeouts).fit((X, Y), **settings)
    assert folder is None or len(list(folder.glob("fault-*"))) == len(faults), "not every fault has come"
    return Outcome(model.get_weights(), [each.numpy() for each in model.optimizer.variables], history.history)


def main() -> None:
    """Fit in a driver of its own, which may be killed and started again.

    The argument is JSON: `master`, or `remote` for a Connect server; `store`; `folder`, for marks and the outcome; `fault`,
    which comes in the midst of the third epoch: "driver", "executor", "machine" (its name is then in the file `machine`; who
    reads it is to kill it) or null; `dropout` and `pause_s`.
    """
    from pyspark.sql import SparkSession

    wish = json.loads(sys.argv[1])
    folder = Path(wish["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    deeds = {
        "driver": partial(os.kill, os.getpid(), signal.SIGKILL),
        "executor": kill_executor,
        "machine": partial(wait_for_the_end_of_the_machine, folder),
    }
    faults = [Fault("train_batch_end", 1, deeds[wish["fault"]], 2, 2)] if wish.get("fault") else []
    if "remote" in wish:
        SparkSession.builder.remote(wish["remote"]).getOrCreate()
    else:
        session = SparkSession.builder.master(wish["master"]).config("spark.ui.enabled", "false").getOrCreate()
        session.sparkContext.setLogLevel("ERROR")
    outcome = fit(
        *faults,
        folder=folder,
        pause_s=wish.get("pause_s", 0.0),
        model=compiled(wish.get("dropout", 0.3)),
        checkpoint=Checkpoint(wish["store"], every_steps=2),
        resume="auto",
    )
    outcome.write(folder / "outcome.npz")
    times = [float(line) for line in (folder / "steps").read_text().splitlines()]
    longest = max(after - before for before, after in itertools.pairwise(times))
    sys.stdout.write(f"steps taken: {len(times)}; the longest pause between two: {longest:.1f} s\nthe work is done\n")


if __name__ == "__main__":
    main()
