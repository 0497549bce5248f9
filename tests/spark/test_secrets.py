"""The key of a real fit, while it runs, is nowhere that another user of the machine, or a reader of Spark's pages, can look."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import signal
import stat
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from waiting import wait_until

pytestmark = pytest.mark.spark

WAIT_S = 120.0
PROGRAM = Path(__file__).with_name("known_key.py")
MARK = "ALLREDUCE_SPARK_TEST"
PAGES = ("jobs/", "stages/", "storage/", "environment/", "executors/", "executors/threadDump/?executorId=driver")
REPORTS = ("jobs", "stages?details=true", "storage/rdd", "environment", "allexecutors", "executors/driver/threads")


class Driver:
    """The driver of `known_key`, with a folder in which it leaves everything that it writes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.key, self.mark = folder, secrets.token_bytes(32), secrets.token_hex(8)
        for name in ("tmp", "local", "events"):
            (folder / name).mkdir()
        self.log = (folder / "log").open("wb")
        environment = {"TMPDIR": str(folder / "tmp"), "SPARK_LOCAL_DIRS": str(folder / "local"), MARK: self.mark}
        self.process = subprocess.Popen(
            [sys.executable, str(PROGRAM), str(folder)],
            env={**os.environ, "PYSPARK_PYTHON": sys.executable, **environment},
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            umask=0o022,
        )
        assert self.process.stdin is not None
        self.process.stdin.write(self.key.hex().encode() + b"\n")
        self.process.stdin.flush()

    def wait_for(self, *names: str) -> None:
        deadline = time.monotonic() + WAIT_S
        while not all((self.folder / name).exists() for name in names):
            assert self.process.poll() is None, (self.folder / "log").read_text()[-5000:]
            assert time.monotonic() < deadline, f"{names} do not come:\n{(self.folder / 'log').read_text()[-5000:]}"
            time.sleep(0.05)

    def processes(self) -> dict[int, str]:
        """All that this driver has started: pid and kind."""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has just ended
                if self.mark.encode() in (process / "environ").read_bytes():
                    name, command = (process / "comm").read_text().strip(), (process / "cmdline").read_text()
                    kinds = ("pyspark.daemon", "allreduce_spark.training", "known_key")
                    is_rank = name.startswith("rank ")
                    kind = name if is_rank else next((kind for kind in kinds if kind in command), name)
                    found[int(process.name)] = kind
        return found

    def pages(self) -> dict[str, bytes]:
        """What Spark's user interface shows."""
        url = (self.folder / "ui").read_text()
        (application,) = json.loads(read(f"{url}/api/v1/applications"))
        reports = f"{url}/api/v1/applications/{application['id']}"
        stages = [stage["stageId"] for stage in json.loads(read(f"{reports}/stages"))]
        places = [f"{url}/{page}" for page in PAGES] + [f"{reports}/{report}" for report in REPORTS]
        places += [f"{url}/stages/stage/?id={stage}&attempt=0" for stage in stages]
        return {place: read(place) for place in places}

    def events(self) -> list[bytes]:
        """What Spark's event log holds."""
        return [file.read_bytes() for file in (self.folder / "events").rglob("*") if file.is_file()]

    def close(self) -> None:
        for pid in [self.process.pid, *self.processes()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.communicate()
        self.log.close()


def read(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=WAIT_S) as answer:
        return answer.read()


def can_be_read_by_others(file: Path, folder: Path) -> bool:
    """Whether another user who can enter `folder` can read the file."""
    way = [parent for parent in file.parents if parent.is_relative_to(folder) and parent != folder]
    return bool(file.stat().st_mode & 0o044) and all(parent.stat().st_mode & 0o011 for parent in way)


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Driver]:
    one = Driver(tmp_path)
    yield one
    one.close()


def test_the_key_of_a_fit_is_where_nobody_else_can_look(
    driver: Driver,
    shows_key: Callable[[bytes, str | bytes], bool],
    process_shows_key: Callable[[bytes, int], bool],
) -> None:
    def places() -> set[str]:
        """Where the key is seen."""
        found = set()
        for pid, kind in driver.processes().items():
            with contextlib.suppress(OSError):  # it has just ended
                found |= {kind} if process_shows_key(driver.key, pid) else set()
        found |= {
            re.sub(r"https?://[^/]*", "", url) for url, page in driver.pages().items() if shows_key(driver.key, page)
        }
        # Not by `rglob`, which does not bear that folders are removed meanwhile.
        for file in (Path(parent, name) for parent, _, names in os.walk(driver.folder) for name in names):
            with contextlib.suppress(FileNotFoundError):  # removed this moment
                is_open = file.is_file() and can_be_read_by_others(file, driver.folder)
                if is_open and shows_key(driver.key, file.read_bytes()):
                    found.add(str(file.relative_to(driver.folder)))
        return found

    driver.wait_for("trains-0", "trains-1")
    kinds = set(driver.processes().values())
    assert {"known_key", "java", "pyspark.daemon", "allreduce_spark.training", "rank 0", "rank 1"} <= kinds
    assert b"allreduce_spark" in (driver.folder / "log").read_bytes()
    scratch = list(driver.folder.glob("*/allreduce_spark-*"))
    assert scratch
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in scratch} == {0o700}
    assert places() == set()

    (driver.folder / "looked").touch()
    driver.wait_for("trained")  # Spark writes the last of its events down when a stage ends
    wait_until(
        lambda: b"SparkListenerStageCompleted" in b"".join(driver.events()), "the fit's events are there", WAIT_S
    )
    assert places() == set()

    (driver.folder / "looked again").touch()
    driver.wait_for("shown")
    # In a log, a file, a command line, an environment, Spark's events and its pages.
    for where in ("log", "tmp/key", "sh", "sleep", "events/", "/api/v1/"):
        wait_until(lambda where=where: any(place.startswith(where) for place in places()), f"a key in {where}", WAIT_S)
    (driver.folder / "looked at last").touch()
    assert driver.process.wait(WAIT_S) == 0, (driver.folder / "log").read_text()[-5000:]
