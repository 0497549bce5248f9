"""One trial, seen from outside: the driver and all that it has started, where the ranks are, and the means to disturb them."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import shape
from places import Place
from proxy import Proxy

__all__ = ["Scene", "Settings", "Step", "environment_of", "parent_of", "processes_of", "run"]

T = TypeVar("T")

HERE = Path(__file__).parent
PATIENCE_S = 90.0  # for what a fault waits for before it strikes


class Step(NamedTuple):
    """What a rank has written down of one of its steps: when (monotonic), which one of the fit, its pid, how many ranks."""

    at: float
    number: int
    pid: int
    ranks: int


@dataclass(frozen=True)
class Settings:
    """How the fit of a trial is set up.

    Attributes:
        pace_s: What a step takes longer than it must, so that there is time to strike.
        elastic: For faults after which there may be fewer ranks: nothing is drawn at random within a step.
        timeouts: Fields of `Timeouts`.
        hold: (point, rank): where a process is to stop, and say so. See `inside/sitecustomize.py`.
        hold_after: The range from which it is drawn how often the place is passed before.
        disk_bytes: Size of a file system of its own for the agents' scratch folders.
        clock: Whether the clock can be shifted.
    """

    pace_s: float = 0.05
    elastic: bool = False
    timeouts: dict[str, float] = field(default_factory=dict)
    hold: tuple[str, int] | None = None
    hold_after: tuple[int, int] = (0, 0)
    disk_bytes: int | None = None
    clock: bool = False


class Scene:
    """A fit that is to be disturbed.

    Args:
        folder: Of this trial alone.
        place: Where the driver runs, and its executors.
        settings: How the fit is set up.
        seed: Of all that is random about the fault.
        backend: What the ranks reduce by.
    """

    def __init__(self, folder: Path, place: Place, settings: Settings, seed: int, backend: str) -> None:
        self.folder, self.place, self.settings, self.backend = folder, place, settings, backend
        self.random = random.Random(seed)
        self.struck_at: float | None = None
        self.seen: set[str] = set()  # ids of checkpoints that were complete at some time
        self._watching = threading.Event()
        self._watcher = threading.Thread(target=self._watch_store, daemon=True)
        self._driver: subprocess.Popen[bytes] | None = None
        self.proxy: Proxy  # where a fault has one

    # The driver.

    def start(self, *, resume: str = "never") -> None:
        """Start the driver; a second time, after it has ended, to go on from its checkpoints."""
        settings = {
            "master": self.place.master,
            "conf": self.place.conf,
            "pace_s": self.settings.pace_s,
            "elastic": self.settings.elastic,
            "timeouts": self.settings.timeouts,
            "resume": resume,
            "backend": self.backend,
        }
        (self.folder / "settings.json").write_text(json.dumps(settings))
        if self._driver is None:
            if self.settings.hold:
                point, rank = self.settings.hold
                after = self.random.randint(*self.settings.hold_after)
                (self.folder / "hold.json").write_text(json.dumps({"point": point, "rank": rank, "after": after}))
            if self.settings.clock:
                (self.folder / "clock").write_text("0")
            self._watcher.start()
        with self.log.open("ab") as log:
            self._driver = subprocess.Popen(
                [*self.place.prefix, sys.executable, str(HERE / "program.py"), str(self.folder)],
                env=self.place.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def go_on_without(self, driver: int, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Kill the driver; when all its processes are gone, do something, and start another one."""
        self.kill(driver)
        self.wait_for_the_end(PATIENCE_S)
        deadline = time.monotonic() + PATIENCE_S
        while left := processes_of(self.folder):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{PATIENCE_S:.0f} s after the driver there still are processes {left}")
            time.sleep(0.1)
        meanwhile()
        self.start(resume="auto")

    @property
    def log(self) -> Path:
        """What the driver has printed."""
        return self.folder / "driver.log"

    @property
    def driver(self) -> int:
        """Its pid."""
        assert self._driver is not None
        return self._driver.pid

    def wait_for_the_end(self, limit_s: float) -> int | None:
        """The driver's exit code; None where it does not end in time."""
        assert self._driver is not None
        try:
            return self._driver.wait(limit_s)
        except subprocess.TimeoutExpired:
            return None

    def close(self) -> None:
        """End whatever still runs."""
        self._watching.set()
        for pid in processes_of(self.folder):
            self.send(signal.SIGCONT, pid)
            self.send(signal.SIGKILL, pid)
        if self._driver is not None:
            self._driver.wait()

    # Where things are.

    def wait_for(self, look: Callable[[], T | None], what: str) -> T:
        """Look again and again until there is something to see.

        Raises:
            TimeoutError: It does not come, or the driver has ended.
        """
        deadline = time.monotonic() + PATIENCE_S
        while not (found := look()):
            if self._driver is not None and self._driver.poll() is not None:
                raise TimeoutError(f"the driver ended before there was {what}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"there was no {what} within {PATIENCE_S:.0f} s")
            time.sleep(0.005)
        return found

    def steps(self, rank: int = 0) -> list[Step]:
        """What a rank has written down, in all its lives."""
        with contextlib.suppress(FileNotFoundError):
            lines = (self.folder / f"steps-{rank}").read_text().splitlines()
            return [
                Step(float(at), int(number), int(pid), int(ranks)) for at, number, pid, ranks in map(str.split, lines)
            ]
        return []

    def wait_for_a_step(self, first: int = 3, last: int = shape.STEPS * shape.EPOCHS // 2) -> None:
        """Wait until rank 0 has taken a number of steps that is drawn from the range."""
        wanted = self.random.randint(first, last)
        self.wait_for(lambda: len(self.steps()) >= wanted and self.steps(1), f"step {wanted}")

    def wait_for_more_steps(self, count: int) -> None:
        """Wait until rank 0 has taken some more."""
        wanted = len(self.steps()) + count
        self.wait_for(lambda: len(self.steps()) >= wanted, f"step {wanted}")

    def rank(self, number: int) -> int:
        """The pid of a rank."""
        return self.steps(number)[-1].pid

    def agent(self, number: int) -> int:
        """The pid of its agent, which is the Python worker of the barrier task: between them is the warm process."""
        return parent_of(parent_of(self.rank(number)))

    def executor(self, number: int) -> int:
        """The pid of the JVM that runs its task: the parent of the daemon of which workers are forked."""
        return parent_of(parent_of(self.agent(number)))

    def children(self, parent: int) -> list[int]:
        """Those of a process that belong to this trial."""
        found = []
        for pid in processes_of(self.folder):
            with contextlib.suppress(OSError):
                if parent_of(pid) == parent:
                    found.append(pid)
        return found

    def rendezvous(self) -> tuple[str, int]:
        """The driver's address, as agents are told it."""
        file = self.folder / "driver-address"
        host, port = json.loads(self.wait_for(lambda: file.exists() and file.read_text(), "address of the driver"))
        return host, port

    def checkpoints(self) -> list[str]:
        """Ids of those that are complete, oldest first."""
        return sorted(path.parent.name for path in (self.folder / "store").glob("*/manifest.json"))

    def held(self) -> int:
        """The pid of the process that has stopped where `Settings.hold` says."""
        file = self.folder / "held"
        return int(self.wait_for(lambda: file.exists() and file.read_text(), "process at the place to hold"))

    def release(self) -> None:
        """Let it go on."""
        (self.folder / "released").touch()

    # What can be done to them.

    def strike(self) -> None:
        """The fault happens now; from here the time is taken."""
        self.struck_at = self.struck_at or time.monotonic()

    def send(self, number: int, *pids: int) -> None:
        """Send a signal to each that is still there."""
        for pid in pids:
            if pid < 2:
                raise ValueError(f"{pid} is not the pid of a process of this trial")
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill(self, *pids: int) -> None:
        self.strike()
        self.send(signal.SIGKILL, *pids)

    @contextlib.contextmanager
    def stopped(self, *pids: int) -> Iterator[None]:
        """Nobody can tell a stopped process from a slow one."""
        self.strike()
        self.send(signal.SIGSTOP, *pids)
        try:
            yield
        finally:
            self.send(signal.SIGCONT, *pids)

    def stranger(self) -> socket.socket:
        """A connection to the driver's port by somebody who has no key."""
        return socket.create_connection(self.rendezvous(), timeout=10)

    def _watch_store(self) -> None:
        while not self._watching.wait(0.02):
            self.seen.update(self.checkpoints())


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/status").read_text().split("PPid:")[1].split()[0])


def environment_of(pid: int) -> dict[str, str]:
    """With which a process was started."""
    words = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    return dict(word.split("=", 1) for word in words if "=" in word)


def processes_of(folder: Path) -> list[int]:
    """All processes that were started for a trial: its folder is in their environment."""
    marker = f"CHAOS_FOLDER={folder}\0".encode()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if marker in (process / "environ").read_bytes() + b"\0":
                found.append(int(process.name))
    return [pid for pid in found if pid != os.getpid()]


def run(command: Sequence[str], **arguments: Any) -> None:
    """Run a command of the system that must work."""
    subprocess.run(command, check=True, capture_output=True, **arguments)
