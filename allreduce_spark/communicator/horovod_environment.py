"""What Horovod needs in an environment, and what an installed one can do. Standard library only; Horovod is not loaded.

An agent, which must never load Horovod itself, prepares its rank with `interface_environment` and tells the driver what
`installed` finds; the rank adds `rank_environment` before it opens the communicator.
"""

from __future__ import annotations

import importlib.util
import json
import mmap
import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from allreduce_spark.errors import MissingDependencyError
from allreduce_spark.world import World

__all__ = [
    "Installation",
    "check_installed",
    "installed",
    "interface_environment",
    "rank_environment",
    "why_unusable",
]

# What only a library built with each of them has in it: names that it imports, or reads from the environment.
_TRACES = {"gloo": b"HOROVOD_GLOO_RENDEZVOUS_ADDR", "mpi": b"MPI_Init_thread", "nccl": b"ncclAllReduce"}


@dataclass(frozen=True)
class Installation:
    """A Horovod that is installed here, with TensorFlow's operations.

    Attributes:
        version: Its own.
        tensorflow: The TensorFlow that it was built against. Its operations are C++, which TensorFlow changes with each minor
            version.
        parts: Which of "gloo", "mpi" and "nccl" it was built with.
    """

    version: str
    tensorflow: str
    parts: frozenset[str]


def installed() -> Installation | None:
    """Look, without loading anything; None where there is no Horovod, or one without operations for TensorFlow."""
    folder = _folder()
    library = next(folder.glob("tensorflow/mpi_lib*.so"), None) if folder else None
    if folder is None or library is None:
        return None
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        parts = frozenset(name for name, trace in _TRACES.items() if content.find(trace) >= 0)
    built_against = json.loads((folder / "metadata.json").read_text()).get("tensorflow", "unknown")
    return Installation(metadata.version("horovod"), built_against, parts)


def _folder() -> Path | None:
    spec = importlib.util.find_spec("horovod")
    return next(map(Path, spec.submodule_search_locations or []), None) if spec else None


def why_unusable(*parts: str) -> str | None:
    """What keeps the Horovod here from being used with all of these parts; None where nothing is known to."""
    found = installed()
    if found is None:
        return "is not installed"
    for part in parts:
        if part not in found.parts:
            return f"was built without {part}"
    tensorflow = _tensorflow_version()
    if tensorflow is not None and tensorflow.split(".")[:2] != found.tensorflow.split(".")[:2]:
        return f"was built for TensorFlow {found.tensorflow}, while {tensorflow} is installed,"
    return None


def _tensorflow_version() -> str | None:
    packages = metadata.packages_distributions().get("tensorflow", [])
    return metadata.version(packages[0]) if packages else None


def check_installed(backend: str) -> None:
    """Make sure that this machine has what a backend needs that is not installed with this library.

    Raises:
        MissingDependencyError: It is "horovod" or "horovod-mpi", and there is no Horovod here that was built for it.
    """
    if backend not in ("horovod", "horovod-mpi"):
        return
    what = why_unusable("mpi" if backend == "horovod-mpi" else "gloo")
    if what is not None:
        raise MissingDependencyError(
            f"backend={backend!r} needs Horovod on every executor, but on {socket.gethostname()} it {what} for "
            f"{sys.executable}. Run there: allreduce-spark install-horovod"
        )


def interface_environment(interface: str | None, given: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables that make Gloo and NCCL talk over one network interface; see `mpich.mpi_environment`."""
    # Without the "=", NCCL would take each interface whose name begins so: eth1 and eth10.
    wanted = {"HOROVOD_GLOO_IFACE": interface, "NCCL_SOCKET_IFNAME": f"={interface}"} if interface else {}
    return {name: value for name, value in wanted.items() if name not in given}


def rank_environment(
    world: World, controller: str, *, gloo_store: tuple[str, int] | None, collective_s: float, longest_s: float
) -> dict[str, str]:
    """What a process must find in its environment to become this rank when Horovod is initialised.

    Args:
        world: The rank's place.
        controller: "gloo" or "mpi": what the ranks agree by, and what sums tensors that are not on a GPU.
        gloo_store: Address and port of Gloo's key-value server; None for MPI, which finds its way by PMI.
        collective_s: How long a tensor of a compiled graph may wait for the other ranks'.
        longest_s: More than any wait has: Gloo kills the process where it loses its patience first.
    """
    place = {
        "RANK": world.rank,
        "SIZE": world.world_size,
        "LOCAL_RANK": world.local_rank,
        "LOCAL_SIZE": world.local_size,
        "HOSTNAME": f"node{world.node_rank}",
        # The group across hosts is for hierarchical algorithms alone, which need equally many ranks on each host.
        "CROSS_RANK": 0,
        "CROSS_SIZE": 1,
    }
    settings = {
        "CONTROLLER": controller,
        "CPU_OPERATIONS": controller,
        "GLOO_TIMEOUT_SECONDS": int(longest_s),
        # Fused is what is worth it when it gets here. What Horovod would fuse, and with it the last bits of sums, depends on
        # when tensors come.
        "FUSION_THRESHOLD": 0,
        # Horovod looks once in each check time, and counts for tensors that it knows from the second look on.
        "STALL_CHECK_TIME_SECONDS": max(1, int(0.1 * collective_s)),
        "STALL_SHUTDOWN_TIME_SECONDS": max(1, int(0.8 * collective_s)),
    }
    if gloo_store:
        settings |= dict(zip(("GLOO_RENDEZVOUS_ADDR", "GLOO_RENDEZVOUS_PORT"), gloo_store, strict=True))
    return {f"HOROVOD_{name}": str(value) for name, value in {**place, **settings}.items()}
