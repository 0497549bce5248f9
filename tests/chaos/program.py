"""A user's script, as chaos finds it: two ranks, Adam, dropout, shuffling, validation, and checkpoints every few steps."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import keras
import numpy as np
from pyspark.sql import SparkSession
from shape import BATCH, EPOCHS, EVERY_STEPS, KEEP, RANKS, ROWS, STEPS

from allreduce_spark import Checkpoint, SparkModel, Timeouts


class Diary(keras.callbacks.Callback):
    """Each rank writes down when it has taken which step, and does as the trial asks."""

    def __init__(self, folder: str, pace_s: float) -> None:
        super().__init__()
        self.folder, self.pace_s = Path(folder), pace_s
        self.epoch, self.memory = 0, []

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.epoch = epoch

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        rank, size = os.environ["PMI_RANK"], os.environ["PMI_SIZE"]
        with open(self.folder / f"steps-{rank}", "a") as file:
            file.write(f"{time.monotonic()} {self.epoch * STEPS + batch} {os.getpid()} {size}\n")
        if (self.folder / f"allocate-{os.getpid()}").exists():
            self.memory.append(np.ones(1 << 27))  # a gigabyte, touched
        time.sleep(self.pace_s)

    def on_test_batch_begin(self, batch: int, logs: Any = None) -> None:
        sys.modules["sitecustomize"].hold("validate", int(os.environ["PMI_RANK"]))


def make_model(elastic: bool) -> keras.Model:
    """Not built yet, so that ranks must agree about its weights. Where their number may change, no step draws anything."""
    keras.utils.set_random_seed(1)
    layers = [keras.layers.Dense(64, "relu"), keras.layers.Dropout(0.0 if elastic else 0.3), keras.layers.Dense(1)]
    model = keras.Sequential(layers)
    model.compile("sgd" if elastic else "adam", "mse", metrics=["mae"])
    return model


def main(folder: Path) -> None:
    """Train as `settings.json` in the folder says; leave `weights.npz` there."""
    settings = json.loads((folder / "settings.json").read_text())
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)d %(name)s %(levelname)s %(message)s")
    logging.getLogger("py4j").setLevel(logging.WARNING)
    builder = SparkSession.builder.master(settings["master"]).config("spark.ui.enabled", "false")
    for name, value in settings["conf"].items():
        builder = builder.config(name, value)
    builder.getOrCreate().sparkContext.setLogLevel("ERROR")
    random = np.random.default_rng(0)
    x = random.normal(size=(ROWS, 32)).astype("float32")
    y = x.sum(1, keepdims=True)
    model = make_model(settings["elastic"])
    timeouts = Timeouts(**settings["timeouts"])
    history = SparkModel(model, num_ranks=RANKS, timeouts=timeouts, backend=settings["backend"]).fit(
        (x, y),
        epochs=EPOCHS,
        batch_size=BATCH,
        validation_data=(x[:64], y[:64]),
        verbose=0,
        seed=7,
        callbacks=[Diary(str(folder), settings["pace_s"])],
        checkpoint=Checkpoint(str(folder / "store"), every_steps=EVERY_STEPS, keep=KEEP),
        resume=settings["resume"],
    )
    (folder / "history.json").write_text(json.dumps(history.history))
    np.savez(folder / "weights.npz", *model.get_weights())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
