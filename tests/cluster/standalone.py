"""Spark's standalone cluster, from what pip installs: a master and workers, each a process with a log in one folder."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyspark

__all__ = ["SPARK_HOME", "Seat", "Standalone", "process", "running_standalone", "wait_for_line"]

SPARK_HOME = Path(pyspark.__file__).parent
START_S = 60.0
PATIENCE_S = 10.0


@dataclass(frozen=True)
class Seat:
    """Where one process of the cluster runs.

    Attributes:
        name: Of its log, and of the folder in which a worker keeps those of its executors.
        address: At which others reach it.
        cores: Slots of a worker.
        prefix: Words before its command.
        options: Java options of a worker.
    """

    name: str
    address: str = "127.0.0.1"
    cores: int = 1
    prefix: tuple[str, ...] = ()
    options: str = ""


@dataclass(frozen=True)
class Standalone:
    """A cluster whose workers are all registered.

    Attributes:
        url: Of the master.
        workers: Processes, each in a group of its own.
    """

    url: str
    workers: tuple[subprocess.Popen[bytes], ...]


@contextlib.contextmanager
def running_standalone(
    folder: Path, environment: dict[str, str], master: Seat, workers: Sequence[Seat]
) -> Iterator[Standalone]:
    """Run a cluster whose logs, and the folders of whose executors, are in `folder`; at the end all is gone.

    Args:
        environment: Of all processes. A process finds its own address in SPARK_LOCAL_IP whatever is set there.
    """
    environment = {
        **environment,
        "SPARK_HOME": str(SPARK_HOME),
        "SPARK_CONF_DIR": str(folder),
        "SPARK_NO_DAEMONIZE": "1",
    }

    def start(seat: Seat, class_name: str, *arguments: str) -> subprocess.Popen[bytes]:
        command = [str(SPARK_HOME / "bin" / "spark-class"), f"org.apache.spark.deploy.{class_name}"]
        place = ["--host", seat.address, "--webui-port", "0"]
        own = {**environment, "SPARK_LOCAL_IP": seat.address, "SPARK_WORKER_OPTS": seat.options}
        return stack.enter_context(
            process([*seat.prefix, *command, *place, *arguments], own, folder / f"{seat.name}.log")
        )

    with contextlib.ExitStack() as stack:
        start(master, "master.Master", "--port", "0")
        url = wait_for_line(folder / f"{master.name}.log", r"Starting Spark master at (spark://\S+)")[1]
        processes = []
        for seat in workers:
            size = ["--cores", str(seat.cores), "--memory", "2g", "--work-dir", str(folder / seat.name)]
            processes.append(start(seat, "worker.Worker", *size, url))
        for seat in workers:
            wait_for_line(folder / f"{seat.name}.log", "Successfully registered with master")
        yield Standalone(url, tuple(processes))


@contextlib.contextmanager
def process(command: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a group of its own, which is gone at the end, stopped or not, with all that it has started in it."""
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
        for number, patience_s in ((signal.SIGCONT, 0.0), (signal.SIGTERM, PATIENCE_S), (signal.SIGKILL, PATIENCE_S)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(started.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                started.wait(patience_s)


def wait_for_line(log: Path, pattern: str) -> re.Match[str]:
    """The first match of a pattern in a log that is still being written.

    Raises:
        TimeoutError: It does not come; says what is in the log instead.
    """
    deadline = time.monotonic() + START_S
    while not (found := re.search(pattern, log.read_text())):
        if time.monotonic() > deadline:
            raise TimeoutError(f"no line {pattern!r} within {START_S:.0f} s in:\n{log.read_text()}")
        time.sleep(0.1)
    return found
