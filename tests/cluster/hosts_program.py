"""A driver for `test_hosts`: one fit by each backend, and what every rank saw of its place and of its network meanwhile.

    python hosts_program.py FOLDER      with FOLDER/wish.json: master, conf, num_ranks, backends

Leaves in FOLDER, for each backend whose fit succeeded, BACKEND.npz with the weights, and BACKEND-RANK.json for each rank.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

import keras
import numpy as np
from pyspark.sql import SparkSession

from allreduce_spark import SparkModel, Timeouts

STEPS = 12
generator = np.random.default_rng(5)
X = generator.normal(size=(101, 6)).astype("float32")
Y = X.sum(1, keepdims=True) + generator.normal(size=(101, 1)).astype("float32")


def compiled() -> keras.Model:
    """A model of which each step sends a megabyte."""
    keras.utils.set_random_seed(3)
    hidden = [keras.layers.Dense(500, "tanh") for _ in range(2)]
    model = keras.Sequential([keras.Input((6,)), *hidden, keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.05, momentum=0.9), "mse")
    return model


class Witness(keras.callbacks.Callback):
    """Writes down, on every rank, where it is and what its host has received meanwhile."""

    def __init__(self, path: str, backend: str) -> None:
        super().__init__()
        self.path, self.backend, self.before = path, backend, {}

    def on_train_begin(self, logs: Any = None) -> None:
        self.before = received_bytes()

    def on_train_end(self, logs: Any = None) -> None:
        received = {name: count - self.before[name] for name, count in received_bytes().items()}
        rank = os.environ["PMI_RANK"]
        seen = {
            "name": socket.gethostname(),
            "host": os.stat("/proc/self/ns/net").st_ino,
            "place": place(self.backend),
            "received": received,
        }
        Path(f"{self.path}-{rank}.json").write_text(json.dumps(seen))


def received_bytes() -> dict[str, int]:
    """How many bytes came in by each interface of this host, ever."""
    lines = Path("/proc/net/dev").read_text().splitlines()[2:]
    return {name.strip(): int(counts.split()[0]) for name, counts in (line.split(":", 1) for line in lines)}


def place(backend: str) -> dict[str, int]:
    """What the library that reduces takes for this rank's place within its host. All ranks must call."""
    if backend == "mpi":
        from mpi4py import MPI  # initialised by now

        within_host = MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED)
        return {"local_rank": within_host.rank, "local_size": within_host.size}
    import horovod.tensorflow as hvd

    node = re.fullmatch(r"node(\d+)", os.environ["HOROVOD_HOSTNAME"])
    assert node is not None
    return {"local_rank": hvd.local_rank(), "local_size": hvd.local_size(), "node_rank": int(node[1])}


def main(folder: Path) -> None:
    wish = json.loads((folder / "wish.json").read_text())
    builder = SparkSession.builder.master(wish["master"]).config("spark.ui.enabled", "false")
    for name, value in wish["conf"].items():
        builder = builder.config(name, value)
    builder.getOrCreate().sparkContext.setLogLevel("ERROR")
    for backend in wish["backends"]:
        model, path = compiled(), str(folder / backend)
        try:
            SparkModel(model, num_ranks=wish["num_ranks"], backend=backend, timeouts=Timeouts(slots_s=120.0)).fit(
                (X, Y), epochs=STEPS, batch_size=len(X), verbose=0, callbacks=[Witness(path, backend)], max_restarts=0
            )
        except Exception:
            traceback.print_exc()  # the next backend may do better
        else:
            np.savez(path, *model.get_weights())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
