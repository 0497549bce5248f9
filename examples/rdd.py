"""Train on an RDD of pairs: scikit-learn's digits as vectors, a small dense network, two ranks on Spark.

python examples/rdd.py --master "local[2]"
"""

import argparse
import os
import sys

import keras
import numpy as np
from pyspark.sql import SparkSession
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from allreduce_spark import SparkModel
from allreduce_spark.spark.adapters import to_simple_rdd


def build_model() -> keras.Model:
    model = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(128, activation="relu"),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    model.compile(keras.optimizers.Adam(2e-3), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def main() -> int:
    parser = argparse.ArgumentParser(description="Train a digit classifier on an RDD and print its held-out accuracy.")
    parser.add_argument("--num-ranks", type=int, default=2, help="processes that train together")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--master", help="where Spark runs, e.g. 'local[2]'; leave it out under spark-submit")
    args = parser.parse_args()

    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)  # Spark's workers run this Python, unless told otherwise
    builder = SparkSession.builder.appName("rdd")
    spark = (builder.master(args.master) if args.master else builder).getOrCreate()

    images, digits = load_digits(return_X_y=True)
    pixels = (images / 16).astype("float32")  # (rows, 64), 0 to 1
    x_train, x_test, y_train, y_test = train_test_split(pixels, digits, test_size=0.2, stratify=digits, random_state=0)
    # Any RDD of pairs (x, y), one for each row, is as good as these.
    train = to_simple_rdd(spark.sparkContext, x_train, y_train)
    test = to_simple_rdd(spark.sparkContext, x_test, y_test)

    keras.utils.set_random_seed(0)
    spark_model = SparkModel(build_model(), num_ranks=args.num_ranks)
    spark_model.fit(train, epochs=args.epochs, batch_size=32, verbose=2)

    accuracy = spark_model.evaluate(test)["accuracy"]
    predicted = np.argmax(spark_model.predict(test), axis=1)  # in the order of the rows
    print(f"held-out accuracy {accuracy:.4f}; of the predictions {np.mean(predicted == y_test):.4f} are right")
    spark.stop()
    return 0 if accuracy >= 0.95 else 1


if __name__ == "__main__":
    sys.exit(main())
