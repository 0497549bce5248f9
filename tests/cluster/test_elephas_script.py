"""A script that was written for the first Elephas runs unchanged on a standalone cluster, executors included."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pyspark
import pytest

import allreduce_spark.elephas

pytestmark = [pytest.mark.spark, pytest.mark.cluster, pytest.mark.slow]

SUBMIT = str(Path(pyspark.__file__).parent / "bin" / "spark-submit")
MAIN = str(Path(allreduce_spark.elephas.__file__).with_name("__main__.py"))

UNTIL_0_3 = """
from __future__ import absolute_import
from __future__ import print_function
import numpy as np
from keras.layers import Dense
from keras.models import Sequential
from elephas import optimizers as elephas_optimizers
from elephas.spark_model import SparkModel
from elephas.utils.rdd_utils import to_simple_rdd
from pyspark import SparkConf, SparkContext

APP_NAME = "signs"
conf = SparkConf().setAppName(APP_NAME)
sc = SparkContext(conf=conf)
X = np.random.RandomState(0).normal(size=(96, 3)).astype("float32")
Y = np.eye(2)[(X.sum(axis=1) > 0).astype(int)]

model = Sequential()
model.add(Dense(2, input_dim=3, activation="softmax"))
model.compile(loss="categorical_crossentropy", optimizer="sgd")

def checked(row):
    import elephas
    from elephas.utils.functional_utils import get_neutral
    assert elephas.__name__ == "allreduce_spark.elephas", elephas
    assert get_neutral([row[0]])[0].shape == (3,)
    return row

rdd = to_simple_rdd(sc, X, Y).map(checked)
adagrad = elephas_optimizers.Adagrad()
spark_model = SparkModel(sc, model, optimizer=adagrad, frequency="epoch", mode="asynchronous", num_workers=2)
before = model.evaluate(X, Y, verbose=0)
spark_model.train(rdd, nb_epoch=3, batch_size=8, verbose=0, validation_split=0.1)
after = spark_model.get_network().evaluate(X, Y, verbose=0)
classes = spark_model.predict_classes(X)
assert after < before, (before, after)
assert classes.shape == (96,)
print("the work is done with", spark_model.num_ranks, "ranks")
"""


def test_a_script_for_the_first_elephas_runs_on_a_cluster(cluster: Any, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(UNTIL_0_3)
    settings = ["--conf", "spark.executor.cores=1", "--conf", "spark.cores.max=2"]
    finished = subprocess.run(
        [SUBMIT, "--master", cluster.url, *settings, MAIN, str(script)],
        env={**cluster.environment, "PYSPARK_DRIVER_PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "the work is done with 2 ranks" in finished.stdout
