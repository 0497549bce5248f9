"""Find good settings for a digit classifier: trials side by side on Spark, bad ones given up early, the best five combined.

python examples/search.py                                          on this machine
spark-submit --master spark://HOST:7077 examples/search.py         on a standalone cluster
"""

import argparse
import os
import sys
from typing import Any

import keras
from pyspark.sql import SparkSession
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from allreduce_spark import SparkModel, search


def build_model(params: dict[str, Any]) -> keras.Model:
    hidden = [keras.layers.Dense(units, activation="relu") for units in params["layers"]]
    model = keras.Sequential([keras.Input((64,)), *hidden, keras.layers.Dense(10, activation="softmax")])
    model.compile(keras.optimizers.Adam(params["rate"]), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


SPACE = {"layers": [(16,), (64,), (128,), (64, 64)], "rate": (1e-4, 1e-1, "log"), "batch_size": [16, 32, 64]}


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Search settings of a digit classifier and print its held-out accuracy."
    )
    parser.add_argument("--max-trials", type=int, default=12)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--ranks-per-trial", type=int, default=1, help="processes that train one model together")
    parser.add_argument("--master", help="where Spark runs, e.g. 'local[2]'; leave it out under spark-submit")
    args = parser.parse_args()

    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)  # Spark's workers run this Python, unless told otherwise
    builder = SparkSession.builder.appName("search")
    spark = (builder.master(args.master) if args.master else builder).getOrCreate()

    images, digits = load_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(images / 16, digits, test_size=0.2, random_state=0)

    limits = {"max_trials": args.max_trials, "epochs": args.epochs, "ranks_per_trial": args.ranks_per_trial}
    result = search(build_model, SPACE, (x_train, y_train), objective="val_accuracy", seed=0, verbose=2, **limits)
    print(result.table().drop(columns="error").to_string(index=False))

    members = min(5, len(result.models))
    best = SparkModel(result.best_model()).evaluate((x_test, y_test))["accuracy"]
    together = SparkModel(result.best_ensemble(members)).evaluate((x_test, y_test))["accuracy"]
    print(f"held-out accuracy {best:.4f}, of {members} models together {together:.4f}")
    spark.stop()
    return 0 if together >= 0.9 else 1


if __name__ == "__main__":
    sys.exit(main())
