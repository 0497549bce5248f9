"""The faults: each a function that waits for its moment and then does it, and what is expected of the fit."""

from __future__ import annotations

import contextlib
import shutil
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import shape
from places import disk
from proxy import Proxy
from scene import Scene, Settings, environment_of, parent_of, processes_of, run

__all__ = ["FAULTS", "Fault"]

PAUSE_S = 10.0
SLOW = Settings(pace_s=0.1)


@dataclass(frozen=True)
class Fault:
    """One way in which a fit may be disturbed.

    Attributes:
        strike: Does it; called when the driver has been started.
        place: Name of the place where it runs.
        settings: Of the fit.
        error: What a fit that cannot succeed has to say; None where it must come to its end.
        said: What the log has to say in any case.
        needs: Programs of the system that it takes, beside what the place does.
        limit_s: When the driver has not ended by then, it hangs.
        around: A context to be entered with the scene, before the driver is started.
    """

    strike: Callable[[Scene], None]
    place: str = "local"
    settings: Settings = field(default_factory=Settings)
    error: str | None = None
    said: str | None = None
    needs: tuple[str, ...] = ()
    limit_s: float = 150.0
    around: Callable[[Scene], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext

    @property
    def name(self) -> str:
        return self.strike.__name__.replace("_", "-")


FAULTS: dict[str, Fault] = {}


def fault(**about: Any) -> Callable[[Callable[[Scene], None]], Callable[[Scene], None]]:
    """Enter a function into `FAULTS`; `about` is as in `Fault`."""

    def enter(strike: Callable[[Scene], None]) -> Callable[[Scene], None]:
        entry = Fault(strike, **about)
        FAULTS[entry.name] = entry
        return strike

    return enter


# Processes that are killed.


@fault()
def kill_rank_0(scene: Scene) -> None:
    """The rank that decides about checkpoints, and sends the result."""
    scene.wait_for_a_step()
    scene.kill(scene.rank(0))


@fault()
def kill_rank_1(scene: Scene) -> None:
    """Another one."""
    scene.wait_for_a_step()
    scene.kill(scene.rank(1))


@fault()
def kill_both_ranks(scene: Scene) -> None:
    """Two at once."""
    scene.wait_for_a_step()
    scene.kill(scene.rank(0), scene.rank(1))


@fault(settings=SLOW)
def kill_ranks_again_and_again(scene: Scene) -> None:
    """Now this one and now that one; the budget of restarts is reset by progress."""
    scene.wait_for_a_step(last=15)
    for _ in range(5):
        scene.kill(scene.rank(scene.random.randrange(2)))
        dead = {scene.rank(number) for number in range(2)}
        scene.wait_for(lambda dead=dead: not dead & {scene.rank(0), scene.rank(1)}, "step of a new rank")
        scene.wait_for_more_steps(scene.random.randint(shape.EVERY_STEPS + 1, 8))


@fault()
def kill_warm_process(scene: Scene) -> None:
    """The process that ranks are forked from; its rank dies with it."""
    scene.wait_for_a_step()
    scene.kill(parent_of(scene.rank(1)))


@fault()
def kill_agent(scene: Scene) -> None:
    """The Python worker of a barrier task: the stage is lost, and another one goes on."""
    scene.wait_for_a_step()
    scene.kill(scene.agent(scene.random.randrange(2)))


@fault()
def kill_daemon_of_the_python_workers(scene: Scene) -> None:
    """What Spark forks its Python workers from."""
    scene.wait_for_a_step()
    scene.kill(parent_of(scene.agent(0)))


@fault(place="cluster", settings=Settings(elastic=True, pace_s=0.1))
def kill_executor(scene: Scene) -> None:
    """The JVM with a rank; the worker starts another one."""
    scene.wait_for_a_step()
    scene.kill(scene.executor(scene.random.randrange(2)))


@fault(place="cluster", settings=Settings(elastic=True, pace_s=0.1))
def kill_host(scene: Scene) -> None:
    """A worker with all that it has started, for good: one rank goes on alone."""
    scene.wait_for_a_step()
    rank, agent, executor = scene.rank(1), scene.agent(1), scene.executor(1)
    its_disk = environment_of(agent)["SPARK_LOCAL_DIRS"]
    scene.kill(parent_of(executor), executor, agent, rank)
    shutil.rmtree(its_disk)


@fault(settings=Settings(hold=("write", 1), hold_after=(1, 6)))
def kill_rank_while_it_writes_a_checkpoint(scene: Scene) -> None:
    """Half of its share is on the disk."""
    scene.kill(scene.held())


@fault(settings=Settings(hold=("broadcast", 0)))
def kill_rank_while_it_sends_the_first_weights(scene: Scene) -> None:
    """The others wait for them in a collective."""
    scene.kill(scene.held())


@fault(settings=Settings(hold=("result", 0)))
def kill_rank_while_it_writes_the_result(scene: Scene) -> None:
    """All training is done, and the result is not."""
    scene.kill(scene.held())


@fault(settings=Settings(hold=("upload", 0)))
def kill_agent_while_it_sends_the_result(scene: Scene) -> None:
    """Its rank has ended in peace."""
    scene.kill(scene.held())


@fault(settings=Settings(hold=("validate", 1), hold_after=(0, 2)))
def kill_rank_while_it_validates(scene: Scene) -> None:
    """Between the last step of an epoch and the end of it."""
    scene.kill(scene.held())


@fault(settings=Settings(hold=("commit", -1), hold_after=(1, 5)))
def kill_driver_while_it_commits_a_checkpoint(scene: Scene) -> None:
    """The shares are in the store, the manifest is not. Another driver goes on."""
    _go_on_after(scene, scene.held())


@fault()
def kill_driver(scene: Scene) -> None:
    """At any time; another one goes on from the checkpoints."""
    scene.wait_for_a_step(first=shape.EVERY_STEPS + 2)
    scene.wait_for(scene.checkpoints, "checkpoint")
    _go_on_after(scene, scene.driver)


@fault(needs=("memory cgroup",))
def rank_out_of_memory(scene: Scene) -> None:
    """A rank takes more memory than its control group allows, and the kernel kills it."""
    scene.wait_for_a_step()
    pid = scene.rank(1)
    group = Path(f"/sys/fs/cgroup/memory/chaos-{pid}")
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(256 << 20))  # of what it takes from now on
        (group / "cgroup.procs").write_text(str(pid))
        scene.strike()
        (scene.folder / f"allocate-{pid}").touch()
        scene.wait_for(lambda: not Path(f"/proc/{pid}").exists(), "death by memory")
    finally:
        group.rmdir()


# Processes that are stopped.


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


# Networks.


@fault(
    place="namespaces",
    settings=Settings(elastic=True, pace_s=0.15, timeouts={"silence_s": 5.0, "start_s": 25.0}),
    limit_s=240.0,
)
def partition_and_heal(scene: Scene) -> None:
    """A worker's host is off the network for longer than `silence_s`, and then comes back."""
    scene.wait_for_a_step(last=15)
    port = ["ip", "-n", scene.place.hosts[0], "link", "set", "port2"]
    scene.strike()
    run([*port, "down"])
    time.sleep(PAUSE_S)
    run([*port, "up"])


@fault(place="namespaces", needs=("iptables",), limit_s=240.0)
def packet_loss(scene: Scene) -> None:
    """One in twenty packets to a worker's host is lost, from some step to the end."""
    scene.wait_for_a_step()
    scene.strike()
    lose = ["iptables", "-A", "INPUT", "-m", "statistic", "--mode", "random", "--probability", "0.05", "-j", "DROP"]
    run(["ip", "netns", "exec", scene.place.hosts[2], *lose])


@contextlib.contextmanager
def proxied(scene: Scene) -> Iterator[None]:
    """Agents find the driver by way of `scene.proxy` only."""
    proxy = scene.proxy = Proxy(scene.rendezvous)
    (scene.folder / "proxy").write_text(str(proxy.port))
    with contextlib.closing(proxy):
        yield


@fault(around=proxied)
def connection_reset(scene: Scene) -> None:
    """An agent's connection to the driver."""
    scene.wait_for_a_step()
    scene.strike()
    scene.proxy.reset(scene.random.randrange(2))


@fault(around=proxied)
def truncated_frame(scene: Scene) -> None:
    """Half a frame, and then the end of the connection."""
    _spoil(scene, lambda data: data[: len(data) // 2], then_close=True)


@fault(around=proxied)
def garbage_frame(scene: Scene) -> None:
    """Bytes that no agent has sent, within its connection."""
    noise = scene.random.randbytes(64)
    _spoil(scene, lambda data: noise + data)


@fault(around=proxied)
def changed_frame(scene: Scene) -> None:
    """A single bit of what an agent has sent."""
    _spoil(scene, lambda data: data[:-1] + bytes([data[-1] ^ 1]))


@fault(around=proxied)
def replayed_frame(scene: Scene) -> None:
    """What an agent has sent, a second time."""
    _spoil(scene, lambda data: data + data)


@fault(said="refused a connection")
def wrong_key(scene: Scene) -> None:
    """Somebody who speaks the protocol, but holds another key, then noise, then half a greeting, then nothing at all."""
    from allreduce_spark.rendezvous import protocol

    scene.wait_for_a_step()
    scene.strike()
    with contextlib.ExitStack() as strangers:
        for number in range(8):
            sock = strangers.enter_context(scene.stranger())
            challenge = sock.recv(protocol.CHALLENGE_BYTES, socket.MSG_WAITALL)
            answer, _, _ = protocol.answer_challenge(b"x" * 32, challenge, b"y" * protocol.NONCE_BYTES)
            noise = scene.random.randbytes(len(answer))
            sock.sendall((answer, noise, answer[: len(answer) // 2], b"")[number % 4])
            with contextlib.suppress(ConnectionError):
                if number % 4 < 2 and sock.recv(1):
                    raise AssertionError("the driver has answered a stranger")
        scene.wait_for_more_steps(5)


@fault(settings=Settings(pace_s=0.3), limit_s=240.0)
def ten_thousand_connections(scene: Scene) -> None:
    """To the driver's port: more at once than it has room for, again and again."""
    scene.wait_for_a_step(last=10)
    address = scene.rendezvous()
    scene.strike()
    open_ones: deque[socket.socket] = deque()
    refused = 0
    for _ in range(10_000):
        try:
            open_ones.append(socket.create_connection(address, timeout=10))
        except OSError:
            refused += 1
        if len(open_ones) > 500:
            open_ones.popleft().close()
    for sock in open_ones:
        sock.close()
    if refused > 1_000:
        raise AssertionError(f"{refused} of 10,000 connections came to nothing: that is no test")


# Disks.


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

    _go_on_after(scene, scene.driver, damage)


# What else there is.


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


@fault(
    place="cluster",
    settings=Settings(elastic=True, hold=("stage", -1), timeouts={"start_s": 10.0, "slots_s": 15.0}),
    limit_s=240.0,
)
def slots_vanish(scene: Scene) -> None:
    """A host is lost after the slots were counted and before the barrier stage is submitted."""
    scene.held()
    worker = scene.place.workers[1]
    scene.kill(worker.pid, *(pid for pid in processes_of(scene.folder) if _parent_or_none(pid) == worker.pid))
    scene.release()


def _go_on_after(scene: Scene, driver: int, meanwhile: Callable[[], None] = lambda: None) -> None:
    """Kill the driver; when all its processes are gone, do something, and start another one."""
    scene.kill(driver)
    scene.wait_for_the_end(30)
    deadline = time.monotonic() + 30
    while processes_of(scene.folder):
        if time.monotonic() > deadline:
            raise AssertionError(f"30 s after the driver there still are {processes_of(scene.folder)}")
        time.sleep(0.1)
    meanwhile()
    scene.start(resume="auto")


def _pause(scene: Scene, whom: Callable[[], list[int]]) -> None:
    scene.wait_for_a_step()
    with scene.stopped(*whom()):
        time.sleep(PAUSE_S)


def _spoil(scene: Scene, deed: Callable[[bytes], bytes], *, then_close: bool = False) -> None:
    scene.wait_for_a_step()
    scene.strike()
    scene.proxy.spoil(deed, then_close=then_close)


def _fill(path: Path) -> None:
    """Write until there is no room."""
    with contextlib.suppress(OSError), path.open("ab", buffering=0) as file:
        for piece in (1 << 20, 1 << 12):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(piece))


def _is_java(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip() == "java"
    return False


def _parent_or_none(pid: int) -> int | None:
    with contextlib.suppress(OSError):
        return parent_of(pid)
    return None
