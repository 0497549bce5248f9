"""Rows per second of `AllReduceTransformer.transform`, of Elephas' own transformer, and of plain `model.predict`.

All sides see the same rows and the same weights; each runs in a process of its own, by turns, and is warm when it is
measured (Python workers started, model loaded). The transformers read a DataFrame of ML vectors that Spark has cached, and
write their columns to nowhere. Plain Keras has the rows as one array in memory already, and one core: its figure is "per
core". Two figures are beside it: "our task" is what a task of the transformer does with Arrow batches that are there, per
core (reading vectors, the model, the new columns); "Spark alone" is how fast Spark brings the same rows to Python and back
when nothing is done to them, on all cores. What `transform` as a whole reaches is bounded by both.

Elephas wants older versions of everything, so it lives in an environment of its own, `.venv-elephas`, which `make bench`
makes. Where it is missing, its columns stay empty.
"""

from __future__ import annotations

import argparse
import functools
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
GOALS = "goals: 3 x Elephas; our task 0.8 x plain predict"
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
        rows.append([case, *cells(**medians)])
    print(f"{CORES} cores; rows/s, medians of {rounds} x {REPEATS}; {GOALS}")
    head = [
        "model",
        "transform",
        "Elephas",
        "ratio",
        "Spark alone",
        "ratio",
        "our task, 1 core",
        "plain, 1 core",
        "ratio",
    ]
    print_table(head, rows)


def cells(transform: float, elephas: float | None, passed: float, task: float, plain: float) -> list[str]:
    of_elephas = ["-", "-"] if elephas is None else [f"{elephas:,.0f}", f"{transform / elephas:.1f}"]
    of_spark = [f"{passed:,.0f}", f"{transform / passed:.2f}"]
    return [f"{transform:,.0f}", *of_elephas, *of_spark, f"{task:,.0f}", f"{plain:,.0f}", f"{task / plain:.2f}"]


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


def cached_frame(folder: Path, cores: int = CORES) -> Any:
    """The rows as ML vectors, in two partitions per core, none of them empty: Elephas fails on those."""
    from pyspark.ml.functions import array_to_vector
    from pyspark.sql import SparkSession
    from pyspark.sql import functions as F

    spark = (
        SparkSession.builder.master(f"local[{cores}]")
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


def passed(folder: Path, case: Any) -> list[float]:
    """The same rows to Python and back, by the way that the transformer takes."""
    from allreduce_spark.spark.shards import map_batches

    frame = cached_frame(folder)
    return rates_of(lambda: to_nowhere(map_batches(frame, iter, frame.schema)), case[0])


def task(folder: Path, case: Any) -> list[float]:
    """The transformer's own task, which times itself: one task after the other, so that a core is free for each."""
    from allreduce_spark import AllReduceTransformer
    from allreduce_spark.spark.ml import transformer

    def timed(work: Any, batches: Any) -> Any:
        import pyarrow as pa

        arrived = list(batches)
        sum(batch.num_rows for batch in work(arrived))  # the model is loaded
        start = time.perf_counter()
        rows = sum(batch.num_rows for batch in work(arrived))
        yield pa.RecordBatch.from_pydict({"rate": [rows / (time.perf_counter() - start)]})

    send = transformer.map_batches
    transformer.map_batches = lambda frame, work, schema: send(frame, functools.partial(timed, work), "rate double")
    frame = cached_frame(folder, cores=1)
    timings = AllReduceTransformer(build_model(case), outputType="array").transform(frame)
    return [row.rate for row in timings.collect()]


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


SIDES = {"transform": transform, "elephas": elephas, "passed": passed, "task": task, "plain": plain}

if __name__ == "__main__":
    main()
