"""What a fit finds out about the Spark application it runs in."""

from __future__ import annotations

import os
import sys
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tensorflow as tf
from pyspark.resource import ResourceProfileBuilder, TaskResourceRequests
from pyspark.sql import SparkSession

from allreduce_spark import AllReduceEstimator, SparkModel, Timeouts, run
from allreduce_spark.errors import ConfigError
from allreduce_spark.launch import gpus
from allreduce_spark.spark import cluster, inference
from allreduce_spark.spark.classic import ClassicEngine
from allreduce_spark.training import cores

pytestmark = pytest.mark.spark


def test_on_one_machine_the_first_call_of_a_session_runs_this_python(
    spark: SparkSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYSPARK_PYTHON", raising=False)
    monkeypatch.setattr(spark.sparkContext, "pythonExec", "python3-of-another-environment")
    assert cluster.active_context() is spark.sparkContext
    assert spark.sparkContext.pythonExec == sys.executable


def test_a_python_that_the_user_chose_is_left_alone(spark: SparkSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYSPARK_PYTHON", "/opt/python")
    monkeypatch.setattr(spark.sparkContext, "pythonExec", "/opt/python")
    cluster.active_context()
    assert spark.sparkContext.pythonExec == "/opt/python"


def test_all_slots_are_taken_where_num_ranks_is_not_given(spark: SparkSession) -> None:
    assert cluster.count_slots(spark.sparkContext) == 2
    assert cluster.check_cluster(spark.sparkContext, None, Timeouts()) == 2


@pytest.mark.parametrize(
    ("num_ranks", "min_ranks", "expected"),
    [(None, None, 2), (None, 1, 2), (None, 2, 2), (1, None, 1), (4, 1, 4), (2, 2, 2)],
)
def test_min_ranks_says_how_few_slots_will_do_and_not_how_many_ranks_a_fit_has(
    spark: SparkSession, monkeypatch: pytest.MonkeyPatch, num_ranks: int | None, min_ranks: int | None, expected: int
) -> None:
    fits = []
    monkeypatch.setattr(ClassicEngine, "fit", lambda self, fit, display: fits.append(fit))
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    SparkModel(model, num_ranks).fit((np.ones((4, 1)), np.ones((4, 1))), min_ranks=min_ranks, verbose=0)
    assert fits[0].num_ranks == expected


def test_min_ranks_of_which_there_cannot_be_so_many_are_refused(spark: SparkSession) -> None:
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    rows = np.ones((4, 1)), np.ones((4, 1))
    with pytest.raises(ConfigError, match=r"min_ranks=4 is more than num_ranks=2.*lower min_ranks to 2 or less"):
        SparkModel(model, num_ranks=2).fit(rows, min_ranks=4, verbose=0)
    with pytest.raises(
        ConfigError, match=r"min_ranks=3 needs 3 slots at once, .* has 2 .*lower min_ranks to 2 or fewer"
    ):
        SparkModel(model).fit(rows, min_ranks=3, verbose=0)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"spark.driver.host": "10.0.0.1"}, ("10.0.0.1", "10.0.0.1")),
        ({"spark.driver.host": "driver", "spark.driver.bindAddress": "0.0.0.0"}, ("0.0.0.0", "driver")),
        ({"spark.driver.host": "[fd00::1]", "spark.driver.bindAddress": "[::]"}, ("::", "fd00::1")),
    ],
)
def test_addresses_of_the_driver_are_taken_from_spark_without_the_brackets_of_ipv6(
    settings: dict[str, str], expected: tuple[str, str]
) -> None:
    context = SimpleNamespace(master="spark://anywhere:7077", getConf=lambda: settings)
    assert cluster.driver_addresses(context) == expected


def test_resources_that_no_task_here_can_have_are_refused(spark: SparkSession, monkeypatch: pytest.MonkeyPatch) -> None:
    one_gpu = ResourceProfileBuilder().require(TaskResourceRequests().cpus(1).resource("gpu", 1)).build
    with pytest.raises(
        ConfigError, match=r"Spark \(master local\[2\]\) has no tasks with these resources: .*Standalone"
    ):
        run(lambda communicator: None, resources=one_gpu)
    for resources in ("gpu", {"gpu": 1}):
        with pytest.raises(ConfigError, match=r"resources must be a pyspark\.resource\.ResourceProfile, got"):
            AllReduceEstimator(resources=resources)
    with pytest.raises(ConfigError, match="ranks_per_gpu must be at least 1, got 0"):
        run(lambda communicator: None, ranks_per_gpu=0)
    # Spark 4.3 takes such a job in local mode, and its tasks never start.
    settings = spark.sparkContext.getConf().set("spark.task.resource.gpu.amount", "1")
    monkeypatch.setattr(spark.sparkContext, "getConf", lambda: settings)
    with pytest.raises(ConfigError, match=r"wait for ever.*spark\.task\.resource\.gpu\.amount=1"):
        run(lambda communicator: None, num_ranks=2)


def test_an_estimator_keeps_its_resources_and_does_not_write_them(spark: SparkSession, tmp_path: Path) -> None:
    one_gpu = ResourceProfileBuilder().require(TaskResourceRequests().resource("gpu", 1)).build
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    estimator = AllReduceEstimator(model=model, resources=one_gpu, ranksPerGpu=2)
    assert estimator.copy().getResources() is one_gpu
    with pytest.warns(UserWarning, match="resources cannot be written to a file"):
        estimator.write().save(str(tmp_path / "estimator"))
    loaded = AllReduceEstimator.load(str(tmp_path / "estimator"))
    assert not loaded.isSet("resources")
    assert loaded.getRanksPerGpu() == 2


def test_a_driver_that_leaves_no_memory_to_its_ranks_is_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    growth = {"GPU:0": True, "GPU:1": True}
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: list(growth))
    monkeypatch.setattr(tf.config.experimental, "get_memory_growth", growth.get)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cores.warn_if_gpus_are_taken({})
        growth["GPU:1"] = False
        cores.warn_if_gpus_are_taken({"TF_FORCE_GPU_ALLOW_GROWTH": "true"})
    with pytest.warns(UserWarning, match="TensorFlow takes nearly .* set TF_FORCE_GPU_ALLOW_GROWTH=true"):
        cores.warn_if_gpus_are_taken({})


def test_a_driver_on_jax_is_warned_likewise(monkeypatch: pytest.MonkeyPatch) -> None:
    platforms = ["cpu"]
    jax = SimpleNamespace(devices=lambda: [SimpleNamespace(platform=platform) for platform in platforms])
    monkeypatch.setitem(sys.modules, "jax", jax)
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cores.warn_if_gpus_are_taken({})
        platforms.append("gpu")
        cores.warn_if_gpus_are_taken({"XLA_PYTHON_CLIENT_PREALLOCATE": "false"})
        cores.warn_if_gpus_are_taken({"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"})
    with pytest.warns(UserWarning, match="JAX takes nearly .* set XLA_PYTHON_CLIENT_PREALLOCATE=false"):
        cores.warn_if_gpus_are_taken({})


def test_a_task_of_predict_shows_cuda_its_own_gpu_and_leaves_the_worker_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []

    def use_cores(threads: int) -> None:
        seen.append((threads, os.environ.get("CUDA_VISIBLE_DEVICES")))

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("KERAS_BACKEND", "tensorflow")
    monkeypatch.setattr(cores, "use_cores", use_cores)
    monkeypatch.setattr(gpus, "machine_gpus", lambda environ: ("0", "1"))
    monkeypatch.setattr(gpus, "why_tensorflow_has_none", lambda environ: None)
    for partition, resources in ((5, {}), (5, {"gpu": SimpleNamespace(addresses=["3"])})):
        task = SimpleNamespace(cpus=lambda: 2, partitionId=partial(int, partition), resources=lambda r=resources: r)
        monkeypatch.setattr(inference, "task_context", lambda task=task: task)
        inference._prepare_keras({"KERAS_BACKEND": "tensorflow"})
    assert seen == [(2, "1"), (2, "3")]
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
