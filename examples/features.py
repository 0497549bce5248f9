"""Feature extraction: the hidden layer of a network as a column, and Spark's logistic regression on it and on plain pixels.

python examples/features.py --master "local[2]"
"""

import argparse
import os
import sys

import keras
import pandas as pd
from pyspark.ml.classification import LogisticRegression
from pyspark.ml.evaluation import MulticlassClassificationEvaluator
from pyspark.ml.functions import array_to_vector
from pyspark.sql import SparkSession
from sklearn.datasets import load_digits

from allreduce_spark import AllReduceEstimator


def build_model() -> keras.Model:
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),  # the estimator gives the 64 pixels of a row this shape
            keras.layers.Conv2D(32, 3, padding="same", activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Flatten(),
            keras.layers.Dense(64, activation="relu", name="hidden"),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    model.compile(keras.optimizers.Adam(2e-3), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare logistic regression on a network's features and on pixels.")
    parser.add_argument("--num-ranks", type=int, default=2, help="processes that train together")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--master", help="where Spark runs, e.g. 'local[2]'; leave it out under spark-submit")
    args = parser.parse_args()

    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)  # Spark's workers run this Python, unless told otherwise
    builder = SparkSession.builder.appName("features")
    spark = (builder.master(args.master) if args.master else builder).getOrCreate()

    images, digits = load_digits(return_X_y=True)
    rows = spark.createDataFrame(pd.DataFrame({"array": list(images / 16), "label": digits}))
    train, test = rows.select(array_to_vector(rows["array"]).alias("pixels"), "label").randomSplit([0.8, 0.2], seed=0)

    keras.utils.set_random_seed(0)
    estimator = AllReduceEstimator(
        model=build_model(), featuresCol="pixels", numRanks=args.num_ranks, epochs=args.epochs, seed=0
    )
    network = estimator.fit(train)
    network.setParams(
        outputLayer="hidden", outputCol="features", predictionCol="", probabilityCol="", rawPredictionCol=""
    )
    train, test = network.transform(train).cache(), network.transform(test).cache()

    accuracy = {}
    for column in ("features", "pixels"):
        classified = LogisticRegression(featuresCol=column, regParam=0.01).fit(train).transform(test)
        accuracy[column] = MulticlassClassificationEvaluator(metricName="accuracy").evaluate(classified)
    print(f"held-out accuracy {accuracy['features']:.4f} from features, {accuracy['pixels']:.4f} from pixels")
    spark.stop()
    return 0 if accuracy["features"] >= 0.95 else 1


if __name__ == "__main__":
    sys.exit(main())
