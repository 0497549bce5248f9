"""What one machine is, and what the environment of a rank on it must hold: interface, threads, GPUs, import path."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from allreduce_spark.launch.gpus import gpu_environment

__all__ = ["host_key", "interface_of", "own_address", "rank_environment", "thread_share"]

_SIOCGIFADDR = 0x8915


def host_key() -> str:
    """A string that two processes have in common exactly if they can share memory through /dev/shm.

    Host names cannot tell: containers may have equal ones, and two names may mean one machine. The boot id names the
    running kernel, the device number the very tmpfs that is mounted at /dev/shm, and the pid namespace decides
    whether two processes can attach to each other.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.stat('/dev/shm').st_dev}/{os.stat('/proc/self/ns/pid').st_ino}"


def own_address(environ: Mapping[str, str] = os.environ) -> tuple[str, str]:
    """The name of this host for Spark, and its address, as far as only the environment says it: IPv4 where there is a choice.

    Raises:
        OSError: The name resolves to nothing.
    """
    name = environ.get("SPARK_LOCAL_IP") or socket.gethostname()
    found = socket.getaddrinfo(name.strip("[]"), None, type=socket.SOCK_STREAM)
    addresses = sorted(found, key=lambda entry: entry[0] != socket.AF_INET)
    return name, str(addresses[0][4][0])


def interface_of(address: str) -> str | None:
    """Name of the network interface that has `address`, or None where no interface has it.

    Found from a real connection's local address, so it is the interface of the route to the other end: on machines with
    a docker bridge, guessing makes libfabric hang.
    """
    if ":" in address:
        return _interface_of_ipv6(address)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                reply = fcntl.ioctl(probe, _SIOCGIFADDR, request)
            except OSError:
                continue  # This interface has no IPv4 address.
            if socket.inet_ntoa(reply[20:24]) == address:
                return name
    return None


def _interface_of_ipv6(address: str) -> str | None:
    packed = socket.inet_pton(socket.AF_INET6, address.partition("%")[0]).hex()
    for line in Path("/proc/net/if_inet6").read_text().splitlines():
        fields = line.split()
        if fields[0] == packed:
            return fields[-1]
    return None


def thread_share(task_cpus: int, local_size: int) -> int:
    """How many threads a rank may keep busy: its part of the host's cores, and never less than its task asked Spark for."""
    return max(1, task_cpus, len(os.sched_getaffinity(0)) // local_size)


def rank_environment(
    inherited: Mapping[str, str], *, threads: int, gpus: Sequence[str] | None, extra: Mapping[str, str]
) -> dict[str, str]:
    """The environment in which a rank process is started.

    Args:
        inherited: The agent's own.
        threads: The rank's share of the cores.
        gpus: Addresses of the GPUs that it may use; None to see what the agent sees.
        extra: Further variables, for example those of PMI; they win.
    """
    environment = dict(inherited)
    # The rank must find what the Python worker finds, --py-files included.
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    environment["PYTHONUNBUFFERED"] = "1"
    environment.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        environment[variable] = str(threads)
    if gpus is not None:
        environment.update(gpu_environment(gpus, inherited))
    environment.update(extra)
    return environment
