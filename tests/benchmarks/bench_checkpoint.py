"""What a checkpoint costs: how long the training step waits for its copy, and what the thread that writes it takes.

first         memory and file are new: the pages have to be made
again         both are used a second time, as in all checkpoints of a fit but the first three
a new file    for comparison, the same copy into a file that is mapped and preallocated each time anew
"""

from __future__ import annotations

import argparse
import mmap
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from table import print_table

from allreduce_spark.checkpoint.shares import ShareWriter

TENSORS = 60
FIRST = 3  # two shares stay and one is written over, so three files are made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=150, help="one rank's share: 25 M parameters, Adam, 2 ranks")
    parser.add_argument("--pause", type=float, default=2.0, help="seconds between two checkpoints")
    parser.add_argument("--repeat", type=int, default=12)
    args = parser.parse_args()
    draw = np.random.default_rng(0)
    size = args.megabytes * 10**6 // TENSORS // 4
    tensors = {f"shared/weights/{index}": draw.random(size, np.float32) for index in range(TENSORS)}
    with tempfile.TemporaryDirectory(prefix="allreduce_spark-benchmark-", dir=".") as folder:
        writer = ShareWriter(Path(folder), 0)
        ours = [save(writer, step, tensors, args.pause) for step in range(args.repeat)]
        new_files = [map_new_file(Path(folder) / "new", tensors) for _ in range(4)]
    rows = [
        ["first", *medians(ours[:1])],
        ["again", *medians(ours[FIRST:])],
        ["a new file", *medians([(copied, None, None) for copied in new_files])],
    ]
    print_table(["", "step waits, ms", "thread, ms", "thread's CPU, ms"], rows)


def save(writer: ShareWriter, step: int, tensors: dict[str, np.ndarray], pause_s: float) -> tuple[float, float, float]:
    """Seconds of the copy, of the rest, and of the processor in the rest."""
    time.sleep(pause_s)  # the kernel writes old pages back meanwhile, as it would
    begin = time.perf_counter()
    writer.copy(f"000000-{step:08d}", tensors, {"step": step})
    copied, cpu = time.perf_counter(), time.process_time()
    writer.finish()
    return copied - begin, time.perf_counter() - copied, time.process_time() - cpu


def map_new_file(path: Path, tensors: dict[str, np.ndarray]) -> float:
    """Seconds of the copy into a file that is preallocated and mapped."""
    size = sum(array.nbytes for array in tensors.values())
    with path.open("wb+") as file:
        os.posix_fallocate(file.fileno(), 0, size)
        with mmap.mmap(file.fileno(), size) as mapped:
            begin, offset = time.perf_counter(), 0
            for array in tensors.values():
                mapped[offset : offset + array.nbytes] = memoryview(array).cast("B")
                offset += array.nbytes
            seconds = time.perf_counter() - begin
    path.unlink()
    return seconds


def medians(measured: list[tuple[float, float | None, float | None]]) -> list[str]:
    columns = [[value for value in column if value is not None] for column in zip(*measured, strict=True)]
    return [f"{statistics.median(column) * 1e3:.0f}" if column else "-" for column in columns]


if __name__ == "__main__":
    main()
