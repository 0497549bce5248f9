"""Rows per second of `AllReduceTransformer.transform`, of Elephas' own transformer, and of plain `model.predict`.

All three see the same rows and the same weights; each runs in a process of its own, by turns, and is warm when it is
measured (Python workers started, model loaded). The transformers read a DataFrame of ML vectors that Spark has cached, and
write their columns to nowhere. Plain Keras has the rows as one array in memory already, and one core: its figure is "per
core", and those of the transformers, which use all cores, are divided by the number of cores.

Elephas wants older versions of everything, so it lives in an environment of its own, `.venv-elephas`, which `make bench`
makes. Where it is missing, its columns stay empty.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent
ELEPHAS_PYTHON = FOLDER.parents[1] / ".venv-elephas" / "bin" / "python"
CORES = len(os.sched_getaffinity(0))
# name: (rows, numbers per row, hidden units, classes)
CASES = {"64-128-10": (200_000, 64, (128,), 10), "784-1024-1024-10": (30_000, 784, (1024, 1024), 10)}
GOALS = "goals: 3 x Elephas, 0.8 x plain predict per core"
REPEATS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=2, help="how often the sides take turns")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        rates = SIDES[args.side](args.folder, CASES[args.case])
        (args.folder / "rates.json").write_text(json.dumps(rates))
        return
    compare(args.rounds)


def compare(rounds: int) -> None:
    from table import print_table

    rows = []
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            write_inputs(Path(folder), CASES[case])
            rates: dict[str, list[float]] = {side: [] for side in SIDES}
            for _ in range(rounds):
                for side in SIDES:
                    rates[side] += run_side(side, case, Path(folder))
        medians = {side: statistics.median(found) if found else None for side, found in rates.items()}
        ours, elephas, plain = (medians[side] for side in ("transform", "elephas", "plain"))
        assert ours is not None
        assert plain is not None
        cells = [f"{ours:,.0f}", f"{ours / CORES:,.0f}", f"{plain:,.0f}", f"{ours / CORES / plain:.2f}"]
        cells += ["-", "-"] if elephas is None else [f"{elephas:,.0f}", f"{ours / elephas:.1f}"]
        rows.append([case, *cells])
    print(f"{CORES} cores; rows/s, medians of {rounds} x {REPEATS}; {GOALS}")
    head = ["model", "transform", "per core", "plain, 1 core", "ratio", "Elephas", "ratio"]
    print_table(head, rows)


def run_side(side: str, case: str, folder: Path) -> list[float]:
    python = ELEPHAS_PYTHON if side == "elephas" else Path(sys.executable)
    if not python.exists():
        return []
    command = [str(python), __file__, "--side", side, "--case", case, "--folder", str(folder)]
    environment = {**os.environ, "PYSPARK_PYTHON": str(python), "TF_CPP_MIN_LOG_LEVEL": "3"}
    if side == "plain":
        environment |= {"OMP_NUM_THREADS": "1"}
        command = ["taskset", "--cpu-list", str(min(os.sched_getaffinity(0))), *command]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=1200)
    if finished.returncode:
        raise SystemExit(f"{side} failed:\n{finished.stderr[-4000:]}")
    found: list[float] = json.loads((folder / "rates.json").read_text())
    return found


def write_inputs(folder: Path, case: tuple[int, int, tuple[int, ...], int]) -> None:
    rows, width, _, _ = case
    np.save(folder / "x.npy", np.random.default_rng(0).normal(size=(rows, width)).astype("float32"))


def build_model(case: tuple[int, int, tuple[int, ...], int]) -> Any:
    import keras

    _, width, hidden, classes = case
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(units, activation="relu") for units in hidden]
    model = keras.Sequential([keras.Input((width,)), *layers, keras.layers.Dense(classes, activation="softmax")])
    model.compile("adam", "categorical_crossentropy")
    return model


def rates_of(action: Any, rows: int) -> list[float]:
    action()
    rates = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        action()
        rates.append(rows / (time.perf_counter() - start))
    return rates


def cached_frame(folder: Path) -> Any:
    """The rows as ML vectors, in two partitions per core, none of them empty: Elephas fails on those."""
    from pyspark.ml.functions import array_to_vector
    from pyspark.sql import SparkSession
    from pyspark.sql import functions as F

    spark = (
        SparkSession.builder.master(f"local[{CORES}]")
        .config("spark.ui.enabled", "false")
        .config("spark.driver.memory", "8g")
        .config("spark.sql.execution.arrow.pyspark.enabled", "true")
        .getOrCreate()
    )
    spark.sparkContext.setLogLevel("ERROR")
    x = np.load(folder / "x.npy", mmap_mode="r")
    slices = [(start, min(start + 2_500, len(x))) for start in range(0, len(x), 2_500)]

    def rows(bounds: Any) -> Any:
        values = np.load(folder / "x.npy", mmap_mode="r")
        return ((row.tolist(),) for start, end in bounds for row in values[start:end])

    pairs = spark.sparkContext.parallelize(slices, 2 * CORES).mapPartitions(rows)
    frame = spark.createDataFrame(pairs, "features array<double>").select(array_to_vector("features").alias("features"))
    frame = frame.withColumn("label", F.lit(0.0)).cache()
    frame.count()
    return frame


def to_nowhere(frame: Any) -> None:
    frame.write.format("noop").mode("overwrite").save()


def transform(folder: Path, case: Any) -> list[float]:
    from allreduce_spark import AllReduceTransformer

    frame = cached_frame(folder)
    transformer = AllReduceTransformer(build_model(case), outputType="array")
    return rates_of(lambda: to_nowhere(transformer.transform(frame)), case[0])


def elephas(folder: Path, case: Any) -> list[float]:
    from elephas.ml_model import ElephasTransformer
    from elephas.utils.model_utils import ModelType

    frame = cached_frame(folder)
    model = build_model(case)
    transformer = ElephasTransformer(
        labelCol="label",
        outputCol="prediction",
        featuresCol="features",
        keras_model_config=model.to_json(),
        weights=model.get_weights(),
        model_type=ModelType.CLASSIFICATION,
    )
    return rates_of(lambda: to_nowhere(transformer.transform(frame)), case[0])


def plain(folder: Path, case: Any) -> list[float]:
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    x, model = np.load(folder / "x.npy"), build_model(case)
    return rates_of(lambda: model.predict(x, batch_size=1024, verbose=0), case[0])


SIDES = {"transform": transform, "elephas": elephas, "plain": plain}

if __name__ == "__main__":
    main()
