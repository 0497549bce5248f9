"""A standalone Spark cluster on this machine: a master and two workers, all separate processes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for modules that `tests/chaos` uses, too
sys.path.insert(0, str(Path(__file__).parents[1] / "spark"))  # the fit that faults befall is that of the tests there
from standalone import SPARK_HOME, Seat, running_standalone


@dataclass(frozen=True)
class Cluster:
    """A running cluster.

    Attributes:
        url: Of the master.
        environment: In which a driver of this cluster is to be started.
        folder: Where the workers keep the folders of their executors, and executors their local files.
        workers: Their processes, each in a group of its own.
    """

    url: str
    environment: dict[str, str]
    folder: Path
    workers: tuple[subprocess.Popen[bytes], ...]

    def worker_logs(self) -> list[Path]:
        return sorted(self.folder.glob("worker-*.log"))

    def executors(self) -> list[str]:
        """Folders of all executors that there ever were: worker/application/number."""
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.glob("worker-*/app-*/*/"))


@pytest.fixture(scope="session")
def java() -> None:
    if shutil.which("java") is None and "JAVA_HOME" not in os.environ:
        pytest.skip("Java is missing: Spark needs it (apt-get install openjdk-17-jre-headless)")


@pytest.fixture(scope="session")
def cluster(java: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """For tests that leave it as it is."""
    with running_cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def doomed_cluster(java: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """For a file of tests of which the last one may kill workers."""
    with running_cluster(tmp_path_factory.mktemp("doomed-cluster")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def roomy_cluster(java: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """With two cores on each worker, one for a driver of its own, if need be; and with two GPUs each, which are not there."""
    gpus = (("0", "1"), ("2", "3"))
    with running_cluster(tmp_path_factory.mktemp("roomy-cluster"), cores=2, gpus=gpus) as cluster:
        yield cluster


@contextlib.contextmanager
def running_cluster(
    folder: Path, cores: int = 1, gpus: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
) -> Iterator[Cluster]:
    """Workers with so many cores each, and such addresses of GPUs as their discovery scripts tell."""
    environment = {
        **os.environ,
        "SPARK_HOME": str(SPARK_HOME),
        "SPARK_LOCAL_IP": "127.0.0.1",
        "SPARK_LOCAL_DIRS": str(folder / "local"),
        "SPARK_CONF_DIR": str(folder),
        "PYSPARK_PYTHON": sys.executable,
    }
    workers = [
        Seat(f"worker-{number}", cores=cores, options=pretended_gpus(folder / f"discover-{number}", addresses))
        for number, addresses in enumerate(gpus, 1)
    ]
    with running_standalone(folder, environment, Seat("master"), workers) as running:
        yield Cluster(running.url, environment, folder, running.workers)


def pretended_gpus(script: Path, addresses: tuple[str, ...]) -> str:
    """Options that make a worker believe in GPUs with these addresses."""
    if not addresses:
        return ""
    script.write_text(f"#!/bin/sh\necho '{json.dumps({'name': 'gpu', 'addresses': addresses})}'\n")
    script.chmod(0o755)
    settings = {"amount": len(addresses), "discoveryScript": script}
    return " ".join(f"-Dspark.worker.resource.gpu.{name}={value}" for name, value in settings.items())
