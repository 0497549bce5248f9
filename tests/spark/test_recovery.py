"""Ranks, agents and processes between them die at every point of a fit, and it ends with the bits of one that was left alone."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cloudpickle
import keras
import numpy as np
import pytest
from pyspark import cloudpickle as spark_cloudpickle
from pyspark.sql import SparkSession

from allreduce_spark import Checkpoint, SparkModel, Timeouts
from allreduce_spark.checkpoint.store import Store
from allreduce_spark.errors import RankFailedError

pytestmark = pytest.mark.spark

for pickler in (cloudpickle, spark_cloudpickle):
    pickler.register_pickle_by_value(sys.modules[__name__])

generator = np.random.default_rng(5)
X = generator.normal(size=(93, 6)).astype("float32")  # shards of 47 and 46 rows, of which 5 and 5 are held out
Y = (X.sum(1, keepdims=True) + generator.normal(size=(93, 1))).astype("float32")
EPOCHS, STEPS = 9, 6  # EarlyStopping ends the training before


def kill_rank() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop_rank() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def kill_warm_process() -> None:
    os.kill(os.getppid(), signal.SIGKILL)
    signal.pause()  # the kernel kills this rank as well


def kill_agent() -> None:
    status = Path(f"/proc/{os.getppid()}/status").read_text()
    os.kill(int(status.split("PPid:")[1].split()[0]), signal.SIGKILL)
    signal.pause()


def exit_quietly() -> None:
    os._exit(0)


def raise_error() -> None:
    raise ConnectionError("the license server did not answer")


@dataclass(frozen=True)
class Fault:
    """What befalls a rank, once.

    Attributes:
        hook: Of Keras's callbacks.
        rank: Whom.
        deed: What is done, in the process of the rank.
        epoch, step: When, for hooks that come more than once.
    """

    hook: str
    rank: int
    deed: Callable[[], None]
    epoch: int | None = None
    step: int | None = None


class Faults(keras.callbacks.Callback):
    """Does to its rank what is planned, and leaves a file in `folder`, so that each fault comes once."""

    def __init__(self, folder: Path, *faults: Fault) -> None:
        super().__init__()
        self.folder, self.faults, self.epoch = folder, faults, 0

    def meet(self, hook: str, epoch: int | None = None, step: int | None = None) -> None:
        rank = int(os.environ["PMI_RANK"])
        for index, fault in enumerate(self.faults):
            mark = self.folder / f"fault-{index}"
            if (fault.hook, fault.rank, fault.epoch, fault.step) == (hook, rank, epoch, step) and not mark.exists():
                mark.touch()
                fault.deed()

    def on_train_begin(self, logs: Any = None) -> None:
        self.meet("train_begin")

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.epoch = epoch

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.meet("train_batch", self.epoch, batch)

    def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
        self.meet("test_batch", self.epoch, batch)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.meet("epoch_end", epoch)

    def on_train_end(self, logs: Any = None) -> None:
        self.meet("train_end")

    def all_have_come(self) -> bool:
        return len(list(self.folder.glob("fault-*"))) == len(self.faults)


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


def fit(*faults: Fault, folder: Path | None = None, timeouts: Timeouts | None = None, **arguments: Any) -> Outcome:
    """A fit that would not be the same if any of its state were lost."""
    keras.utils.set_random_seed(3)
    model = keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(16, "relu"), keras.layers.Dropout(0.3), keras.layers.Dense(1)]
    )
    model.compile(keras.optimizers.Adam(0.02), "mse", metrics=["mae"])
    stopping = keras.callbacks.EarlyStopping("val_loss", min_delta=0.5, patience=1, restore_best_weights=True)
    planned = [Faults(folder, *faults)] if folder else []
    settings = {"epochs": EPOCHS, "batch_size": 7, "validation_split": 0.1, "seed": 11, "verbose": 0}
    history = SparkModel(model, num_ranks=2, timeouts=timeouts).fit(
        (X, Y),
        callbacks=[stopping, *planned],
        **{**settings, "checkpoint": Checkpoint(every_steps=2), **arguments},
    )
    assert all(each.all_have_come() for each in planned)
    return Outcome(
        model.get_weights(), [each.numpy() for each in model.optimizer.variables], history.history
    )


@pytest.fixture(scope="module")
def undisturbed(spark: SparkSession) -> Outcome:
    outcome = fit(max_restarts=0)
    assert 5 <= len(outcome.history["loss"]) < EPOCHS, outcome.history["val_loss"]
    return outcome


def test_a_fit_whose_ranks_die_again_and_again_ends_with_the_same_bits(
    undisturbed: Outcome, nothing_is_left: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    faults = (
        Fault("train_begin", 1, kill_rank),
        Fault("train_batch", 0, kill_rank, 0, 3),
        Fault("test_batch", 1, kill_rank, 0, 0),
        Fault("train_batch", 0, kill_rank, 1, 4),  # both at once
        Fault("train_batch", 1, kill_rank, 1, 4),
        Fault("train_batch", 0, kill_warm_process, 2, 2),
        Fault("epoch_end", 1, exit_quietly, 2),
        Fault("train_batch", 1, raise_error, 3, 0),
        Fault("train_end", 0, kill_rank),
    )
    with caplog.at_level(logging.WARNING, "allreduce_spark"):
        fit(*faults, folder=tmp_path).check_is(undisturbed)
    assert "rank 0 on" in caplog.text
    assert "failed in phase 'train' at epoch 0, step 3: the rank process was killed by SIGKILL" in caplog.text
    assert "the license server did not answer" in caplog.text
