"""Scratch folders, of agents, tasks and fits on the driver: private, and gone afterwards, even if the process is killed.

Each folder holds a lock file that its agent keeps locked. The kernel drops the lock when the agent dies, however it dies, so
the next agent on that machine can tell a folder that is in use from one that was left behind, and removes the latter.
Process ids could not tell: they repeat, and containers that share a disk do not share them.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ["note_shared_memory", "release_shared_memory", "scratch_folder"]

log = logging.getLogger(__name__)

PREFIX = "allreduce_spark-"
EXECUTOR_FOLDERS = "blockmgr-*"
_LOCK = "lock"
_SEGMENTS = "shared_memory"


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """Make a folder that only this user can read, on the local disk that Spark uses; remove it at the end.

    Folders that dead agents left there are removed first.
    """
    disks = _local_disks()
    for disk in disks:
        _remove_abandoned(disk)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=disks[0]))  # mkdtemp makes it 0700
    # Locked before it gets its name: whoever finds a lock file that is not locked may remove the folder.
    unnamed = folder / (_LOCK + ".new")
    lock = os.open(unnamed, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    unnamed.rename(folder / _LOCK)
    try:
        yield folder
    finally:
        release_shared_memory(folder)
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def note_shared_memory(folder: Path, segments: set[str]) -> None:
    """Remember shared-memory files that the rank of this folder uses, for whoever has to clear up after it."""
    if segments:
        (folder / _SEGMENTS).write_text("\n".join(sorted(segments)))


def release_shared_memory(folder: Path) -> None:
    """Unlink the shared-memory files that were noted. A rank that ended in peace has done so already."""
    with contextlib.suppress(OSError):
        for segment in (folder / _SEGMENTS).read_text().split():
            # The list may be cut off, where its writer was killed, and must never name anything else.
            if Path(segment).parent != Path("/dev/shm") or not Path(segment).name.startswith("mpich_"):
                continue
            with contextlib.suppress(OSError):
                os.unlink(segment)
                log.info("removed the shared memory %s that a killed rank left", segment)


def _local_disks() -> list[Path]:
    """SPARK_LOCAL_DIRS, which executors set, or the system's temporary folder."""
    return [Path(name) for name in os.environ.get("SPARK_LOCAL_DIRS", "").split(",") if name] or [
        Path(tempfile.gettempdir())
    ]


def _scratch_folders_on(disk: Path) -> Iterator[Path]:
    """Those of this executor, and of others of this machine, of which some may have been killed.

    Spark makes a new folder for each executor, `blockmgr-<uuid>`, beside those of the others.
    """
    executors = disk.parent.glob(EXECUTOR_FOLDERS) if disk.match(EXECUTOR_FOLDERS) else [disk]
    for folder in executors:
        yield from folder.glob(PREFIX + "*")


def _remove_abandoned(disk: Path) -> None:
    for folder in _scratch_folders_on(disk):
        try:
            if folder.lstat().st_uid != os.getuid():
                continue  # In a folder that all users share, another one may have laid anything there for us.
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            continue  # Already gone, or made this very moment and not yet locked.
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue  # Its agent is alive.
        else:
            log.info("removing %s, which a dead agent left", folder)
            release_shared_memory(folder)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)
