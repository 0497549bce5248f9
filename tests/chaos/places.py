"""Where a fit of chaos runs: in one process of Spark, on a standalone cluster, or on hosts that are really namespaces."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyspark

__all__ = ["PLACES", "Place", "disk", "why_not"]

HERE = Path(__file__).parent
SPARK_HOME = Path(pyspark.__file__).parent
START_S = 60.0
NETWORK = "10.213.97"
HUB = f"{NETWORK}.1"


@dataclass(frozen=True)
class Place:
    """Where the driver is to be started.

    Attributes:
        master: Of Spark.
        environment: Of all processes.
        conf: Settings of Spark.
        prefix: Words before the driver's command.
        workers: Worker processes of a cluster.
        hosts: Names of the namespaces: that of master and driver, then those of the workers.
    """

    master: str
    environment: dict[str, str]
    conf: dict[str, str] = field(default_factory=dict)
    prefix: tuple[str, ...] = ()
    workers: tuple[subprocess.Popen[bytes], ...] = ()
    hosts: tuple[str, ...] = ()


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
    with _cluster(folder, environment_of(folder), "127.0.0.1", {"w1": "127.0.0.1", "w2": "127.0.0.1"}, {}, ()) as place:
        yield place


@contextlib.contextmanager
def namespaces(folder: Path) -> Iterator[Place]:
    """The same; each worker is a host of its own: network, name and shared memory. So is the hub, with master and driver.

    The bridge is in the hub, where no firewall of this machine reaches.
    """
    name = f"chaos{os.getpid()}"
    hub, hosts = f"{name}-hub", [f"{name}-w{number}" for number in (1, 2)]
    with contextlib.ExitStack() as stack:
        for host in (hub, *hosts):
            _ip("netns", "add", host)
            stack.callback(_ip, "netns", "del", host)
            _ip("-n", host, "link", "set", "lo", "up")
        _ip("-n", hub, "link", "add", "br0", "type", "bridge")
        _ip("-n", hub, "addr", "add", f"{HUB}/24", "dev", "br0")
        _ip("-n", hub, "link", "set", "br0", "up")
        for number, host in enumerate(hosts, 1):
            _ip("-n", hub, "link", "add", f"port{number}", "type", "veth", "peer", "name", "eth0", "netns", host)
            _ip("-n", hub, "link", "set", f"port{number}", "master", "br0", "up")
            _ip("-n", host, "addr", "add", f"{NETWORK}.{number + 1}/24", "dev", "eth0")
            _ip("-n", host, "link", "set", "eth0", "up")
        addresses = {host: f"{NETWORK}.{number}" for number, host in enumerate((hub, *hosts), 1)}
        prefixes = {host: _on_host(host, address) for host, address in addresses.items()}
        workers = {host: addresses[host] for host in hosts}
        with _cluster(folder, environment_of(folder), HUB, workers, prefixes, prefixes[hub]) as place:
            yield place


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
    for tool in (*(("ip", "unshare") if place == "namespaces" else ()), *needs):
        if tool == "memory cgroup":
            if not os.access("/sys/fs/cgroup/memory/cgroup.procs", os.W_OK):
                return "the memory cgroup (version 1) cannot be written to"
        elif shutil.which(tool) is None:
            return f"{tool} is missing"
    if (place == "namespaces" or needs) and os.geteuid() != 0:
        return "it needs to be root"
    return None


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def _on_host(name: str, address: str) -> tuple[str, ...]:
    script = f'hostname {name} && mount -t tmpfs tmpfs /dev/shm && export SPARK_LOCAL_IP={address} && exec "$@"'
    return "ip", "netns", "exec", name, "unshare", "--uts", "--ipc", "--mount", "sh", "-c", script, "sh"


@contextlib.contextmanager
def _cluster(
    folder: Path,
    environment: dict[str, str],
    address: str,
    workers: dict[str, str],
    prefixes: dict[str, tuple[str, ...]],
    prefix: tuple[str, ...],
) -> Iterator[Place]:
    environment = {**environment, "SPARK_CONF_DIR": str(folder), "SPARK_NO_DAEMONIZE": "1"}
    start = [str(SPARK_HOME / "bin" / "spark-class")]
    master_class, worker_class = ("org.apache.spark.deploy." + name for name in ("master.Master", "worker.Worker"))
    with contextlib.ExitStack() as stack:
        log = folder / "master.log"
        command = [*prefix, *start, master_class, "--host", address, "--port", "0", "--webui-port", "0"]
        stack.enter_context(_process(command, environment, log))
        master = _wait_for_line(log, r"Starting Spark master at (spark://\S+)")[1]
        started = []
        for name, own_address in workers.items():
            size = ["--cores", "1", "--memory", "2g", "--work-dir", str(folder / name)]
            place = ["--host", own_address, "--webui-port", "0"]
            command = [*prefixes.get(name, ()), *start, worker_class, *place, *size, master]
            started.append(stack.enter_context(_process(command, environment, folder / f"{name}.log")))
        for name in workers:
            _wait_for_line(folder / f"{name}.log", "Successfully registered with master")
        conf = {
            "spark.driver.host": address,
            "spark.driver.bindAddress": address,
            "spark.executor.cores": "1",
            "spark.cores.max": "2",
        }
        yield Place(master, environment, conf, prefix, tuple(started), tuple(prefixes))


@contextlib.contextmanager
def _process(command: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output:
        started = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield started
    finally:
        for number in (signal.SIGCONT, signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(started.pid, number)
            if number != signal.SIGCONT:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    started.wait(10)


def _wait_for_line(log: Path, pattern: str) -> re.Match[str]:
    deadline = time.monotonic() + START_S
    while not (found := re.search(pattern, log.read_text())):
        if time.monotonic() > deadline:
            raise TimeoutError(f"no line {pattern!r} within {START_S:.0f} s in:\n{log.read_text()}")
        time.sleep(0.1)
    return found
