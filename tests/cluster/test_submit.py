"""spark-submit as users of clusters use it: code and interpreter that travel along, and a driver that runs on the cluster."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy
import pyspark
import pytest

pytestmark = [pytest.mark.spark, pytest.mark.cluster, pytest.mark.slow]

REPOSITORY = Path(__file__).parents[2]
SPARK_HOME = Path(pyspark.__file__).parent
SUBMIT = str(SPARK_HOME / "bin" / "spark-submit")
TWO_EXECUTORS = ["--conf", "spark.executor.cores=1", "--conf", "spark.cores.max=2", "--conf", "spark.ui.enabled=false"]
RUN_S = 200.0

# The layer is in a module that only --py-files brings; ranks load the model, and so need it too.
LAYERS = """
import keras

@keras.saving.register_keras_serializable("tests")
class Twice(keras.layers.Layer):
    def call(self, x):
        return 2 * x
"""
SCRIPT = """
import json, sys
from pathlib import Path
import keras, numpy as np
from pyspark.sql import SparkSession
import allreduce_spark
from allreduce_spark import SparkModel, run
from layers import Twice

def where(communicator):
    import sys, allreduce_spark
    return [sys.prefix, allreduce_spark.__file__]

spark = SparkSession.builder.getOrCreate()
for path in sys.argv[3:]:
    spark.sparkContext.addPyFile(path)
keras.utils.set_random_seed(0)
model = keras.Sequential([keras.Input((3,)), Twice(), keras.layers.Dense(1)])
model.compile("sgd", "mse")
x = np.random.default_rng(0).normal(size=(64, 3)).astype("float32")
backend = sys.argv[2]
history = SparkModel(model, num_ranks=2, backend=backend).fit((x, x.sum(1)), epochs=20, batch_size=8, verbose=0)
found = {"loss": history.history["loss"], "driver": [sys.prefix, allreduce_spark.__file__]}
found["ranks"] = run(where, num_ranks=2, backend=backend)
Path(sys.argv[1] + ".part").write_text(json.dumps(found))
Path(sys.argv[1] + ".part").rename(sys.argv[1])
"""


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with a script, a module of its own, and this library as one file."""
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "layers.py").write_text(LAYERS)
    shutil.make_archive(str(tmp_path / "library"), "zip", REPOSITORY, "allreduce_spark")
    return tmp_path


def environment_archive(folder: Path) -> Path:
    """An archive of a virtual environment: a small one, which finds the large packages where they are on this machine."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "environment")], check=True)
    (site_packages,) = (folder / "environment").glob("lib/python*/site-packages")
    (site_packages / "large.pth").write_text(str(Path(numpy.__file__).parents[1]))
    for library in Path(sys.prefix, "lib").glob("*mpi*"):
        (folder / "environment" / "lib" / library.name).symlink_to(library)
    with tarfile.open(folder / "environment.tar.gz", "w:gz") as archive:
        archive.add(folder / "environment", arcname=".")
    return folder / "environment.tar.gz"


def submit(cluster: Any, *words: str, **variables: str) -> str:
    environment = {**cluster.environment, **variables}
    command = [SUBMIT, "--master", cluster.url, *TWO_EXECUTORS, *words]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=RUN_S, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout + ended.stderr


@pytest.mark.support(place="spark-submit", backend="mpi")
def test_ranks_run_the_code_and_the_interpreter_that_travel_with_the_application(
    roomy_cluster: Any, files: Path
) -> None:
    submit(
        roomy_cluster,
        *("--archives", f"{environment_archive(files)}#environment"),
        *("--py-files", f"{files / 'library.zip'},{files / 'layers.py'}"),
        *(str(files / "script.py"), str(files / "found.json"), "mpi"),
        PYSPARK_DRIVER_PYTHON=sys.executable,
        PYSPARK_PYTHON="./environment/bin/python",
    )
    found = json.loads((files / "found.json").read_text())
    assert found["loss"][-1] < found["loss"][0] / 2
    assert found["driver"][0] == sys.prefix
    for prefix, library in found["ranks"]:
        assert prefix.endswith("/environment")
        assert str(roomy_cluster.folder) in prefix, "not where Spark has unpacked the archive"
        assert "library.zip/allreduce_spark" in library


def test_a_driver_on_the_cluster_trains_and_its_application_ends(roomy_cluster: Any, files: Path) -> None:
    """Spark's own refusal of Python drivers on standalone clusters is gone round as examples/README.md says."""
    (jar,) = (SPARK_HOME / "jars").glob("spark-core_*.jar")
    said = submit(
        roomy_cluster,
        *("--deploy-mode", "cluster", "--class", "org.apache.spark.deploy.PythonRunner"),
        *("--conf", "spark.driver.memory=1g", "--conf", "spark.executor.memory=512m"),
        *(str(jar), str(files / "script.py"), str(files / "layers.py"), str(files / "found.json"), "mpi"),
        str(files / "layers.py"),
    )
    assert "Driver successfully submitted" in said
    deadline = time.monotonic() + RUN_S
    while not any(re.search(r"Driver \S+ exited successfully", log.read_text()) for log in roomy_cluster.worker_logs()):
        printed = "".join(file.read_text() for file in roomy_cluster.folder.glob("worker-*/driver-*/std*"))
        assert time.monotonic() < deadline, said + printed
        assert "User application exited with" not in printed, printed
        time.sleep(0.2)
    loss = json.loads((files / "found.json").read_text())["loss"]
    assert loss[-1] < loss[0] / 2
