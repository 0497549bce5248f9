"""Scripts that were written for Elephas run as they are: `python -m allreduce_spark.elephas`, and with spark-submit.

An Elephas that is really installed is played by a package that fails when it is used.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyspark
import pytest

import allreduce_spark.elephas
from allreduce_spark.elephas import alias
from allreduce_spark.errors import ConfigError

SUBMIT = str(Path(pyspark.__file__).parent / "bin" / "spark-submit")
MAIN = str(Path(allreduce_spark.elephas.__file__).with_name("__main__.py"))
RUN = [sys.executable, "-m", "allreduce_spark.elephas"]


@pytest.fixture
def java() -> None:
    if shutil.which("java") is None and "JAVA_HOME" not in os.environ:
        pytest.skip("Java is missing: Spark needs it (apt-get install openjdk-17-jre-headless)")


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """With an installed Elephas, which driver and executors find on their path."""
    installed = tmp_path / "site" / "elephas"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    (installed / "spark_model.py").write_text("raise RuntimeError('the installed Elephas was used')")
    path = os.pathsep.join([str(installed.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "PYSPARK_PYTHON": sys.executable, "TF_CPP_MIN_LOG_LEVEL": "2"}


def run(command: list[str], environment: dict[str, str], folder: Path) -> str:
    finished = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=200)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


LOOK = """
import os, sys
import elephas
import elephas.utils.rdd_utils as tools
from elephas.enums.modes import Mode
from elephas import utils
import allreduce_spark.elephas.enums.modes as modes

def here():
    return "found through __main__"

if __name__ == "__main__":
    assert Mode is modes.Mode and utils.rdd_utils is tools and elephas.utils is utils
    assert elephas is sys.modules["allreduce_spark.elephas"] is sys.modules["elephas"]
    import __main__
    import beside
    print(__main__.here(), sys.argv, os.path.isabs(__file__), os.path.basename(__file__), beside.NAME)
    try:
        import elephas.dl4j
    except ImportError as error:
        print(error)
    sys.exit(3)
"""


def test_a_script_sees_itself_as_if_it_were_run_directly(tmp_path: Path, environment: dict[str, str]) -> None:
    folder = tmp_path / "scripts"
    folder.mkdir()
    (folder / "look.py").write_text(LOOK)
    (folder / "beside.py").write_text("NAME = 'the module beside it'")
    command = [*RUN, "scripts/look.py", "--name", "-m"]
    finished = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert finished.returncode == 3, finished.stderr
    assert finished.stdout.splitlines() == [
        "found through __main__ ['scripts/look.py', '--name', '-m'] True look.py the module beside it",
        "No module named 'elephas.dl4j': allreduce_spark.elephas stands in for Elephas, and has no counterpart of it.",
    ]
    # Elsewhere, the installed one is what it was.
    plain = subprocess.run(
        [sys.executable, "-c", "import elephas.spark_model"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "the installed Elephas was used" in plain.stderr


def test_without_a_script_the_usage_is_shown() -> None:
    for arguments, words in (([], "usage:"), (["absent.py"], "no file 'absent.py'")):
        finished = subprocess.run([*RUN, *arguments], capture_output=True, text=True, timeout=60)
        assert finished.returncode == 1
        assert words in finished.stderr


def test_two_of_them_cannot_be_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    other = type(sys)("elephas")
    monkeypatch.setitem(sys.modules, "elephas", other)
    with pytest.raises(ConfigError, match="has imported an Elephas already"):
        alias.install_here()


# In the shape of Elephas's own examples from 7.0 on.
FROM_7_0 = """
import numpy as np
from pyspark import SparkConf, SparkContext
from tensorflow import keras
from elephas.spark_model import SparkModel, load_spark_model
from elephas.utils.rdd_utils import to_simple_rdd

conf = SparkConf().setAppName("signs").setMaster("local[2]")
sc = SparkContext(conf=conf)
x = np.random.default_rng(0).normal(size=(96, 3)).astype("float32")
y = (x.sum(axis=1) > 0).astype("float32")

model = keras.models.Sequential()
model.add(keras.layers.Dense(8, activation="relu", input_dim=3))
model.add(keras.layers.Dense(1, activation="sigmoid"))
model.compile(optimizer=keras.optimizers.Adam(0.02), loss="binary_crossentropy", metrics=["acc"])

def add_neutral(row):
    # What executors run may import elephas, too.
    from elephas.utils.functional_utils import add_params, get_neutral
    return add_params([row[0]], get_neutral([row[0]]))[0], row[1]

rdd = to_simple_rdd(sc, x, y).map(add_neutral)
spark_model = SparkModel(model, num_workers=2)
before = spark_model.evaluate(x, y)[0]
spark_model.fit(rdd, epochs=3, batch_size=16, verbose=0, validation_split=0.1)
spark_model.save("model.keras")
loss, accuracy = load_spark_model("model.keras").evaluate(x, y)
assert loss < before, (loss, before)
predictions = spark_model.predict(x)
assert len(predictions) == 96 and predictions[0].shape == (1,)
print("workers used", spark_model.num_ranks, type(spark_model).__module__)
sc.stop()
"""


@pytest.mark.spark
@pytest.mark.slow
@pytest.mark.usefixtures("java")
def test_a_script_for_the_newest_elephas_runs_unchanged(tmp_path: Path, environment: dict[str, str]) -> None:
    (tmp_path / "script.py").write_text(FROM_7_0)
    output = run([*RUN, "script.py"], environment, tmp_path)
    assert "workers used 2 allreduce_spark.elephas.spark_model" in output


# In the shape of the Spark ML examples of 0.4 to 6.2, with its accessors; `prepare` travels with --py-files.
FROM_0_4 = """
import sys
import numpy as np
from keras import optimizers
from keras.layers import Activation, Dense, Dropout
from keras.models import Sequential
from pyspark.ml import Pipeline
from pyspark.ml.feature import StandardScaler, StringIndexer
from pyspark.ml.linalg import Vectors
from pyspark.sql import SparkSession
from elephas.ml_model import ElephasEstimator
import prepare

epochs = int(sys.argv[1])
spark = SparkSession.builder.appName("signs").getOrCreate()
sc = spark.sparkContext
x = np.random.default_rng(0).normal(size=(96, 3))
names = np.where(x.sum(axis=1) > 0, "plus", "minus")
rows = sc.parallelize([(row.tolist(), str(name)) for row, name in zip(x, names)]).map(prepare.row)
df = spark.createDataFrame(rows, ["features", "category"])

model = Sequential()
model.add(Dense(16, input_shape=(3,)))
model.add(Activation("relu"))
model.add(Dropout(0.1))
model.add(Dense(2))
model.add(Activation("softmax"))
model.compile(loss="categorical_crossentropy", optimizer="adam")

estimator = ElephasEstimator()
estimator.setFeaturesCol("scaled_features")
estimator.setLabelCol("index_category")
estimator.set_keras_model_config(model.to_json())
estimator.set_optimizer_config(optimizers.serialize(optimizers.Adam(0.02)))
estimator.set_categorical_labels(True)
estimator.set_nb_classes(2)
estimator.set_num_workers(2)
estimator.set_epochs(epochs)
estimator.set_batch_size(16)
estimator.set_verbosity(0)
estimator.set_validation_split(0.15)
estimator.set_mode("asynchronous")
estimator.set_frequency("epoch")
estimator.set_loss("categorical_crossentropy")
estimator.set_metrics(["acc"])

indexer = StringIndexer(inputCol="category", outputCol="index_category")
scaler = StandardScaler(inputCol="features", outputCol="scaled_features", withStd=True, withMean=True)
fitted = Pipeline(stages=[indexer, scaler, estimator]).fit(df)
pairs = fitted.transform(df).select("index_category", "prediction").rdd.map(
    lambda row: (row.index_category, float(np.argmax(row.prediction)))
)
print("accuracy", np.mean([one == other for one, other in pairs.collect()]), "of", pairs.count())
"""
PREPARE = """
from elephas.utils.functional_utils import divide_by  # at the top of a module that only executors need to import
from pyspark.ml.linalg import Vectors

def row(pair):
    return Vectors.dense(divide_by([2 * value for value in pair[0]], 2)), pair[1]
"""


@pytest.mark.spark
@pytest.mark.slow
@pytest.mark.usefixtures("java")
def test_a_pipeline_script_of_older_elephas_runs_with_spark_submit(tmp_path: Path, environment: dict[str, str]) -> None:
    (tmp_path / "script.py").write_text(FROM_0_4)
    (tmp_path / "prepare.py").write_text(PREPARE)
    command = [SUBMIT, "--master", "local[2]", "--py-files", "prepare.py", MAIN, "script.py", "6"]
    output = run(command, environment, tmp_path)
    (line,) = [line for line in output.splitlines() if line.startswith("accuracy")]
    assert float(line.split()[1]) > 0.8
    assert line.endswith("of 96")
