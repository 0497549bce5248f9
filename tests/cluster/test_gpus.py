"""GPUs that Spark assigns, on a standalone cluster whose workers pretend to have some: who gets which, and what is refused.

From a driver of its own, and by a Connect server.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from standalone import SPARK_HOME, process, wait_for_line

pytestmark = [pytest.mark.spark, pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(600)]

RUN_S = 500.0

PROGRAM = """
import json, os, sys
import keras, numpy as np
from pyspark import TaskContext
from pyspark.resource import ExecutorResourceRequests, ResourceProfileBuilder, TaskResourceRequests
from pyspark.sql import SparkSession
from allreduce_spark import AllReduceEstimator, SparkModel, Timeouts, run
from allreduce_spark.errors import ConfigError

def tasks(**amounts):
    requests = TaskResourceRequests().cpus(1)
    for name, amount in amounts.items():
        requests.resource(name, amount)
    return ResourceProfileBuilder().require(requests).build

def place(communicator):
    worker = next(part for part in os.getcwd().split("/") if part.startswith("worker-"))
    return worker, os.environ["CUDA_VISIBLE_DEVICES"], os.environ["CUDA_DEVICE_ORDER"]

def refusal(call, *arguments, **named):
    try:
        return call(*arguments, **named)
    except ConfigError as error:
        return str(error)

class CountGpus(keras.layers.Layer):
    def call(self, x):
        context = TaskContext.get()
        return x + (0.0 if context is None else len(context.resources()["gpu"].addresses))

X, Y = np.zeros((16, 3), "float32"), np.zeros((16, 1), "float32")

def model():
    made = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1, kernel_initializer="zeros"), CountGpus()])
    made.compile("sgd", "mse")
    return made

one_each = tasks(gpu=1)  # before there is a session
if sys.argv[1].startswith("sc:"):
    builder = SparkSession.builder.remote(sys.argv[1])
else:
    builder = SparkSession.builder.master(sys.argv[1])
    for name, value in json.loads(sys.argv[2]).items():
        builder = builder.config(name, value)
spark = builder.getOrCreate()

late = Timeouts(slots_s=120)  # for both executors of a young application
found = {"one each": run(place, num_ranks=4, resources=one_each, timeouts=late), "two each": run(place, resources=tasks(gpu=2))}
found["halves, allowed"] = run(place, num_ranks=3, ranks_per_gpu=2)
frame = spark.createDataFrame([(row.tolist(), 0.0) for row in X], ["features", "label"])
found["halves"] = refusal(AllReduceEstimator(model=model(), numRanks=3).fit, frame)
fitted = SparkModel(model(), num_ranks=2, backend="auto", resources=one_each)
found["loss"] = fitted.fit((X, Y), batch_size=4, verbose=0).history["loss"]
found["predictions"] = sorted({float(n) for n in SparkModel(fitted.model, resources=tasks(gpu=2)).predict(X).ravel()})

found["too many"] = refusal(run, place, num_ranks=5)
found["three"] = refusal(run, place, resources=tasks(gpu=3))
found["fpga"] = refusal(SparkModel(model(), resources=tasks(fpga=1)).predict, X)
executors = ResourceProfileBuilder().require(TaskResourceRequests().resource("gpu", 1))
executors = executors.require(ExecutorResourceRequests().cores(1).resource("gpu", 1)).build
found["executors"] = refusal(run, place, resources=executors)
print("FOUND", json.dumps(found))
"""


SETTINGS = {
    "spark.ui.enabled": "false",
    "spark.executor.cores": "2",
    "spark.executor.resource.gpu.amount": "2",
    "spark.task.resource.gpu.amount": "0.5",
}
SERVER = "org.apache.spark.sql.connect.service.SparkConnectServer"


@pytest.fixture(scope="module", params=["classic", "connect"])
def found(
    request: pytest.FixtureRequest, roomy_cluster: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What one driver, or one client, saw: the places of ranks, and the texts of refusals."""
    folder = tmp_path_factory.mktemp("program")
    script = folder / "script.py"
    script.write_text(PROGRAM)
    if request.param == "connect":
        if importlib.util.find_spec("grpc_status") is None:
            pytest.skip("the client of Spark Connect is missing: pip install 'pyspark[connect]'")
        url: Any = connect_server(roomy_cluster, folder / "server.log")
    else:
        url = contextlib.nullcontext(roomy_cluster.url)
    with url as where:
        answer = subprocess.run(
            [sys.executable, str(script), where, json.dumps(SETTINGS)],
            env=roomy_cluster.environment,
            capture_output=True,
            text=True,
            timeout=RUN_S,
            check=False,
        )
    lines = [line for line in answer.stdout.splitlines() if line.startswith("FOUND ")]
    assert lines, f"{answer.stdout}\n{answer.stderr}"
    return json.loads(lines[0].removeprefix("FOUND "))


@contextlib.contextmanager
def connect_server(cluster: Any, log: Path) -> Iterator[str]:
    """The URL of a Connect server that is an application of the cluster."""
    settings = {
        **SETTINGS,
        "spark.connect.grpc.binding.address": "127.0.0.1",
        "spark.connect.grpc.binding.port": "0",
    }
    options = [option for name, value in settings.items() for option in ("--conf", f"{name}={value}")]
    command = [str(SPARK_HOME / "bin" / "spark-submit"), "--class", SERVER, "--master", cluster.url, *options]
    # Workers run in a folder of the session.
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), cluster.environment.get("PYTHONPATH")]))
    with process(command, {**cluster.environment, "SPARK_CONNECT_MODE": "0", "PYTHONPATH": path}, log):
        yield f"sc://127.0.0.1:{wait_for_line(log, r'started at: *127.0.0.1:([0-9]+)')[1]}"


def gpus_of_workers(places: list[Any]) -> dict[str, list[str]]:
    workers: dict[str, list[str]] = {}
    for worker, gpus, order in places:
        assert order == "PCI_BUS_ID"
        workers.setdefault(worker, []).append(gpus)
    return {worker: sorted(gpus) for worker, gpus in sorted(workers.items())}


def test_each_rank_sees_the_gpu_that_spark_gave_to_its_task(found: dict[str, Any]) -> None:
    assert gpus_of_workers(found["one each"]) == {"worker-1": ["0", "1"], "worker-2": ["2", "3"]}
    assert gpus_of_workers(found["two each"]) == {"worker-1": ["0,1"], "worker-2": ["2,3"]}
    assert len(found["loss"]) == 1
    assert found["predictions"] == [2.0], "the tasks of predict have the resources of the model"


def test_ranks_share_a_gpu_only_where_that_is_asked_for(found: dict[str, Any]) -> None:
    assert "would share GPU" in found["halves"]
    assert "ranks_per_gpu=2" in found["halves"]
    shared = gpus_of_workers(found["halves, allowed"])
    assert shared in ({"worker-1": ["0", "0"], "worker-2": ["2"]}, {"worker-1": ["0"], "worker-2": ["2", "2"]})


def test_resources_that_cannot_be_had_are_refused_with_what_is_asked_for(found: dict[str, Any]) -> None:
    assert re.search(r"num_ranks=5 needs 5 slots at once, but .* has 4 ", found["too many"])
    assert "spark.task.resource.gpu.amount=0.5" in found["too many"]
    assert "amount: 2 needs to be >= the task resource request amount of 3" in found["three"]
    assert "fpga" in found["fpga"]
    assert "executors of its own (ExecutorResourceRequests)" in found["executors"]
