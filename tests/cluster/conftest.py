"""A standalone Spark cluster on this machine: a master and two workers, all separate processes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyspark
import pytest

SPARK_HOME = Path(pyspark.__file__).parent
START_S = 60.0


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

    def executors(self) -> list[str]:
        """Folders of all executors that there ever were: worker/application/number."""
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.glob("worker-*/app-*/*/"))


@contextlib.contextmanager
def process(command: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a group of its own, which is gone at the end, with all that it has started in it."""
    with log.open("wb") as output:
        started = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield started
    finally:
        for number, patience_s in ((signal.SIGTERM, 10), (signal.SIGKILL, 10)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(started.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                started.wait(patience_s)


def wait_for_line(log: Path, pattern: str) -> re.Match[str]:
    deadline = time.monotonic() + START_S
    while not (found := re.search(pattern, log.read_text())):
        assert time.monotonic() < deadline, f"no line {pattern!r} within {START_S:.0f} s in:\n{log.read_text()}"
        time.sleep(0.1)
    return found


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
        "SPARK_NO_DAEMONIZE": "1",
        "PYSPARK_PYTHON": sys.executable,
    }
    start = [str(SPARK_HOME / "bin" / "spark-class")]
    master_class, worker_class = ("org.apache.spark.deploy." + name for name in ("master.Master", "worker.Worker"))
    address = ["--host", "127.0.0.1", "--webui-port", "0"]
    with contextlib.ExitStack() as stack:
        log = folder / "master.log"
        stack.enter_context(process([*start, master_class, *address, "--port", "0"], environment, log))
        url = wait_for_line(log, r"Starting Spark master at (spark://\S+)")[1]
        workers = []
        for number in (1, 2):
            size = ["--cores", str(cores), "--memory", "2g", "--work-dir", str(folder / f"worker-{number}")]
            worker_log = folder / f"worker-{number}.log"
            command = [*start, worker_class, *address, *size, url]
            options = {"SPARK_WORKER_OPTS": pretended_gpus(folder / f"discover-{number}", gpus[number - 1])}
            workers.append(stack.enter_context(process(command, {**environment, **options}, worker_log)))
        for number in (1, 2):
            wait_for_line(folder / f"worker-{number}.log", "Successfully registered with master")
        yield Cluster(url, environment, folder, tuple(workers))


def pretended_gpus(script: Path, addresses: tuple[str, ...]) -> str:
    """Options that make a worker believe in GPUs with these addresses."""
    if not addresses:
        return ""
    script.write_text(f"#!/bin/sh\necho '{json.dumps({'name': 'gpu', 'addresses': addresses})}'\n")
    script.chmod(0o755)
    settings = {"amount": len(addresses), "discoveryScript": script}
    return " ".join(f"-Dspark.worker.resource.gpu.{name}={value}" for name, value in settings.items())
