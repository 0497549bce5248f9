"""The doctor's look at the machine itself: network, shared memory, disk, cores, GPUs."""

from __future__ import annotations

import glob
import ipaddress
import os
import shutil
import socket
import tempfile
from collections.abc import Mapping
from pathlib import Path

from allreduce_spark.cli.result import Result, fail, ok, warn

__all__ = ["check_cores", "check_disk", "check_gpus", "check_network", "check_shared_memory", "leftovers"]

GIB, MIB = 1024**3, 1024**2


def check_network(environ: Mapping[str, str] = os.environ) -> Result:
    # Not at the top: this file must load before anything is installed, whatever the room below comes to need.
    from allreduce_spark.launch.environment import interface_of, own_address

    try:
        name, address = own_address(environ)
    except OSError:
        name = environ.get("SPARK_LOCAL_IP") or socket.gethostname()
        return warn(
            f"the name of this host, {name!r}, resolves to nothing",
            f"Spark may not start: add {name!r} to /etc/hosts, or set SPARK_LOCAL_IP to an address of this host.",
        )
    interface = interface_of(address)
    if ipaddress.ip_address(address.partition("%")[0]).is_loopback:
        return warn(
            f"{name} is {address}, which no other host can reach",
            "All is well for local[N]. On a cluster set SPARK_LOCAL_IP to this host's address in its network.",
        )
    if interface is None:
        return warn(
            f"{name} is {address}, which no network interface of this host has",
            "Executors could not reach a driver here: correct /etc/hosts or the DNS, or set SPARK_LOCAL_IP.",
        )
    return ok(f"{name} is {address} on {interface}")


def check_shared_memory(folder: str = "/dev/shm") -> Result:
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        return fail(
            f"{folder} is missing or not writable",
            "Ranks of one host exchange their gradients through it: mount a tmpfs there.",
        )
    free = shutil.disk_usage(folder).free
    if free < 256 * MIB:
        return warn(
            f"{free // MIB} MiB free in {folder}",
            "Ranks of one host exchange their gradients through it. A Docker container gets more by --shm-size=1g.",
        )
    found = f"{free / GIB:.1f} GiB free in {folder}"
    left = leftovers(folder)
    if left:
        return warn(
            f"{found}, but {len(left)} segments there belong to no running process of yours",
            f"Killed MPI programs left them. If nobody else runs one on this host: rm {folder}/mpich_*",
        )
    return ok(found)


def leftovers(folder: str) -> list[str]:
    """MPICH's shared-memory segments that no process we may look at has mapped."""
    segments = sorted(glob.glob(f"{folder}/mpich_*"))
    for maps in glob.glob("/proc/[0-9]*/maps") if segments else []:
        try:
            mapped = Path(maps).read_text()
        except OSError:  # another user's process, or one that has just ended
            continue
        segments = [segment for segment in segments if segment not in mapped]
    return segments


def check_disk(environ: Mapping[str, str] = os.environ) -> Result:
    folder = environ.get("SPARK_LOCAL_DIRS", "").split(",")[0] or tempfile.gettempdir()
    if not os.access(folder, os.W_OK):
        return fail(f"{folder} is missing or not writable", "Set SPARK_LOCAL_DIRS or TMPDIR to a disk of this host.")
    free = shutil.disk_usage(folder).free
    found = f"{free / GIB:.1f} GiB free in {folder}"
    advice = (
        "Ranks write their rows there before they train. Make room, or set SPARK_LOCAL_DIRS or TMPDIR to another disk."
    )
    if free < GIB:
        return fail(found, advice)
    return warn(found, advice) if free < 5 * GIB else ok(found)


def check_cores(count: int | None = None) -> Result:
    count = count or len(os.sched_getaffinity(0))
    if count == 1:
        return warn("1", "A rank that waits keeps its core busy: two ranks on one core work, but slowly.")
    return ok(f"{count}: room for {count} ranks")


def check_gpus(
    environ: Mapping[str, str] = os.environ, devices: Path = Path("/dev"), driver: Path = Path("/proc/driver/nvidia")
) -> Result:
    from allreduce_spark.cli.software import keras_backend
    from allreduce_spark.launch.gpus import machine_gpus, why_tensorflow_has_none

    there, seen = machine_gpus({}, devices), machine_gpus(environ, devices)
    if not there and (driver / "version").exists():
        return warn(
            "NVIDIA's driver is loaded, but there is no GPU in /dev",
            "A container is given GPUs when it is started: docker run --gpus all, with NVIDIA's container toolkit.",
        )
    if not there:
        return ok("none: ranks train on processors")
    if not seen:
        return ok(
            f"{len(there)}, hidden by CUDA_VISIBLE_DEVICES={environ['CUDA_VISIBLE_DEVICES']!r}: ranks train on processors"
        )
    problem = why_tensorflow_has_none(environ) if keras_backend(environ)[0] == "tensorflow" else None
    if problem is not None:
        return warn(
            f"{len(seen)}, but {problem}: ranks train on processors",
            "pip install 'tensorflow[and-cuda]', in the place of tensorflow-cpu, or see TensorFlow's page on GPUs.",
        )
    if "spark.task.resource.gpu.amount" not in _spark_defaults(environ):
        return warn(
            f"{len(seen)}, of which the defaults of Spark here say nothing",
            "All is well for one fit at a time: each rank takes the GPU of its local rank. On a cluster let Spark assign them: "
            "spark.worker.resource.gpu.amount and .discoveryScript for standalone workers, spark.executor.resource.gpu.amount "
            "and spark.task.resource.gpu.amount=1 for the application.",
        )
    return ok(f"{len(seen)}, which Spark assigns to tasks")


def _spark_defaults(environ: Mapping[str, str]) -> str:
    """Spark's file of settings; "" where there is none. Those of spark-submit and of a session are not known here."""
    folder = environ.get("SPARK_CONF_DIR") or os.path.join(environ.get("SPARK_HOME", ""), "conf")
    try:
        return Path(folder, "spark-defaults.conf").read_text()
    except OSError:
        return ""
