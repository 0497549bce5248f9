"""Recognise handwritten digits: scikit-learn's 1,797 real 8 x 8 images, a small Keras network, two ranks on Spark.

python examples/digits.py                                          on this machine
spark-submit --master spark://HOST:7077 examples/digits.py         on a standalone cluster
"""

import argparse
import os
import sys

import keras
from pyspark.sql import SparkSession
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from allreduce_spark import Checkpoint, SparkModel


def build_model() -> keras.Model:
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.Conv2D(32, 3, padding="same", activation="relu"),
            keras.layers.Conv2D(64, 3, padding="same", activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Flatten(),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    model.compile(keras.optimizers.Adam(2e-3), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def main() -> int:
    parser = argparse.ArgumentParser(description="Train a digit classifier on Spark and print its held-out accuracy.")
    parser.add_argument("--num-ranks", type=int, default=2, help="processes that train together")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--checkpoint", help="a folder that all hosts see; the same command goes on from there")
    parser.add_argument("--master", help="where Spark runs, e.g. 'local[2]'; leave it out under spark-submit")
    args = parser.parse_args()

    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)  # Spark's workers run this Python, unless told otherwise
    builder = SparkSession.builder.appName("digits")
    spark = (builder.master(args.master) if args.master else builder).getOrCreate()

    images, digits = load_digits(return_X_y=True)
    images = (images / 16).astype("float32").reshape(-1, 8, 8, 1)  # (rows, height, width, channels), 0 to 1
    x_train, x_test, y_train, y_test = train_test_split(images, digits, test_size=0.2, stratify=digits, random_state=0)

    keras.utils.set_random_seed(0)
    spark_model = SparkModel(build_model(), num_ranks=args.num_ranks)
    spark_model.fit(
        (x_train, y_train),
        epochs=args.epochs,
        batch_size=32,  # per rank: two ranks with 32 rows each take the same steps as one process with 64
        validation_split=0.1,
        verbose=2,
        checkpoint=Checkpoint(args.checkpoint, every_s=5) if args.checkpoint else None,
        resume="auto" if args.checkpoint else "never",
    )

    accuracy = spark_model.evaluate((x_test, y_test))["accuracy"]
    print(f"held-out accuracy {accuracy:.4f}")
    spark.stop()
    return 0 if accuracy >= 0.95 else 1


if __name__ == "__main__":
    sys.exit(main())
