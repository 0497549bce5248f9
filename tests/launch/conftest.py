"""A fit without Spark and TensorFlow: a real rendezvous, real agents, and ranks that only behave like ranks."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from allreduce_spark.config import Timeouts
from allreduce_spark.launch.process import RankProcess
from allreduce_spark.launch.warm import WarmProcess
from allreduce_spark.rendezvous.controller import Hooks
from allreduce_spark.rendezvous.group import Failure
from allreduce_spark.rendezvous.protocol import Phase
from allreduce_spark.rendezvous.recovery import Restarts
from allreduce_spark.rendezvous.server import Rendezvous
from allreduce_spark.rendezvous.status import StatusPage

HERE = Path(__file__).parent
WAIT_S = 60.0  # for what takes a second or two on a machine that is not busy
FAST = Timeouts(heartbeat_s=0.1, silence_s=30, teardown_s=20)
KEY = b"k" * 32


def wait_until(is_so: Callable[[], Any], what: str, timeout_s: float = WAIT_S) -> float:
    """Poll until it is so; return how long that took."""
    started = time.monotonic()
    while not is_so():
        assert time.monotonic() - started < timeout_s, f"not within {timeout_s} s: {what}"
        time.sleep(0.01)
    return time.monotonic() - started


class Fit:
    """What one test starts. All its processes carry a mark in their environment, so that none can hide."""

    def __init__(self, disk: Path) -> None:
        self.disk, self.mark = disk, secrets.token_hex(8)
        disk.mkdir()
        self.agents: list[subprocess.Popen[str]] = []
        self.progress: list[dict[str, Any]] = []
        self.result = b""
        self.rendezvous: Rendezvous | None = None
        self.segment = f"/dev/shm/mpich_shm_test{self.mark}_"

    def start(
        self,
        *behaviours: str,
        rows: Sequence[str] = (),
        timeouts: Timeouts = FAST,
        restarts: Restarts | None = None,
        **hooks: Any,
    ) -> None:
        """Start one agent for each behaviour of a rank, on the named rows ("three" by default)."""
        defaults: dict[str, Any] = {
            "approve": lambda joins: {"spec": None},
            "on_progress": self.progress.append,
            "on_result": self._keep,
        }
        self.rendezvous = Rendezvous(len(behaviours), KEY, timeouts, Hooks(**{**defaults, **hooks}), restarts)
        address = self.rendezvous.start("127.0.0.1")
        for rank, behaviour in enumerate(behaviours):
            self.start_agent(address, rank, len(behaviours), behaviour, rows[rank] if rows else "three", timeouts)

    def start_agent(
        self,
        address: Any,
        rank: int,
        num_ranks: int,
        behaviour: str,
        rows: str = "three",
        timeouts: Timeouts = FAST,
        prefix: tuple[str, ...] = (),
    ) -> None:
        fields = {
            "rank": rank,
            "num_ranks": num_ranks,
            "address": address,
            "key": KEY.hex(),
            "timeouts": dataclasses.asdict(timeouts),
            "files": {"behaviour": behaviour},
            "rows": rows,
        }
        self.agents.append(self.process(HERE / "agent_process.py", json.dumps(fields), prefix=prefix))

    def start_with_driver(
        self,
        *behaviours: str,
        rows: str = "three",
        timeouts: Timeouts = FAST,
        stops_itself: bool = False,
        host: str = "127.0.0.1",
        prefixes: Sequence[tuple[str, ...]] = ((), (), ()),
    ) -> subprocess.Popen[str]:
        """The same with a driver in a process of its own, which prints what became of the fit.

        Args:
            stops_itself: Whether it does so when the first piece of the result comes.
            host: Where it listens.
            prefixes: Words before the command of the driver, and of each agent.
        """
        fields = {
            "key": KEY.hex(),
            "host": host,
            "stops_itself": stops_itself,
            "timeouts": dataclasses.asdict(timeouts),
        }
        driver = self.process(HERE / "driver_process.py", json.dumps(fields), prefix=prefixes[0])
        assert driver.stdout is not None
        address = host, int(driver.stdout.readline())
        for rank, behaviour in enumerate(behaviours):
            self.start_agent(address, rank, len(behaviours), behaviour, rows, timeouts, prefixes[rank + 1])
        return driver

    def process(self, program: Path, *arguments: str, prefix: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*prefix, sys.executable, program, *arguments],
            env={**os.environ, "ALLREDUCE_SPARK_TEST": self.mark, "SPARK_LOCAL_DIRS": str(self.disk)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def _keep(self, rank: int, piece: bytes) -> None:
        self.result += piece

    def end(self) -> Failure | None:
        """Wait for the outcome, and for the agents to end; return the failure, if there is one."""
        assert self.rendezvous is not None
        assert self.rendezvous.wait(WAIT_S), "the outcome does not come"
        for agent in self.agents:
            agent.wait(WAIT_S)
        return self.rendezvous.failure

    def agent_errors(self) -> list[str]:
        return [agent.communicate(timeout=WAIT_S)[1] for agent in self.agents]

    def processes(self) -> dict[int, str]:
        """Every living process of this fit: its id and its command line."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (folder / "environ").read_bytes():
                    found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
            except OSError:
                continue  # another user's, or just gone
        return found

    def ranks(self) -> list[int]:
        return [pid for pid, name in self._names() if name.startswith("rank ")]

    def warm_processes(self) -> list[int]:
        """Those that fork the ranks: the same program, by another name."""
        ranks = self.ranks()
        commands = self.processes().items()
        return [pid for pid, command in commands if "-m allreduce_spark.training" in command and pid not in ranks]

    def _names(self) -> Iterator[tuple[int, str]]:
        for pid in self.processes():
            with contextlib.suppress(OSError):  # just gone
                yield pid, Path(f"/proc/{pid}/comm").read_text()

    def wait_for_training(self) -> None:
        """Until all ranks are in the phase `train`."""
        rendezvous = self.rendezvous
        assert rendezvous is not None
        wait_until(
            lambda: (
                len(rendezvous.stations) == len(self.agents)
                and all(station.phase is Phase.TRAIN for station in rendezvous.stations)
            ),
            "all ranks train",
        )

    def folders(self) -> list[Path]:
        return list(self.disk.iterdir())

    def segments(self) -> list[Path]:
        return list(Path("/dev/shm").glob(Path(self.segment).name + "*"))

    def close(self) -> None:
        """Make an end of everything; only what a test has left, or what hangs, is still there."""
        for agent in self.agents:
            agent.kill()
            agent.communicate()
        if self.rendezvous is not None:
            self.rendezvous.close()
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(pid, signal.SIGKILL)
        for segment in self.segments():
            segment.unlink()


@pytest.fixture
def fit(tmp_path):
    one = Fit(tmp_path / "disk")
    yield one
    one.close()


@pytest.fixture
def clean_fit(fit):
    """A fit that must have ended by itself and left nothing: no process, no folder, no shared memory."""
    yield fit
    wait_until(lambda: not fit.processes(), f"all processes are gone: {fit.processes()}")
    assert not fit.folders()
    assert not fit.segments()


@pytest.fixture
def environment_with():
    """Make an environment in which Python imports from a folder first."""
    return lambda folder: {**os.environ, "PYTHONPATH": f"{folder}:{':'.join(filter(None, sys.path))}"}


@pytest.fixture
def warm(tmp_path, environment_with):
    """A warm process whose ranks are light ones."""
    StatusPage(tmp_path / "status")
    with contextlib.closing(WarmProcess(tmp_path, 1, environment_with(HERE / "light"))) as one:
        yield one


@pytest.fixture
def start_rank(tmp_path, warm):
    """Start a rank of some behaviour; it is gone at the end."""
    with contextlib.ExitStack() as ranks:

        def make(behaviour: str, *, rank: int, num_ranks: int) -> RankProcess:
            (tmp_path / "behaviour").write_text(behaviour)
            return ranks.enter_context(contextlib.closing(warm.start_rank(rank, num_ranks)))

        yield make
