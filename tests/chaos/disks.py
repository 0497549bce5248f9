"""Faults: disks that are full, and what is on them damaged."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import shape
from fault import fault
from places import disk
from scene import Scene, Settings

SLOW = Settings(pace_s=0.1)


@contextlib.contextmanager
def small_disk(scene: Scene) -> Iterator[None]:
    """The agents' scratch folders have a file system of their own."""
    with disk(scene.folder / "local", 64 << 20):
        yield


@fault(needs=("mount",), around=small_disk, settings=SLOW, said="is given up, and training goes on")
def disk_full_at_a_checkpoint(scene: Scene) -> None:
    """There is no room for one for some steps; the training goes on, and later there are others."""
    scene.wait_for_a_step(last=20)
    scene.wait_for(scene.checkpoints, "checkpoint")
    ballast = scene.folder / "local" / "ballast"
    scene.strike()
    _fill(ballast)
    for share in (scene.folder / "local").glob("allreduce_spark-*/checkpoints/spare-*"):
        share.unlink(missing_ok=True)  # else it would be written over, for which there is always room
    _fill(ballast)
    scene.wait_for_more_steps(3 * shape.EVERY_STEPS)
    ballast.unlink()
    before = scene.checkpoints()[-1]
    scene.wait_for(lambda: scene.checkpoints()[-1] > before, "checkpoint after there was room again")


@fault(needs=("mount",), around=small_disk, settings=Settings(hold=("spool", -1)), error=r"No space left on device")
def disk_full_at_the_spool(scene: Scene) -> None:
    """There is no room for the rows: nothing can be done but to say so."""
    scene.held()
    scene.strike()
    _fill(scene.folder / "local" / "ballast")
    scene.release()


@fault(said="falling back to the one before")
def damaged_checkpoint(scene: Scene) -> None:
    """A bit of the newest one has changed on the disk while there was no driver."""
    scene.wait_for_a_step(first=3 * shape.EVERY_STEPS)
    scene.wait_for(lambda: len(scene.checkpoints()) > 1, "second checkpoint")

    def damage() -> None:
        share = scene.random.choice(sorted((scene.folder / "store" / scene.checkpoints()[-1]).glob("share-*")))
        content = bytearray(share.read_bytes())
        content[scene.random.randrange(len(content))] ^= 1
        share.write_bytes(content)

    scene.go_on_without(scene.driver, damage)


def _fill(path: Path) -> None:
    """Write until there is no room."""
    with contextlib.suppress(OSError), path.open("ab", buffering=0) as file:
        for piece in (1 << 20, 1 << 12):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(piece))
