"""Each backend ends with the weights of MPI in local mode: on a standalone cluster, in a script and under spark-submit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import each_backend as program
import pyspark
import pytest

from allreduce_spark.communicator.horovod_environment import installed

pytestmark = [pytest.mark.spark, pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(600)]

SUBMIT = str(Path(pyspark.__file__).parent / "bin" / "spark-submit")
PROGRAM = str(program.__file__)
BACKENDS = ["mpi", *(["horovod", "horovod-mpi"] if installed() else [])]
RUN_S = 250.0
each_backend = pytest.mark.parametrize("backend", ["mpi", "horovod", "horovod-mpi"])


def run(command: list[str], environment: dict[str, str] | None = None) -> None:
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=RUN_S, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.fixture(scope="module")
def in_local_mode(java: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("local")
    run([sys.executable, PROGRAM, str(folder), "local[2]", "mpi"])
    return folder


@pytest.fixture(scope="module")
def in_a_script(cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("script")
    run([sys.executable, PROGRAM, str(folder), cluster.url, *BACKENDS], cluster.environment)
    return folder


@pytest.fixture(scope="module")
def under_spark_submit(cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("submitted")
    run([SUBMIT, "--master", cluster.url, PROGRAM, str(folder), "submitted", *BACKENDS], cluster.environment)
    return folder


def check_weights(folder: Path, backend: str, reference: Path) -> None:
    if backend not in BACKENDS:
        pytest.skip("Horovod is not installed: allreduce-spark install-horovod")
    program.check_same_weights(folder / f"{backend}.npz", reference / "mpi.npz")


@each_backend
@pytest.mark.support(place="standalone")
def test_in_a_script(in_a_script: Path, in_local_mode: Path, backend: str) -> None:
    check_weights(in_a_script, backend, in_local_mode)


@each_backend
@pytest.mark.support(place="spark-submit")
def test_under_spark_submit(under_spark_submit: Path, in_local_mode: Path, backend: str) -> None:
    check_weights(under_spark_submit, backend, in_local_mode)
