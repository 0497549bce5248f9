"""How much memory an agent and its rank need for a shard: real fits on local Spark, with shards of growing size.

    anonymous     what the process has for itself (RssAnon): this is what can run a machine out of memory
    file          pages of mapped files that are in memory just now (RssFile): libraries, and the shard as far as it was
                  read; the kernel takes them back whenever somebody else needs the memory
    total         the peak of both together, and of shared memory (VmHWM)

All are peaks, looked at every 50 ms in /proc/PID/status; of two ranks, those of the larger one. The kernel keeps VmHWM
itself and misses nothing, but an agent's also counts what Spark had done before in the same Python worker. The rows are
made inside the RDD, and the steps are few and large, so that most of the time is the way of the data: RDD -> shuffle ->
shard -> batches.
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from table import print_table

LOOK_EVERY_S = 0.05
FEATURES = 4096  # float32: 16 KiB a row, and 4 bytes for its place in the order of the epoch
BATCH_SIZE = 512  # 8 MiB
GB = 10**9
MB = 10**6
FITS = [(0.25, 1), (1.0, 1), (2.0, 1), (0.25, 2), (1.0, 2)]  # GB per shard, ranks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=1, help="how often; the table shows the largest")
    repeat = parser.parse_args().repeat
    with tempfile.TemporaryDirectory(prefix="allreduce_spark-benchmark-") as folder:
        os.environ["SPARK_LOCAL_DIRS"] = folder  # for the shuffle, and where agents make their scratch folders
        measured = measure(Path(folder), repeat)
    show(measured)


@dataclass
class Peaks:
    """The largest values seen of one kind of process, in bytes."""

    anonymous: int = 0
    file: int = 0
    total: int = 0

    def take(self, status: str) -> None:
        self.anonymous = max(self.anonymous, _bytes_in(status, "RssAnon"))
        self.file = max(self.file, _bytes_in(status, "RssFile"))
        self.total = max(self.total, _bytes_in(status, "VmHWM"))


@dataclass
class Fit:
    """One line of the table."""

    gigabytes: float
    ranks: int
    seconds: float = 0.0
    agent: Peaks = field(default_factory=Peaks)
    rank: Peaks = field(default_factory=Peaks)


def measure(folder: Path, repeat: int) -> list[Fit]:
    import keras
    from pyspark.sql import SparkSession

    from allreduce_spark import SparkModel

    builder = SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false")
    spark = builder.config("spark.ui.showConsoleProgress", "false").getOrCreate()
    fits = [Fit(gigabytes, ranks) for gigabytes, ranks in FITS]
    try:
        for fit in fits * repeat:
            rows = int(fit.gigabytes * fit.ranks * GB / (4 * FEATURES))
            data = spark.sparkContext.range(rows, numSlices=8).mapPartitions(made_rows)
            model = keras.Sequential([keras.Input((FEATURES,)), keras.layers.Dense(1)])
            model.compile("sgd", "mse")
            begin = time.monotonic()
            with Sampler(folder, fit.agent, fit.rank):
                SparkModel(model, num_ranks=fit.ranks).fit(data, batch_size=BATCH_SIZE, verbose=0)
            fit.seconds = time.monotonic() - begin
    finally:
        spark.stop()
    return fits


def made_rows(indices: Iterable[int]) -> Iterable[tuple[np.ndarray, float]]:
    """A row for each index, in a Spark task."""
    random = np.random.default_rng(0)
    for _ in indices:
        yield random.random(FEATURES, np.float32), 1.0


def show(fits: list[Fit]) -> None:
    print(
        f"\nPeak memory in MB; {4 * FEATURES:,} bytes a row, {BATCH_SIZE * 4 * FEATURES / MB:.1f} MB a batch, 1 epoch"
    )
    head = ["shard", "ranks", "rank: anonymous", "file", "total", "agent: anonymous", "file", "total", "fit"]
    rows = []
    for fit in fits:
        peaks = [value for each in (fit.rank, fit.agent) for value in (each.anonymous, each.file, each.total)]
        megabytes = [f"{value / MB:.0f}" for value in peaks]
        rows.append([f"{fit.gigabytes:g} GB", str(fit.ranks), *megabytes, f"{fit.seconds:.1f} s"])
    print_table(head, rows)
    for ranks in sorted({fit.ranks for fit in fits}):
        same = [fit for fit in fits if fit.ranks == ranks]
        slopes = {
            f"{name} {kind}": growth([(fit.gigabytes, getattr(getattr(fit, name), kind) / MB) for fit in same])
            for name in ("rank", "agent")
            for kind in ("anonymous", "file")
        }
        words = ", ".join(f"{name} {slope:+.0f}" for name, slope in slopes.items())
        print(f"{ranks} rank{'s' if ranks > 1 else ''}, MB per GB of shard: {words}; goal: rank anonymous +0")


def growth(points: list[tuple[float, float]]) -> float:
    """The slope of the line that fits best."""
    x, y = np.array(points).T
    return float(np.polyfit(x, y, 1)[0])


class Sampler:
    """Looks at the processes of one fit, in a thread, for as long as the `with` block lasts.

    A rank is known by its command line, which names its scratch folder and its agent.
    """

    def __init__(self, folder: Path, agent: Peaks, rank: Peaks) -> None:
        self._folder, self._agent, self._rank = folder, agent, rank
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(LOOK_EVERY_S):
            for rank, agent in self._find_ranks():
                self._rank.take(_read(rank / "status"))
                self._agent.take(_read(agent / "status"))

    def _find_ranks(self) -> Iterator[tuple[Path, Path]]:
        for process in Path("/proc").glob("[0-9]*"):
            command = _read(process / "cmdline")
            parent = re.search(r"--parent=(\d+)", command)
            if parent and f"--folder={self._folder}" in command:
                yield process, Path("/proc", parent[1])


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""  # it has ended


def _bytes_in(status: str, name: str) -> int:
    """A line of /proc/PID/status, such as `RssAnon:     1234 kB`; 0 where the process is about to end."""
    line: Any = re.search(rf"^{name}:\s+(\d+) kB$", status, re.MULTILINE)
    return 1024 * int(line[1]) if line else 0


if __name__ == "__main__":
    main()
