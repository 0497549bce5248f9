"""The agent: the body of a barrier task. It puts its shards on disk, starts the rank, relays between rank and driver (`relay`),
and kills the rank as soon as the driver says so or is gone.

The rank is a child process and never the Spark worker itself: MPI can be initialised once in a process while Spark reuses its
workers, and a child can be killed. The order of events is that of `run_agent`.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from allreduce_spark.checkpoint.shares import LOCAL_FOLDER, local_shares
from allreduce_spark.checkpoint.store import Store
from allreduce_spark.communicator.horovod_environment import check_installed, interface_environment, why_unusable
from allreduce_spark.communicator.mpich import mpi_environment
from allreduce_spark.config import Timeouts
from allreduce_spark.data.blocks import decode_block
from allreduce_spark.data.spool import ShardWriter
from allreduce_spark.errors import AllReduceSparkError, RendezvousError
from allreduce_spark.launch.environment import host_key, interface_of, rank_environment, thread_share
from allreduce_spark.launch.gpus import choose_gpus, names_of
from allreduce_spark.launch.place import Place
from allreduce_spark.launch.relay import Aborted, Relay, hear
from allreduce_spark.launch.scratch import scratch_folder
from allreduce_spark.launch.warm import WarmProcess
from allreduce_spark.rendezvous.client import Connection
from allreduce_spark.rendezvous.protocol import Phase
from allreduce_spark.rendezvous.status import StatusPage

__all__ = ["AgentTask", "run_agent"]

CAUSE_CHARACTERS = 20_000


@dataclass(frozen=True)
class AgentTask:
    """What one barrier task is told by the Spark side.

    Attributes:
        rank, num_ranks: The partition of the task, and how many there are.
        shards: Numbers of the shards that the rank trains on.
        address, key: Where the driver listens, and the secret of this fit.
        timeouts: Deadlines.
        local_rank, local_size: Index among the tasks of the stage on this host, as Spark names hosts, and their number.
        task_cpus: Cores that Spark counts for the task.
        gpus: Addresses of the GPUs that Spark gave to the task, or None.
        files: Files for the rank, by name: the model, and what goes with it.
        store: Where checkpoints are kept; None where they stay on this machine.
        backend: What the ranks are to reduce by, as `config.BACKENDS` names it.
        keras_environment: What makes Keras compute with what it does on the driver (`training.backends.environment`).
    """

    rank: int
    num_ranks: int
    shards: tuple[int, ...]
    address: tuple[str, int]
    key: bytes = field(repr=False)
    timeouts: Timeouts
    local_rank: int
    local_size: int
    task_cpus: int
    gpus: tuple[str, ...] | None
    files: dict[str, bytes] = field(repr=False)
    store: str | None = None
    backend: str = "mpi"
    keras_environment: Mapping[str, str] = field(default_factory=dict)


def run_agent(task: AgentTask, blocks: Iterator[tuple[int, bytes]]) -> None:
    """Look after one rank from the first row to the last message. Failures are reported to the driver, not raised.

    Args:
        task: Where and who.
        blocks: The rows of this rank: (number of the shard, block as `data.blocks` encodes it); read once.

    Raises:
        RendezvousError: The driver could not be reached, or was lost: nobody is left to report to.
    """
    with contextlib.closing(Connection(task.address, task.key, task.timeouts)) as driver, contextlib.suppress(Aborted):
        driver.send("hello", rank=task.rank, host=socket.gethostname())
        try:
            _look_after_rank(task, blocks, driver)
        except (RendezvousError, Aborted):
            raise
        except Exception as error:  # noqa: BLE001  a bad row, a full disk: the driver is to hear what, not that we are gone
            driver.send("failed", error=type(error).__name__, cause=_cause(error))
            _wait_for_the_end(driver, task.timeouts)


def _look_after_rank(task: AgentTask, blocks: Iterator[tuple[int, bytes]], driver: Connection) -> None:
    check_installed(task.backend)  # before anything is read or started
    with scratch_folder() as folder:
        status = StatusPage(folder / "status")
        status.write(Phase.IMPORT)
        place = Place(status)
        driver.start_heartbeats(task.timeouts.heartbeat_s, place.read)
        for name, content in task.files.items():
            (folder / name).write_bytes(content)
        gpus = choose_gpus(task.gpus, task.local_rank, {**os.environ, **task.keras_environment})
        with contextlib.closing(_start_warm_process(task, folder, driver.local_address, gpus)) as warm:
            start_rank = partial(warm.start_rank, task.rank, task.num_ranks)
            store = None if task.store is None else Store(task.store)
            reports: list[dict[str, Any]] = []
            join = partial(_join, task, folder, gpus or (), reports)
            relay = Relay(task.rank, driver, start_rank, join, folder, place, task.timeouts, store)
            with contextlib.closing(relay):
                # If the rank has ended meanwhile, because it cannot import TensorFlow, say, nobody needs the rows any more.
                if _spool(blocks, task.shards, folder, relay, reports):
                    relay.join()
                relay.run()


def _cause(error: Exception) -> str:
    text = str(error) if isinstance(error, AllReduceSparkError) else "".join(traceback.format_exception(error))
    return text[-CAUSE_CHARACTERS:]


def _start_warm_process(task: AgentTask, folder: Path, local_address: str, gpus: tuple[str, ...] | None) -> WarmProcess:
    threads = thread_share(task.task_cpus, task.local_size)
    # TensorFlow writes Python files of its own, and removes them only where a process may end in peace.
    temporary = folder / "tmp"
    temporary.mkdir()
    interface = interface_of(local_address)
    environment = rank_environment(
        os.environ,
        threads=threads,
        gpus=gpus,
        extra={
            "TMPDIR": str(temporary),
            **task.keras_environment,
            **mpi_environment(interface),
            **interface_environment(interface),
        },
    )
    return WarmProcess(folder, threads, environment)


def _spool(
    blocks: Iterator[tuple[int, bytes]],
    shards: tuple[int, ...],
    folder: Path,
    relay: Relay,
    reports: list[dict[str, Any]],
) -> bool:
    """Write the shards to disk, each to a file of its own; return whether they are complete.

    Args:
        blocks: (number of the shard, block).
        shards: The numbers of all shards of this rank, those without rows among them.
        reports: Gets, of each shard, what the driver must know of it to let the ranks start.
    """
    with contextlib.ExitStack() as files:
        writers = {
            (role, shard): files.enter_context(ShardWriter(folder / f"{role}-{shard}.arrow"))
            for role in ("train", "validation")
            for shard in shards
        }
        for shard, encoded in blocks:
            relay.check_driver()
            if relay.rank_has_ended:
                return False
            block = decode_block(encoded)
            writers[block.role, shard].write(block)
    for shard in shards:
        train, validation = writers["train", shard], writers["validation", shard]
        reports.append(
            {
                "shard": shard,
                "rows": train.rows,
                "validation_rows": validation.rows,
                "spec": train.spec.to_json() if train.spec else None,
                "validation_spec": validation.spec.to_json() if validation.spec else None,
            }
        )
    return True


def _join(task: AgentTask, folder: Path, gpus: tuple[str, ...], reports: list[dict[str, Any]]) -> dict[str, Any]:
    """What the driver must know before a rank may start."""
    return {
        "host_key": host_key(),
        "shards": reports,
        "saved": sorted(local_shares(folder / LOCAL_FOLDER, task.rank)),
        "gpus": list(names_of(gpus)) if gpus else [],
        "nccl": bool(gpus) and why_unusable("gloo", "nccl") is None,
    }


def _wait_for_the_end(driver: Connection, timeouts: Timeouts) -> None:
    """After a failure of its own the agent waits until the driver has told everybody: it must not end the stage first."""
    deadline = time.monotonic() + timeouts.teardown_s
    with contextlib.suppress(RendezvousError):  # It has been told, and may have ended meanwhile.
        while (left_s := deadline - time.monotonic()) > 0:
            if select.select([driver], [], [], left_s)[0]:
                hear(driver)
