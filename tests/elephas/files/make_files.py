"""Write the files of this folder with a real Elephas: models as users have saved them, and what they predict.

Not run by the tests. It was run in two environments of their own, with Python 3.11 and Java 17:

    elephas 7.3.0, tensorflow-cpu 2.19.1, keras 3.10.0, pyspark 3.5.5, h5py 3.11.0   ->  elephas7_*
    elephas 6.2.1, tensorflow-cpu 2.15.1, keras 2.15.0, pyspark 3.5.5, h5py 3.11.0   ->  elephas6_*

There are no `.keras` files: in both environments Elephas opens the zip that Keras wrote as HDF5, and fails.

python make_files.py 7
python make_files.py 6
"""

import json
import os
import sys
from pathlib import Path

os.environ["PYSPARK_PYTHON"] = sys.executable

import elephas.spark_model
import numpy as np
from elephas.ml_model import ElephasEstimator
from elephas.spark_model import SparkMLlibModel, SparkModel
from elephas.utils.rdd_utils import to_labeled_point, to_simple_rdd
from pyspark.ml.linalg import Vectors
from pyspark.sql import SparkSession
from tensorflow import keras

VERSION = int(sys.argv[1])
FOLDER = Path(__file__).parent
X = np.random.default_rng(0).normal(size=(64, 3)).astype("float32")
FEW = X[:4]


def build(outputs, activation, loss, metrics):
    model = keras.Sequential(
        [keras.layers.Dense(4, activation="relu", input_shape=(3,)), keras.layers.Dense(outputs, activation=activation)]
    )
    # Elephas 6 on TensorFlow 2.13 or later trains with the optimizers of Keras 2.10 alone.
    optimizers = getattr(keras.optimizers, "legacy", keras.optimizers) if VERSION == 6 else keras.optimizers
    model.compile(optimizer=optimizers.Adam(0.01), loss=loss, metrics=metrics)
    return model


def main():
    spark = SparkSession.builder.master("local[1]").getOrCreate()
    context = spark.sparkContext
    classes = (X.sum(axis=1) > 0).astype(int)
    sums = X.sum(axis=1)
    expected = {}

    def keep(spark_model, name):
        spark_model.save(str(FOLDER / name), overwrite=True)
        model = spark_model.master_network
        expected[name] = {
            "class_name": type(spark_model).__name__,
            "config": json.loads(json.dumps(spark_model.get_config())),
            "prediction": model.predict(FEW, verbose=0).tolist(),
            "iterations": int(model.optimizer.iterations.numpy()),
        }

    # The optimizer has a state: Elephas never brings any back from the workers, so the model is trained here first.
    model = build(2, "softmax", "categorical_crossentropy", ["acc"])
    model.fit(X, np.eye(2)[classes], epochs=2, batch_size=16, verbose=0)
    spark_model = SparkModel(model, num_workers=1, **({} if VERSION == 7 else {"mode": "synchronous"}), foo="bar")
    spark_model.fit(to_simple_rdd(context, X, np.eye(2)[classes]), epochs=1, batch_size=16, verbose=0)
    keep(spark_model, f"elephas{VERSION}_spark_model.h5")
    regression = build(1, "linear", "mse", ["mae"])
    mllib_model = SparkMLlibModel(regression, num_workers=1, **({} if VERSION == 7 else {"mode": "synchronous"}))
    mllib_model.fit(to_labeled_point(context, X.astype("float64"), sums.astype("float64")), epochs=1, batch_size=16)
    keep(mllib_model, f"elephas{VERSION}_mllib_model.h5")

    asynchronous = getattr(elephas.spark_model, "AsynchronousSparkModel", SparkModel)
    binary = build(1, "sigmoid", "binary_crossentropy", ["acc"])
    binary.fit(X, classes, batch_size=16, verbose=0)
    keep(
        asynchronous(binary, mode="hogwild", frequency="batch", parameter_server_mode="socket", port=4321),
        f"elephas{VERSION}_asynchronous_model.h5",
    )

    kinds = (("classification", classes, "categorical_crossentropy", 2), ("regression", sums, "mse", 1))
    for kind, labels, loss, nb_classes in kinds:
        rows = [(Vectors.dense(x.tolist()), float(y)) for x, y in zip(X, labels, strict=True)]
        frame = spark.createDataFrame(rows, ["features", "label"])
        model = build(nb_classes, "softmax" if kind == "classification" else "linear", loss, ["acc"])
        estimator = ElephasEstimator(
            keras_model_config=model.to_json(),
            optimizer_config=keras.optimizers.serialize(model.optimizer),
            loss=loss,
            metrics=["acc"] if kind == "classification" else ["mae"],
            categorical=kind == "classification",
            nb_classes=nb_classes,
            epochs=2,
            batch_size=16,
            num_workers=1,
            mode="synchronous",
        )
        name = f"elephas{VERSION}_estimator_{kind}.h5"
        estimator.save(str(FOLDER / name))
        expected[name] = {"class_name": "ElephasEstimator", "config": estimator.get_config()}
        transformer = estimator.fit(frame)
        name = f"elephas{VERSION}_transformer_{kind}.h5"
        transformer.save(str(FOLDER / name))
        rows = transformer.transform(frame.limit(4)).select("prediction").collect()
        expected[name] = {"class_name": "ElephasTransformer", "prediction": [row.prediction for row in rows]}

    expected["x"] = FEW.tolist()
    (FOLDER / f"elephas{VERSION}_expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    spark.stop()


if __name__ == "__main__":
    main()
