"""Faults: processes that do not go on for a while, or for good, and clocks that jump."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

from fault import fault
from scene import Scene, Settings, processes_of

PAUSE_S = 10.0


@fault()
def stop_rank(scene: Scene) -> None:
    """For a while; the other one waits in a collective."""
    _pause(scene, lambda: [scene.rank(1)])


@fault()
def stop_agent(scene: Scene) -> None:
    """For a while; less than `silence_s`."""
    _pause(scene, lambda: [scene.agent(scene.random.randrange(2))])


@fault()
def stop_driver(scene: Scene) -> None:
    """For a while: Python and Java."""
    _pause(scene, lambda: [pid for pid in processes_of(scene.folder) if pid == scene.driver or _is_java(pid)])


@fault(
    settings=Settings(timeouts={"step_s": 15.0, "stall_warning_s": 5.0}), said=r"the others wait for it|so have ranks"
)
def stop_rank_for_good(scene: Scene) -> None:
    """It is named, killed when `step_s` is over, and replaced."""
    scene.wait_for_a_step()
    pid = scene.rank(1)
    with scene.stopped(pid):
        scene.wait_for(lambda: not Path(f"/proc/{pid}").exists(), "end of the rank that is stopped")


@fault(settings=Settings(clock=True, pace_s=0.1))
def clock_jump(scene: Scene) -> None:
    """The clocks of all processes go on by a day, and later back by a month."""
    scene.wait_for_a_step(last=15)
    scene.strike()
    for jump in (86_400, -30 * 86_400):
        changed = scene.folder / "clock.new"
        changed.write_text(str(jump))
        changed.replace(scene.folder / "clock")
        scene.wait_for_more_steps(10)


def _pause(scene: Scene, whom: Callable[[], list[int]]) -> None:
    scene.wait_for_a_step()
    with scene.stopped(*whom()):
        time.sleep(PAUSE_S)


def _is_java(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip() == "java"
    return False
