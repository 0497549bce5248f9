"""What ranks and agents may leave behind; for tests that kill them."""

from __future__ import annotations

import fnmatch
import os
from pathlib import Path

from allreduce_spark.communicator.mpich import shared_memory_segments

__all__ = ["orphaned_segments", "scratch_folders"]


def orphaned_segments() -> set[str]:
    """The shared memory of MPICH that no process uses."""
    names = {str(path) for path in Path("/dev/shm").glob("mpich*")}
    return names.difference(*(shared_memory_segments(int(path.name)) for path in Path("/proc").glob("[0-9]*")))


def scratch_folders(top: str | os.PathLike[str]) -> set[str]:
    """Those of this library, at any depth. Others may remove folders meanwhile, which Python's own `glob` does not bear."""
    return {
        os.path.join(parent, name)
        for parent, names, _ in os.walk(top)
        for name in fnmatch.filter(names, "allreduce_spark-*")
    }
