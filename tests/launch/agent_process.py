"""One agent as a process of its own: it must run in a main thread, and be killable. Spark is not needed for either.

The only argument is JSON: the fields of an `AgentTask`, and `rows`, which names one of the functions below.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from allreduce_spark.config import Timeouts
from allreduce_spark.data.rows import rows_to_blocks
from allreduce_spark.launch.agent import AgentTask, run_agent


def blocks_of(
    rows: list[tuple[list[float], float]], rank: int, partition: int | None = None
) -> Iterator[tuple[int, bytes]]:
    number = rank if partition is None else partition
    return ((rank, block) for _, block in rows_to_blocks(rows, partition=number, role="train", num_shards=1))


def three(rank: int) -> Iterator[tuple[int, bytes]]:
    return blocks_of([([1.0, 2.0], 0.0)] * 3, rank)


def none(rank: int) -> Iterator[tuple[int, bytes]]:
    return iter(())


def bad(rank: int) -> Iterator[tuple[int, bytes]]:
    return blocks_of([([1.0, 2.0], 0.0), ([1.0, 2.0, 3.0], 0.0)], rank)


def broken(rank: int) -> Iterator[tuple[int, bytes]]:
    yield from three(rank)
    raise OSError(28, "No space left on device")


def endless(rank: int) -> Iterator[tuple[int, bytes]]:
    """A slow stage above: one block after the other."""
    partition = 0
    while True:
        partition += 1
        yield from blocks_of([([1.0, 2.0], 0.0)], rank, 1000 * rank + partition)
        time.sleep(0.02)


def slow(rank: int) -> Iterator[tuple[int, bytes]]:
    """The first block only after a while, in which the agent hears nobody."""
    time.sleep(2.5)
    return (yield from three(rank))


def stuck(rank: int) -> Iterator[tuple[int, bytes]]:
    """Rank 1 waits for a first block that never comes."""
    time.sleep(600 if rank else 0)
    return (yield from three(rank))


def main() -> None:
    fields = json.loads(sys.argv[1])
    rows = globals()[fields.pop("rows")]
    sys.path.insert(0, str(Path(__file__).parent / "light"))
    fields["address"] = tuple(fields["address"])
    fields["key"] = bytes.fromhex(fields["key"])
    fields["timeouts"] = Timeouts(**fields["timeouts"])
    fields["files"] = {name: text.encode() for name, text in fields["files"].items()}
    task = AgentTask(
        shards=(fields["rank"],), local_rank=fields["rank"], local_size=2, task_cpus=1, gpus=None, **fields
    )
    run_agent(task, rows(task.rank))
    descriptors = os.listdir("/proc/self/fd")
    sys.stdout.write(f"left with {len(descriptors)} descriptors\n")


if __name__ == "__main__":
    main()
