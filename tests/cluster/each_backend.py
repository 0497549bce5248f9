"""A user's script: the same small fit by each of the backends that are named; writes the weights to FOLDER/BACKEND.npz.

python each_backend.py FOLDER MASTER BACKEND...                MASTER is "submitted" under spark-submit
"""

from __future__ import annotations

import sys
from pathlib import Path

import keras
import numpy as np
from pyspark.sql import SparkSession

from allreduce_spark import SparkModel


def weights_after_fit(backend: str) -> list[np.ndarray]:
    """On two ranks with 17 and 16 rows each."""
    random = np.random.default_rng(0)
    x = random.normal(size=(33, 4)).astype("float32")
    y = x.sum(1, keepdims=True)
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, "tanh"), keras.layers.Dense(1)])
    model.compile("adam", "mse")
    SparkModel(model, num_ranks=2, backend=backend).fit((x, y), epochs=3, batch_size=4, seed=1, verbose=0)
    return model.get_weights()


def check_same_weights(file: Path, expected_file: Path) -> None:
    with np.load(file) as found, np.load(expected_file) as expected:
        for name in expected.files:
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-6, atol=1e-6)


def main(folder: Path, master: str, backends: list[str]) -> None:
    folder.mkdir(exist_ok=True)
    builder = SparkSession.builder
    (builder if master == "submitted" else builder.master(master)).getOrCreate()
    for backend in backends:
        np.savez(folder / f"{backend}.npz", *weights_after_fit(backend))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
