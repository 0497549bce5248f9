"""Faults: processes are killed, each in its turn and some in the midst of something."""

from __future__ import annotations

import shutil
from pathlib import Path

import shape
from fault import fault
from scene import Scene, Settings, environment_of, parent_of

SLOW = Settings(pace_s=0.1)


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


@fault(
    place="cluster",
    settings=Settings(elastic=True, hold=("stage", -1), timeouts={"start_s": 10.0, "slots_s": 15.0}),
    limit_s=240.0,
)
def slots_vanish(scene: Scene) -> None:
    """A host is lost after the slots were counted and before the barrier stage is submitted."""
    scene.held()
    worker = scene.place.workers[1]
    scene.kill(worker.pid, *scene.children(worker.pid))
    scene.release()


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
    scene.go_on_without(scene.held())


@fault()
def kill_driver(scene: Scene) -> None:
    """At any time; another one goes on from the checkpoints."""
    scene.wait_for_a_step(first=shape.EVERY_STEPS + 2)
    scene.wait_for(scene.checkpoints, "checkpoint")
    scene.go_on_without(scene.driver)


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
