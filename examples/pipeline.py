"""Keras models at the end of Spark ML pipelines: scikit-learn's wines classified, and the course of diabetes predicted.

python examples/pipeline.py --master "local[2]"
"""

import argparse
import os
import sys

import keras
from pyspark.ml import Pipeline
from pyspark.ml.evaluation import MulticlassClassificationEvaluator, RegressionEvaluator
from pyspark.ml.feature import StandardScaler, StringIndexer, VectorAssembler
from pyspark.sql import SparkSession
from sklearn.datasets import load_diabetes, load_wine

from allreduce_spark import AllReduceEstimator


def classify_wines(spark: SparkSession, num_ranks: int, epochs: int) -> float:
    wines = load_wine(as_frame=True)
    kinds = wines.target.map({0: "Barolo", 1: "Grignolino", 2: "Barbera"})
    train, test = spark.createDataFrame(wines.data.assign(kind=kinds)).randomSplit([0.8, 0.2], seed=1)
    model = keras.Sequential([keras.Input((13,)), keras.layers.Dense(32, "relu"), keras.layers.Dense(3, "softmax")])
    model.compile(keras.optimizers.Adam(1e-2), "sparse_categorical_crossentropy", metrics=["accuracy"])
    pipeline = Pipeline(
        stages=[
            StringIndexer(inputCol="kind", outputCol="label"),
            VectorAssembler(inputCols=wines.feature_names, outputCol="measured"),
            StandardScaler(inputCol="measured", outputCol="features", withMean=True),
            AllReduceEstimator(model=model, numRanks=num_ranks, epochs=epochs, batchSize=16, seed=0),
        ]
    )
    predicted = pipeline.fit(train).transform(test)
    predicted.select("kind", "label", "prediction", "probability").show(5, truncate=False)
    return MulticlassClassificationEvaluator(metricName="accuracy").evaluate(predicted)


def predict_diabetes(spark: SparkSession, num_ranks: int, epochs: int) -> float:
    patients = load_diabetes(as_frame=True, scaled=False)
    train, test = spark.createDataFrame(patients.frame).randomSplit([0.8, 0.2], seed=1)
    last = keras.layers.Dense(1, bias_initializer=keras.initializers.Constant(150))  # about the mean of the targets
    model = keras.Sequential([keras.Input((10,)), keras.layers.Dense(32, "relu"), last])
    model.compile(keras.optimizers.Adam(1e-2), "mse")
    pipeline = Pipeline(
        stages=[
            VectorAssembler(inputCols=patients.feature_names, outputCol="measured"),
            StandardScaler(inputCol="measured", outputCol="features", withMean=True),
            AllReduceEstimator(model=model, labelCol="target", numRanks=num_ranks, epochs=epochs, batchSize=16, seed=0),
        ]
    )
    predicted = pipeline.fit(train).transform(test)
    predicted.select("target", "prediction").show(5)
    return RegressionEvaluator(labelCol="target", metricName="r2").evaluate(predicted)


def main() -> int:
    parser = argparse.ArgumentParser(description="Train two pipelines on Spark and print how they do on held-out rows.")
    parser.add_argument("--num-ranks", type=int, default=2, help="processes that train together")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--master", help="where Spark runs, e.g. 'local[2]'; leave it out under spark-submit")
    args = parser.parse_args()

    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)  # Spark's workers run this Python, unless told otherwise
    builder = SparkSession.builder.appName("pipeline")
    spark = (builder.master(args.master) if args.master else builder).getOrCreate()
    keras.utils.set_random_seed(0)
    accuracy = classify_wines(spark, args.num_ranks, args.epochs)
    r2 = predict_diabetes(spark, args.num_ranks, args.epochs)
    print(f"held-out accuracy {accuracy:.4f} on wines, R2 {r2:.4f} on diabetes")
    spark.stop()
    return 0 if accuracy >= 0.93 and r2 >= 0.35 else 1


if __name__ == "__main__":
    sys.exit(main())
