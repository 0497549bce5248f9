"""Groups of ranks for the tests: threads on a `LocalGroup`, or real processes of MPI or Horovod that this one answers PMI to.

No mpirun: each rank is a child with one end of a socket pair as its `PMI_FD`; one thread here reads the other ends and
asks a `KeySpace` what to reply. Starting a rank costs about 0.4 s, so healthy groups serve many tests. Ranks of Horovod, which
needs TensorFlow, are forked from a process that has imported it, and cost no more.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import secrets
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from allreduce_spark.communicator.horovod_environment import installed
from allreduce_spark.communicator.local import LocalGroup
from allreduce_spark.communicator.mpich import mpi_environment, shared_memory_segments
from allreduce_spark.errors import RankFailedError
from allreduce_spark.rendezvous.pmi import KeySpace, environment, process_mapping
from allreduce_spark.world import World, worlds_of

PROGRAM = Path(__file__).with_name("rank_process.py")
REPOSITORY = PROGRAM.parents[2]
DEADLINE_S = 40.0  # for one call in all ranks: far longer than any takes, far shorter than a hang


def load_program() -> ModuleType:
    specification = importlib.util.spec_from_file_location("rank_process", PROGRAM)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["rank_process"] = module  # an Outcome that comes from a process is one of this module
    specification.loader.exec_module(module)
    return module


PROGRAM_MODULE = load_program()


class Ranks:
    """A group of ranks that run functions of `rank_process.py` together."""

    nodes: list[int]  # of each rank, the index of its host
    world_size: int
    timeout_s: float

    def outcomes(self, name: str, **arguments: Any) -> list[Any]:
        """Run `name` in all ranks; an `Outcome` of each, or None of a rank that ended without one."""
        raise NotImplementedError

    def run(self, name: str, **arguments: Any) -> list[Any]:
        """Run `name` in all ranks; what it returned in each. Fails the test where a rank raised."""
        outcomes = self.outcomes(name, **arguments)
        for rank, outcome in enumerate(outcomes):
            assert outcome is not None, f"rank {rank} ended in {name}"
            assert outcome.error is None, f"rank {rank} raised in {name}:\n{outcome.traceback}"
        return [outcome.value for outcome in outcomes]


class LocalRanks(Ranks):
    def __init__(self, world_size: int, timeout_s: float) -> None:
        self.nodes, self.world_size, self.timeout_s = [0] * world_size, world_size, timeout_s
        self._communicators = LocalGroup(world_size, timeout_s).communicators

    def outcomes(self, name: str, **arguments: Any) -> list[Any]:
        with ThreadPoolExecutor(self.world_size) as pool:
            futures = [pool.submit(PROGRAM_MODULE.outcome_of, name, each, arguments) for each in self._communicators]
            return [future.result(DEADLINE_S) for future in futures]

    def close(self) -> None:
        pass

    def kill(self) -> None:
        pass


class ProcessRanks(Ranks):
    """Processes of `rank_process.py`, on hosts that `nodes` makes up: ranks of different nodes talk by TCP."""

    def __init__(self, nodes: list[int], timeout_s: float, backend: str = "mpi") -> None:
        self.nodes, self.world_size, self.timeout_s = nodes, len(nodes), timeout_s
        key_space = KeySpace(f"test-{secrets.token_hex(8)}", len(nodes), process_mapping(nodes))
        pmi_pairs = [socket.socketpair() for _ in nodes]
        self.controls: list[Connection] = []
        self.processes: list[Any] = []
        for world, (_, ranks_end) in zip(worlds_of(nodes), pmi_pairs, strict=True):
            if backend == "mpi":
                variables = environment(world.rank, world.world_size, ranks_end.fileno())
                control, process = start_one_rank(world, timeout_s, variables, [ranks_end.fileno()])
            else:
                control, process = fork_one_rank(world, timeout_s, ranks_end, backend)
            self.controls.append(control)
            self.processes.append(process)
            ranks_end.close()
        answer = threading.Thread(target=answer_pmi, args=(key_space, [ours for ours, _ in pmi_pairs]), daemon=True)
        answer.start()
        answers = [self._receive(rank, time.monotonic() + DEADLINE_S) for rank in range(len(nodes))]
        if answers != ["ready"] * len(nodes):
            self.kill()
            pytest.fail(f"the ranks did not start: {answers}")

    def outcomes(self, name: str, **arguments: Any) -> list[Any]:
        for control in self.controls:
            PROGRAM_MODULE.send(control, (name, arguments))
        deadline = time.monotonic() + DEADLINE_S
        return [self._receive(rank, deadline) for rank in range(self.world_size)]

    def _receive(self, rank: int, deadline: float) -> Any:
        if not wait([self.controls[rank]], max(0.0, deadline - time.monotonic())):
            self.kill()
            pytest.fail(f"rank {rank} hangs; all ranks were killed")
        try:
            return PROGRAM_MODULE.receive(self.controls[rank])
        except (EOFError, ConnectionResetError):
            return None

    def exit_codes(self, within_s: float) -> list[int | None]:
        """Let the ranks end by themselves; None for each that had to be killed."""
        deadline = time.monotonic() + within_s
        codes: list[int | None] = []
        for control in self.controls:
            try:
                PROGRAM_MODULE.send(control, None)
            except OSError:
                pass  # it ended before
        for process in self.processes:
            try:
                codes.append(process.wait(max(0.0, deadline - time.monotonic())))
            except subprocess.TimeoutExpired:
                codes.append(None)
        self.kill()
        return codes

    def kill(self) -> None:
        for process in self.processes:
            segments = shared_memory_segments(process.pid)
            process.kill()
            process.wait()
            for segment in segments:
                Path(segment).unlink(missing_ok=True)
        for control in self.controls:
            control.close()

    def close(self) -> None:
        assert self.exit_codes(within_s=10.0) == [0] * self.world_size, "a healthy group did not end in peace"


def start_one_rank(
    world: World, timeout_s: float, variables: dict[str, str], fds: list[int]
) -> tuple[Connection, subprocess.Popen[bytes]]:
    """Start one rank's process, and return our end of its control connection with it."""
    control, ranks_control = Pipe()
    process = subprocess.Popen(
        [sys.executable, str(PROGRAM), *arguments_of(ranks_control, world, timeout_s, "mpi")],
        env={**os.environ, **mpi_environment("lo"), **variables, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        pass_fds=[ranks_control.fileno(), *fds],
        cwd=REPOSITORY,
    )
    ranks_control.close()
    return control, process


def arguments_of(ranks_control: Connection, world: World, timeout_s: float, backend: str) -> list[str]:
    place = (world.rank, world.world_size, world.local_rank, world.local_size, world.node_rank)
    return [str(each) for each in (ranks_control.fileno(), *place, timeout_s, backend)]


class ForkedRank(multiprocessing.get_context("forkserver").Process):  # type: ignore[misc]
    """A rank with what tests use of a `subprocess.Popen`."""

    def wait(self, timeout: float | None = None) -> int:
        self.join(timeout)
        if self.exitcode is None:
            raise subprocess.TimeoutExpired(self.name, timeout or 0.0)
        return self.exitcode

    def send_signal(self, number: int) -> None:
        assert self.pid is not None
        os.kill(self.pid, number)


def fork_one_rank(world: World, timeout_s: float, pmi: socket.socket, backend: str) -> tuple[Connection, ForkedRank]:
    """As `start_one_rank`, from a process that is started once and imports TensorFlow."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tensorflow"])
    if str(PROGRAM.parent) not in sys.path:
        sys.path.append(str(PROGRAM.parent))  # where the rank finds the program's module
    control, ranks_control = Pipe()
    process = ForkedRank(
        target=PROGRAM_MODULE.be_forked, args=(ranks_control, pmi, world, timeout_s, backend), daemon=True
    )
    process.start()
    ranks_control.close()
    return control, process


def answer_pmi(key_space: KeySpace, connections: list[socket.socket]) -> None:
    """Answer the ranks until all of them have closed their ends. A thread's whole life."""
    unfinished = [b""] * len(connections)
    with selectors.DefaultSelector() as selector:
        for rank, connection in enumerate(connections):
            selector.register(connection, selectors.EVENT_READ, rank)
        while selector.get_map():
            for key, _ in selector.select():
                rank = key.data
                try:
                    data = connections[rank].recv(65536)
                except ConnectionResetError:
                    data = b""
                if not data:
                    selector.unregister(connections[rank])
                    connections[rank].close()
                    continue
                *lines, unfinished[rank] = (unfinished[rank] + data).split(b"\n")
                for line in lines:
                    reply_to_line(key_space, connections, rank, line.decode())


def reply_to_line(key_space: KeySpace, connections: list[socket.socket], rank: int, line: str) -> None:
    try:
        replies = key_space.answer(rank, line)
    except RankFailedError:
        return  # the test sees the rank end
    for to_rank, reply in replies:
        try:
            connections[to_rank].sendall(reply.encode() + b"\n")
        except OSError:
            pass  # that rank has ended


def start(backend: str, world_size: int, timeout_s: float) -> Any:
    """`local`: threads. `mpi`: processes with shared memory. `tcp`: processes that take each other for other hosts.

    `horovod`, `horovod-mpi`: processes of Horovod, with either controller; `horovod-mpi-tcp`: on other hosts, as `tcp`.
    """
    if backend == "local":
        return LocalRanks(world_size, timeout_s)
    if backend.startswith("horovod") and installed() is None:
        pytest.skip("Horovod is not installed: allreduce-spark install-horovod")
    nodes = [rank if backend.endswith("tcp") else 0 for rank in range(world_size)]
    return ProcessRanks(nodes, timeout_s, "mpi" if backend == "tcp" else backend.removesuffix("-tcp"))


@pytest.fixture(scope="session")
def rank_process() -> ModuleType:
    """The module of the functions that run in each rank."""
    return PROGRAM_MODULE


@pytest.fixture
def start_rank() -> Any:
    """The function that starts one rank's process, for a test that starts it wrongly."""
    return start_one_rank


@pytest.fixture
def start_group() -> Any:
    """A context manager for a group that the test may break: start_group(backend, world_size, timeout_s)."""

    @contextmanager
    def started(backend: str, world_size: int, timeout_s: float) -> Iterator[Any]:
        group = start(backend, world_size, timeout_s)
        try:
            yield group
        finally:
            group.kill()

    return started


GROUPS = [(backend, size) for backend in ("local", "mpi") for size in (1, 2, 3, 4)] + [("tcp", 3)]
GROUPS += [("horovod", size) for size in (1, 2, 3)] + [("horovod-mpi", 2), ("horovod-mpi-tcp", 3)]
DOOMED_GROUPS = [("local", 2), ("local", 3), ("mpi", 2), ("mpi", 3), ("tcp", 2), ("horovod", 3), ("horovod-mpi", 2)]


@pytest.fixture(scope="module", params=GROUPS, ids=lambda each: f"{each[0]}-{each[1]}")
def ranks(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A healthy group, for tests that leave it so."""
    group = start(*request.param, timeout_s=20.0)
    try:
        yield group
        group.close()
    finally:
        group.kill()


@pytest.fixture(params=DOOMED_GROUPS, ids=lambda each: f"{each[0]}-{each[1]}")
def doomed_ranks(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A new group, for a test that breaks it. Its collectives wait for 30 s: what ends sooner saw no deadline."""
    group = start(*request.param, timeout_s=30.0)
    try:
        yield group
    finally:
        group.kill()


@pytest.fixture(params=["mpi", "tcp"])
def mpi_ranks(request: pytest.FixtureRequest) -> Iterator[ProcessRanks]:
    """Two new MPI processes, for a test that breaks them."""
    group = start(request.param, 2, timeout_s=30.0)
    try:
        yield group
    finally:
        group.kill()
