"""What MPICH leaves in shared memory; for tests that kill ranks."""

from __future__ import annotations

from pathlib import Path

from allreduce_spark.communicator.mpich import shared_memory_segments

__all__ = ["orphaned_segments"]


def orphaned_segments() -> set[str]:
    """The shared memory of MPICH that no process uses."""
    names = {str(path) for path in Path("/dev/shm").glob("mpich*")}
    return names.difference(*(shared_memory_segments(int(path.name)) for path in Path("/proc").glob("[0-9]*")))
