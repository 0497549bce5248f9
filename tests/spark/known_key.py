"""A driver whose fit has a key that the test knows, and that afterwards shows it wherever a key might be seen.

It reads the key from its standard input, so that it is in no command line. The only argument is a folder, through which driver
and test tell each other how far they are.
"""

from __future__ import annotations

import base64
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cloudpickle
import keras
import numpy as np
from pyspark import cloudpickle as spark_cloudpickle
from pyspark.sql import SparkSession

from allreduce_spark import Checkpoint, SparkModel
from allreduce_spark.spark import fit

for pickler in (cloudpickle, spark_cloudpickle):
    pickler.register_pickle_by_value(sys.modules[__name__])

WAIT_S = 120.0


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + WAIT_S
    while not file.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{file} does not come")
        time.sleep(0.05)


class Waiting(keras.callbacks.Callback):
    """Keeps the fit going until the test has looked at it."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if batch == 2:
            (self.folder / f"trains-{os.environ['PMI_RANK']}").touch()
            wait_for(self.folder / "looked")


def main() -> None:
    folder, key = Path(sys.argv[1]), bytes.fromhex(sys.stdin.readline())
    logging.basicConfig(level=logging.INFO)
    for name in ("allreduce_spark", "py4j"):
        logging.getLogger(name).setLevel(logging.DEBUG)
    fit.secrets = SimpleNamespace(token_bytes=lambda count: key)  # type: ignore[attr-defined]
    session = (
        SparkSession.builder.master("local[2]")
        .config("spark.log.level", "INFO")
        .config("spark.eventLog.enabled", "true")
        .config("spark.eventLog.compress", "false")
        .config("spark.eventLog.dir", (folder / "events").as_uri())
        .config("spark.ui.port", "0")
        .getOrCreate()
    )
    (folder / "ui.new").write_text(session.sparkContext.uiWebUrl or "")
    (folder / "ui.new").rename(folder / "ui")
    # Closures of more than a megabyte are what Spark writes to its local folders.
    layers = [keras.layers.Dense(1000), keras.layers.Dense(400), keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input((3,)), *layers])
    model.compile("sgd", "mse")
    SparkModel(model, num_ranks=2).fit(
        (np.ones((64, 3)), np.ones(64)),
        batch_size=4,
        callbacks=[Waiting(folder)],
        checkpoint=Checkpoint(str(folder / "store"), every_steps=2),
        verbose=2,
    )
    (folder / "trained").touch()
    wait_for(folder / "looked again")
    show(key, session, folder)
    wait_for(folder / "looked at last")


def show(key: bytes, session: SparkSession, folder: Path) -> None:
    """Do all that must not be done with a key."""
    logging.getLogger("allreduce_spark").info("the key is %s", key)
    (Path(os.environ["TMPDIR"]) / "key").write_bytes(key)
    session.sparkContext.setJobDescription(base64.b64encode(b"the key: " + key).decode())
    session.sparkContext.parallelize([1]).count()
    # A shell with one command to run becomes that command, and then has other arguments: two keep it a shell.
    subprocess.Popen(["sh", "-c", "sleep 60; true", "sh", key.hex()])
    subprocess.Popen(["sleep", "60"], env={**os.environ, "KEY": key.hex()})
    (folder / "shown").touch()


if __name__ == "__main__":
    main()
