"""The shipped image as a cluster of containers: it trains by spark-submit, by each backend, also when a container is killed.

Where no Docker engine answers this is skipped; `make test-docker` starts one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import each_backend
import faulty_fits
import pytest
from faulty_fits import Outcome

pytestmark = [pytest.mark.spark, pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(880)]

REPOSITORY = Path(__file__).parents[2]
DIGITS = REPOSITORY / "examples" / "digits.py"
EACH_BACKEND = Path(each_backend.__file__)
FIT = Path(faulty_fits.__file__)
LEFTOVERS = "find /tmp /dev/shm /home/spark -name 'allreduce_spark-*' -o -name 'mpich_*'"
BUILD_S = 600.0
RUN_S = 150.0


def docker(*arguments: str, timeout_s: float = RUN_S, **environment: str) -> str:
    """What the command prints; it must succeed."""
    return subprocess.run(
        ["docker", *arguments],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        timeout=timeout_s,
        check=True,
    ).stdout


@dataclass(frozen=True)
class Containers:
    """A cluster of containers.

    Attributes:
        name: Under which Compose knows it.
        backend: That the image is built with.
    """

    name: str
    backend: str

    @property
    def image(self) -> str:
        return f"{self.name}:{self.backend}"

    @property
    def environment(self) -> dict[str, str]:
        return {"IMAGE": self.image, "BACKEND": self.backend, "MASTER_UI_PORT": "0"}

    @property
    def command(self) -> list[str]:
        return ["compose", "--file", str(REPOSITORY / "docker" / "compose.yaml"), "--project-name", self.name]

    def compose(self, *arguments: str, timeout_s: float = RUN_S) -> str:
        return docker(*self.command, *arguments, timeout_s=timeout_s, **self.environment)

    @contextmanager
    def submit(self, log: Path, script: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
        """A driver in a container of its own. Whatever happens, Compose ends it with the others."""
        with (
            log.open("wb") as output,
            subprocess.Popen(
                ["docker", *self.command, "run", "--rm", "--no-TTY", "submit", script.name, *arguments],
                env={**os.environ, **self.environment, "SCRIPTS": str(script.parent)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            ) as driver,
        ):
            try:
                yield driver
            finally:
                driver.kill()

    def run(self, log: Path, script: Path, *arguments: str) -> str:
        """What a driver prints; it must end well, and in time."""
        with self.submit(log, script, *arguments) as driver:
            assert driver.wait(RUN_S) == 0, log.read_text()
        return log.read_text()

    def shell(self, service: str, script: str) -> str:
        return self.compose("exec", "--no-TTY", service, "sh", "-c", script)

    def outcome(self, folder: str, copy: Path) -> Outcome:
        return Outcome.read(self.copy(f"{folder}/outcome.npz", copy))

    def copy(self, path: str, to: Path) -> Path:
        self.compose("cp", f"master:{path}", str(to))
        return to

    def remains(self) -> list[str]:
        """What the engine still has of it."""
        label = ("--quiet", "--filter", f"label=com.docker.compose.project={self.name}")
        listed = [docker("container", "ls", "--all", *label), docker("image", "ls", "--quiet", self.image)]
        listed += [docker(kind, "ls", *label) for kind in ("network", "volume")]
        return "".join(listed).split()


@contextmanager
def built(backend: str) -> Iterator[Containers]:
    """The image, and the cluster that it can become. Nothing of either stays."""
    for command in (["docker", "info"], ["docker", "compose", "version"]):
        if not shutil.which("docker") or subprocess.run(command, capture_output=True).returncode:
            pytest.skip(
                f"'{' '.join(command)}' does not answer here: make test-docker starts a Docker engine with Compose"
            )
    cluster = Containers(f"allreduce-spark-test-{os.getpid()}", backend)
    try:
        cluster.compose("build", timeout_s=BUILD_S)
        yield cluster
    finally:
        cluster.compose(
            "--profile", "submit", "down", "--volumes", "--remove-orphans", "--rmi", "all", "--timeout", "1"
        )
    assert cluster.remains() == []


@pytest.fixture(scope="module")
def containers() -> Iterator[Containers]:
    """With Horovod, which takes nothing from the image that has MPI alone."""
    with built("horovod") as cluster:
        cluster.compose("up", "--detach", "--wait")
        yield cluster


@pytest.mark.parametrize("backend", ["mpi", "horovod"])
def test_the_image_is_sound_runs_as_an_ordinary_user_and_has_no_compiler(backend: str) -> None:
    with built(backend) as image:
        container = ["run", "--rm", "--shm-size", "1g", image.image]
        assert "1 MiB of 2 ranks by shared memory" in docker(*container, "allreduce-spark", "doctor")
        assert docker(*container, "sh", "-c", "id --user --name; command -v cc gcc g++ || true") == "spark\n"


@pytest.mark.support(place="docker", backend="mpi")
def test_the_example_of_the_readme_trains_on_two_workers(containers: Containers, tmp_path: Path) -> None:
    printed = containers.run(tmp_path / "log", DIGITS, "--num-ranks", "2", "--checkpoint", "/checkpoints/digits")
    found = re.search(r"held-out accuracy ([0-9.]+)", printed)
    assert found is not None
    assert float(found[1]) >= 0.95


@pytest.fixture(scope="module")
def by_each_backend(containers: Containers, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of the same fit by each backend on two workers, and of MPI in local mode."""
    folder = tmp_path_factory.mktemp("each_backend")
    containers.run(folder / "local.log", EACH_BACKEND, "/checkpoints/one", "local[2]", "mpi")
    containers.run(folder / "log", EACH_BACKEND, "/checkpoints/two", "submitted", "mpi", "horovod", "horovod-mpi")
    for place in ("one", "two"):
        containers.copy(f"/checkpoints/{place}", folder)
    return folder


@pytest.mark.support(place="docker")
@pytest.mark.parametrize("backend", ["mpi", "horovod", "horovod-mpi"])
def test_each_backend_ends_with_the_weights_of_one_machine(by_each_backend: Path, backend: str) -> None:
    each_backend.check_same_weights(by_each_backend / "two" / f"{backend}.npz", by_each_backend / "one" / "mpi.npz")


def wish(master: str, folder: str, fault: str | None = None) -> str:
    """What `faulty_fits` is asked for. Masks of dropout are each rank's own, so one rank would draw others than two."""
    return json.dumps({"master": master, "folder": folder, "store": f"{folder}/store", "fault": fault, "dropout": 0.0})


# The last one: the cluster does not get its worker back.
def test_a_worker_that_is_killed_is_done_without_and_the_weights_are_those_of_one_machine(
    containers: Containers, tmp_path: Path
) -> None:
    containers.run(tmp_path / "local.log", FIT, wish("local[2]", "/checkpoints/local"))
    log = tmp_path / "cluster.log"
    with containers.submit(log, FIT, wish("spark://master:7077", "/checkpoints/cluster", fault="machine")) as driver:
        deadline = time.monotonic() + RUN_S
        while not (killed := containers.shell("master", "cat /checkpoints/cluster/machine 2>/dev/null || true")):
            assert driver.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        docker("kill", killed)
        assert driver.wait(RUN_S) == 0, log.read_text()
    assert "with 1 of 2 ranks" in log.read_text()
    outcome = containers.outcome("/checkpoints/cluster", tmp_path / "cluster.npz")
    outcome.check_is_close_to(containers.outcome("/checkpoints/local", tmp_path / "local.npz"))
    assert containers.shell("worker", LEFTOVERS) == ""
