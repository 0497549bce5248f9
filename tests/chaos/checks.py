"""What must hold after every trial: it has ended as it should, with the same weights, and nothing is lost or left behind."""

from __future__ import annotations

import contextlib
import itertools
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import shape
from scene import Scene, processes_of

from allreduce_spark.checkpoint.store import Store

sys.path.insert(0, str(Path(__file__).parents[1] / "spark"))
from leftovers import orphaned_segments, scratch_folders

__all__ = ["leftovers", "longest_pause", "violations"]

GONE_S = 15.0  # until the last process has noticed that its driver is gone


def violations(scene: Scene, exit_code: int | None, error: str | None, said: str | None, reference: Path) -> list[str]:
    """All that is wrong after a trial, in words.

    Args:
        scene: Its driver has ended, or did not in time.
        exit_code: Of the driver; None where it did not end.
        error: What a fit that must not succeed has to say; None for one that must.
        said: What the log has to say in any case.
        reference: The weights of the undisturbed run.
    """
    if exit_code is None:
        return ["it hangs"]
    return [*_wrong_end(scene, exit_code, error, said), *_wrong_weights(scene, exit_code, reference), *_lost(scene)]


def leftovers(scene: Scene, segments_before: set[str]) -> list[str]:
    """Processes, shared memory and folders that nobody needs any more. Of a cluster, master and workers still run."""
    deadline = time.monotonic() + GONE_S
    while left := list(_leftovers(scene, segments_before)):
        if time.monotonic() > deadline:
            return left
        time.sleep(0.1)
    return []


def longest_pause(scene: Scene) -> float | None:
    """Seconds: the longest time without a step, from the fault on, while there were steps to come."""
    if scene.struck_at is None:
        return None
    times = [scene.struck_at, *(step.at for step in scene.steps() if step.at > scene.struck_at)]
    return max((later - earlier for earlier, later in itertools.pairwise(times)), default=None)


def _wrong_end(scene: Scene, exit_code: int, error: str | None, said: str | None) -> Iterator[str]:
    log = scene.log.read_text(errors="replace")
    if error is None and exit_code:
        yield f"the fit failed (exit code {exit_code})"
    elif error is not None and not exit_code:
        yield f"the fit should have failed with {error!r}"
    elif error is not None and not re.search(error, log):
        yield f"the error does not say {error!r}"
    if said is not None and not re.search(said, log):
        yield f"the log does not say {said!r}"


def _wrong_weights(scene: Scene, exit_code: int, reference: Path) -> Iterator[str]:
    if exit_code:
        return
    same_ranks = {step.ranks for step in scene.steps()} == {shape.RANKS}
    with np.load(reference) as expected, np.load(scene.folder / "weights.npz") as found:
        for name in expected.files:
            one, other = expected[name], found[name]
            if same_ranks and not np.array_equal(one, other):
                yield f"{name} has other bits; the largest difference is {np.abs(one - other).max():.3g}"
            elif not np.allclose(one, other, rtol=1e-5, atol=1e-5 * np.abs(one).max()):
                yield f"{name} differs by up to {np.abs(one - other).max():.3g}, though only the number of ranks changed"


def _lost(scene: Scene) -> Iterator[str]:
    """Checkpoints that were complete at some time and are not now, though they were to be kept."""
    store = Store(str(scene.folder / "store"))
    for checkpoint in sorted(scene.seen)[-shape.KEEP :]:
        for problem in store.verify(checkpoint):
            yield f"checkpoint {checkpoint} was complete, and now {problem}"


def _leftovers(scene: Scene, segments_before: set[str]) -> Iterator[str]:
    for pid in processes_of(scene.folder):
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if "org.apache.spark.deploy." not in command:
                yield f"process {pid} is left: {command[:100]}"
    for segment in sorted(orphaned_segments() - segments_before):
        yield f"{segment} is left"
    for folder in (scene.folder / "tmp", scene.folder / "local"):
        for path in sorted(scratch_folders(folder)):
            yield f"{Path(path).relative_to(scene.folder)} is left"
