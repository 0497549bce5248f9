"""Train on LabeledPoints: scikit-learn's breast cancer data, a small dense network, two ranks on Spark.

python examples/mllib.py --master "local[2]"
"""

import argparse
import os
import sys

import keras
from pyspark.mllib.linalg import Vectors
from pyspark.sql import SparkSession
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

from allreduce_spark import SparkMLlibModel
from allreduce_spark.spark.adapters import to_labeled_point


def build_model() -> keras.Model:
    model = keras.Sequential(
        [
            keras.Input((30,)),
            keras.layers.Dense(32, activation="relu"),
            keras.layers.Dense(2, activation="softmax"),
        ]
    )
    model.compile(keras.optimizers.Adam(1e-2), "categorical_crossentropy", metrics=["accuracy", "auc"])
    return model


def main() -> int:
    parser = argparse.ArgumentParser(description="Train a tumour classifier on LabeledPoints; prints held-out results.")
    parser.add_argument("--num-ranks", type=int, default=2, help="processes that train together")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--master", help="where Spark runs, e.g. 'local[2]'; leave it out under spark-submit")
    args = parser.parse_args()

    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)  # Spark's workers run this Python, unless told otherwise
    builder = SparkSession.builder.appName("mllib")
    spark = (builder.master(args.master) if args.master else builder).getOrCreate()

    x, y = load_breast_cancer(return_X_y=True)  # (rows, 30); 0 malignant, 1 benign
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=0.2, stratify=y, random_state=0)
    scaler = StandardScaler().fit(x_train)
    train = to_labeled_point(spark.sparkContext, scaler.transform(x_train), y_train)
    test = to_labeled_point(spark.sparkContext, scaler.transform(x_test), y_test)

    keras.utils.set_random_seed(0)
    mllib_model = SparkMLlibModel(build_model(), num_ranks=args.num_ranks)
    mllib_model.fit(train, categorical=True, epochs=args.epochs, batch_size=16, verbose=2)

    result = mllib_model.evaluate(test, categorical=True)
    first = mllib_model.predict(Vectors.dense(scaler.transform(x_test)[0]))  # the probabilities of one row
    print(f"held-out accuracy {result['accuracy']:.4f}, AUC {result['auc']:.4f}")
    print(f"the first row is of class {y_test[0]}; predicted: {first.argmax()} with probability {first.max():.3f}")
    spark.stop()
    return 0 if result["accuracy"] >= 0.93 else 1


if __name__ == "__main__":
    sys.exit(main())
