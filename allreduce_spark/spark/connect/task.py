"""The body of a barrier task under Spark Connect: an agent as ever, and beside rank 0's the process that is its driver.

Executors cannot reach the client, and the client not them: so what else runs on the driver, the rendezvous above all, runs in a
process of its own beside the task of partition 0 (`driver`). The tasks learn its address, and the key of the stage, by
`BarrierTaskContext.allGather`, within Spark's own connections; the client never has either. What came of it all is what
partition 0 answers, errors as well: so Spark neither retries nor wraps them.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyspark import BarrierTaskContext

from allreduce_spark.errors import ConfigError, RendezvousError
from allreduce_spark.launch.agent import AgentTask, run_agent
from allreduce_spark.launch.environment import rank_environment
from allreduce_spark.launch.scratch import scratch_folder
from allreduce_spark.rendezvous.group import Failure
from allreduce_spark.spark.connect.driver import END, OUTCOME, POLL_S, Order, Outcome
from allreduce_spark.spark.connect.transfer import pieces_of, read_files
from allreduce_spark.spark.stage import host_of, place_of

__all__ = ["be_rank"]


def be_rank(order: Order, sent: str, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Be one task of the stage.

    Args:
        order: What all tasks of the stage are told, and the process that is their driver.
        sent: Where the files for the ranks are, as `read_files` wants to know it.
        batches: The rows of this partition: (shard int, block binary).

    Yields:
        In partition 0, what came of the stage: the `OUTCOME` and, if it is a success, the results of the ranks; then the `END`.

    Raises:
        RendezvousError: The driver's process could not be reached, or was lost.
    """
    context = BarrierTaskContext.get()
    infos = context.getTaskInfos()
    if len(infos) != order.num_ranks:
        raise ConfigError(f"the barrier stage has {len(infos)} partitions in the place of {order.num_ranks}.")
    rank, host = context.partitionId(), host_of(infos[0].address)
    files = read_files(sent)
    with contextlib.ExitStack() as stack:
        driver = stack.enter_context(_driver_process(order, host, files)) if rank == 0 else None
        (said, *_) = context.allGather("" if driver is None else driver.first_word(order.timeouts.start_s))
        if said:
            where = json.loads(said)
            agent = AgentTask(
                **place_of(context),
                num_ranks=order.num_ranks,
                shards=tuple(range(rank, order.num_shards, order.num_ranks)),
                address=(host, where["port"]),
                key=bytes.fromhex(where["key"]),
                timeouts=order.timeouts,
                files=files,
                store=order.checkpoint.path,
                backend=order.backend,
                keras_environment=order.keras_environment,
            )
            try:
                run_agent(agent, _blocks(batches))
            except RendezvousError:
                if driver is None:
                    raise
                # The driver has said why, or its own end is the reason: both are answered below.
        if driver is not None:
            yield from driver.answers(2 * order.timeouts.teardown_s + order.timeouts.checkpoint_s)


def _blocks(batches: Iterator[pa.RecordBatch]) -> Iterator[tuple[int, Any]]:
    for batch in batches:
        for shard, block in zip(*batch.columns, strict=True):
            encoded = block.as_buffer()
            if encoded.size:  # an empty one is there only for Spark (`run_stage`)
                yield shard.as_py(), encoded


class _DriverProcess:
    """The process that is the driver, seen from the task beside it, which it does not outlive.

    Args:
        folder: Private; where it finds its order and the files, and leaves what came of it.
        host: Where it is to listen: the name by which the other executors know this one.
        keras_environment: See `AgentTask`.
    """

    def __init__(self, folder: Path, host: str, keras_environment: dict[str, str]) -> None:
        self._folder = folder
        environment = rank_environment(os.environ, threads=1, gpus=(), extra=keras_environment)
        command = [sys.executable, "-m", "allreduce_spark.spark.connect.driver"]
        self._process = subprocess.Popen(
            [*command, f"--folder={folder}", f"--host={host}", f"--parent={os.getpid()}"],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,  # and it logs where this worker does
        )

    def first_word(self, timeout_s: float) -> str:
        """Where it listens, and the key of the stage, as JSON; "" if it has come to its end instead."""
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], timeout_s)[0]:
            cause = (
                f"the driver's process beside rank 0 did not listen within {timeout_s:g} s. Setting: Timeouts.start_s"
            )
            Outcome(Failure("RendezvousTimeoutError", cause)).write(self._folder)
            self._process.kill()
        return self._process.stdout.readline().decode().strip()

    def answers(self, timeout_s: float) -> Iterator[pa.RecordBatch]:
        """What came of the stage, as soon as the process has written it; it has no more to wait for than its store."""
        outcome, give_up_at = self._folder / OUTCOME, time.monotonic() + timeout_s
        while (code := self._process.poll()) is None and not outcome.exists() and time.monotonic() < give_up_at:
            time.sleep(POLL_S)
        if not outcome.exists():
            how = f"has not ended within {timeout_s:g} s" if code is None else f"has died (exit code {code})"
            failure = Failure("DriverDied", f"the driver's process beside rank 0 {how}", stage_lost=True)
            Outcome(failure, stage_is_lost=True).write(self._folder)
        yield from pieces_of(OUTCOME, outcome)
        if Outcome.from_json(outcome.read_bytes()).failure is None:
            for result in sorted(self._folder.glob("result-*")):
                yield from pieces_of(result.name, result)
        yield from pieces_of(END, b"")

    def close(self) -> None:
        """Kill it if it is still there."""
        self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


@contextlib.contextmanager
def _driver_process(order: Order, host: str, files: dict[str, bytes]) -> Iterator[_DriverProcess]:
    with scratch_folder() as folder:
        for name, content in files.items():
            (folder / name).write_bytes(content)
        order.write(folder)
        with contextlib.closing(_DriverProcess(folder, host, order.keras_environment)) as driver:
            yield driver
