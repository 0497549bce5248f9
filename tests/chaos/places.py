"""Where a fit of chaos runs: in one process of Spark, on a standalone cluster, or on hosts that are really namespaces."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "cluster"))
from hosts import Host, Network, running_hosts, why_no_hosts
from standalone import SPARK_HOME, Seat, running_standalone

__all__ = ["PLACES", "Place", "disk", "why_not"]

HERE = Path(__file__).parent
INTERFACE = "eth0"


@dataclass(frozen=True)
class Place:
    """Where the driver is to be started.

    Attributes:
        master: Of Spark.
        environment: Of all processes.
        conf: Settings of Spark.
        prefix: Words before the driver's command.
        workers: Worker processes of a cluster.
        hosts: That of master and driver, then those of the workers; none where all is on this machine.
    """

    master: str
    environment: dict[str, str]
    conf: dict[str, str] = field(default_factory=dict)
    prefix: tuple[str, ...] = ()
    workers: tuple[subprocess.Popen[bytes], ...] = ()
    hosts: tuple[Host, ...] = ()


def environment_of(folder: Path) -> dict[str, str]:
    """An environment by which all processes of the trial can be told from others, and with its own temporary folder."""
    for name in ("tmp", "local"):
        (folder / name).mkdir(exist_ok=True)
    path = [str(HERE / "inside"), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {
        **os.environ,
        "CHAOS_FOLDER": str(folder),
        "JAVA_TOOL_OPTIONS": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC",  # a JVM that lives for seconds starts in half the time
        "PYTHONPATH": os.pathsep.join(path),
        "PYSPARK_PYTHON": sys.executable,
        "SPARK_HOME": str(SPARK_HOME),
        "SPARK_LOCAL_DIRS": str(folder / "local"),
        "SPARK_LOCAL_IP": "127.0.0.1",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "TMPDIR": str(folder / "tmp"),
    }


@contextlib.contextmanager
def local(folder: Path) -> Iterator[Place]:
    """Driver and executor are one process."""
    yield Place("local[2]", environment_of(folder))


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[Place]:
    """A master and two workers with a core each."""
    with _cluster(folder, Seat("master"), [Seat("w1"), Seat("w2")]) as place:
        yield place


@contextlib.contextmanager
def namespaces(folder: Path) -> Iterator[Place]:
    """The same, on three hosts: that of master and driver, and one of each worker."""
    names = ("hub", "w1", "w2")
    with running_hosts(folder, names, [Network(INTERFACE, "10.213.97.")]) as hosts:
        master, *workers = (Seat(host.name, host.addresses[INTERFACE], prefix=host.enter) for host in hosts)
        with _cluster(folder, master, workers) as place:
            yield dataclasses.replace(place, hosts=hosts)


@contextlib.contextmanager
def disk(folder: Path, size: int) -> Iterator[None]:
    """A file system in memory, mounted over a folder."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


PLACES = {"local": local, "cluster": cluster, "namespaces": namespaces}


def why_not(place: str, needs: tuple[str, ...]) -> str | None:
    """Why this machine cannot run a fault; None where it can."""
    if place == "namespaces" and (reason := why_no_hosts()):
        return reason
    for tool in needs:
        if tool == "memory cgroup":
            if not os.access("/sys/fs/cgroup/memory/cgroup.procs", os.W_OK):
                return "the memory cgroup (version 1) cannot be written to"
        elif shutil.which(tool) is None:
            return f"{tool} is missing"
    if needs and os.geteuid() != 0:
        return "it needs to be root"
    return None


@contextlib.contextmanager
def _cluster(folder: Path, master: Seat, workers: Sequence[Seat]) -> Iterator[Place]:
    environment = environment_of(folder)
    with running_standalone(folder, environment, master, workers) as running:
        conf = {
            "spark.driver.host": master.address,
            "spark.driver.bindAddress": master.address,
            "spark.executor.cores": "1",
            "spark.cores.max": "2",
        }
        driver = {**environment, "SPARK_LOCAL_IP": master.address}
        yield Place(running.url, driver, conf, master.prefix, running.workers)
