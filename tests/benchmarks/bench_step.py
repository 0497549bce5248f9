"""What the all-reduce costs a training step: two ranks on this machine, each side against the same step without it.

All sides run in the same two processes, one after the other, in rounds, so that a change of the machine's mood hits them
alike. The sides, per round:

    fit on arrays     plain `model.fit` on numpy arrays, in both processes at once, which do not know of each other
    fit               the same on the batches of a shard: what reading a shard costs
    fit, ranks        one epoch of `training.rank.train`, the product's own loop, with its callbacks
    step              `model.train_step` in a `tf.function`, on a batch that is already a tensor; no all-reduce
    step, ranks       the same with a distributed optimizer
    allreduce         our communicator alone: as many float32 as the model has parameters
    MPI.Allreduce     the library alone, blocking, without agreement, deadline or yielding

A round's time is the mean of the two ranks. The table shows medians over the rounds, and from quartile to quartile.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ranks import is_a_rank, join_group, print_table, run_ranks

from allreduce_spark.communicator.base import Communicator

BATCH_SIZE = 64
FEATURES, CLASSES = 784, 10


@dataclass(frozen=True)
class Size:
    """A model, and how long to look at it.

    Attributes:
        width: Units of each of the two hidden layers.
        steps: Steps per side and round.
        rounds: The first is thrown away, for it compiles.
        goal: To print beside the result.
    """

    width: int
    steps: int
    rounds: int
    goal: str = ""


SIZES = {
    "0.1M": Size(128, 200, 16, "goal: at most 1 ms more"),
    "2M": Size(1024, 40, 16, "goal: at most 1.3 times"),
    "25M": Size(4608, 4, 9),
}
ALONE = {"fit, ranks": "fit", "step, ranks": "step"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sizes", nargs="*", default=list(SIZES), help=f"of {', '.join(SIZES)}; default: all")
    parser.add_argument("--optimizer", default="adam")
    arguments = parser.parse_args()
    if is_a_rank():
        print(json.dumps(measure(SIZES[arguments.sizes[0]], arguments.optimizer)))
        return
    for name in arguments.sizes:
        results = run_ranks(__file__, 2, [name, "--optimizer", arguments.optimizer])
        show(name, SIZES[name], arguments.optimizer, results)


# In the benchmark's own process.


def show(name: str, size: Size, optimizer: str, results: list[dict[str, Any]]) -> None:
    parameters = results[0]["parameters"]
    rounds = {
        side: [statistics.mean(pair) for pair in zip(*(result["seconds"][side] for result in results), strict=True)]
        for side in results[0]["seconds"]
    }
    print(f"\n{name}: {parameters:,} parameters, batch {BATCH_SIZE}, {optimizer}, 2 ranks, {size.goal or 'no goal'}")
    rows = []
    for side, seconds in rounds.items():
        milliseconds = 1000 * statistics.median(seconds)
        low, _, high = (1000 * quartile for quartile in statistics.quantiles(seconds, n=4))
        added = times = rate = ""
        if side in ALONE:
            # Round by round, and only then the median: a slow round is slow for both sides.
            pairs = list(zip(seconds, rounds[ALONE[side]], strict=True))
            added = f"{1000 * statistics.median(ours - alone for ours, alone in pairs):+.2f}"
            times = f"{statistics.median(ours / alone for ours, alone in pairs):.2f}"
        if "llreduce" in side:
            rate = f"{4 * parameters / 1e6 / milliseconds:.2f}"
        rows.append([side, f"{milliseconds:.2f}", f"{low:.2f} - {high:.2f}", added, times, rate])
    print_table(["side", "ms/step", "quartiles", "added ms", "times", "GB/s"], rows)


# In each rank.


def measure(size: Size, optimizer: str) -> dict[str, Any]:
    """Run all rounds; the seconds per step of each side and round, without the first."""
    import keras
    import tensorflow as tf

    from allreduce_spark.config import FitConfig
    from allreduce_spark.data import Shard, ShardWriter, arrays_to_blocks, decode_block
    from allreduce_spark.rendezvous.status import StatusPage
    from allreduce_spark.training.batches import BatchPlan, ShardBatches
    from allreduce_spark.training.optimizer import StepRows, distribute
    from allreduce_spark.training.rank import _configure_tensorflow, train
    from allreduce_spark.world import Membership, worlds_of

    _configure_tensorflow(int(os.environ["OMP_NUM_THREADS"]))
    communicator = join_group()
    world = worlds_of(["here"] * communicator.world_size)[communicator.rank]

    def new_model() -> keras.Model:
        keras.utils.set_random_seed(0)
        hidden = [keras.layers.Dense(size.width, activation="relu") for _ in range(2)]
        model = keras.Sequential([keras.Input((FEATURES,)), *hidden, keras.layers.Dense(CLASSES)])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(optimizer, loss, metrics=["accuracy"])
        return model

    random = np.random.default_rng(communicator.rank)
    x = random.standard_normal((size.steps * BATCH_SIZE, FEATURES), np.float32)
    y = random.integers(0, CLASSES, len(x))
    batch = (tf.constant(x[:BATCH_SIZE]), tf.constant(y[:BATCH_SIZE]))

    with tempfile.TemporaryDirectory(prefix="allreduce_spark-benchmark-") as name:
        folder = Path(name)
        with ShardWriter(folder / "train.arrow") as writer:
            for _, block in arrays_to_blocks(x, y, role="train", num_shards=1):
                writer.write(decode_block(block))
        shard = Shard.open(folder / "train.arrow")
        rows = (len(shard),) * world.world_size
        batches = ShardBatches(shard, BatchPlan(rows, BATCH_SIZE), world.rank, seed=0)

        on_arrays, on_shard, alone, distributed = (new_model() for _ in range(4))
        distribute(distributed.optimizer, communicator, StepRows(BATCH_SIZE, BATCH_SIZE * world.world_size))
        sides: dict[str, Callable[[], Any]] = {
            "fit on arrays": lambda: on_arrays.fit(x, y, BATCH_SIZE, verbose=0),
            "fit": lambda: on_shard.fit(batches, shuffle=False, verbose=0),
            "step": repeated(size.steps, tf.function(alone.train_step), batch),
            "step, ranks": repeated(size.steps, tf.function(distributed.train_step), batch),
            **communication(communicator, alone.count_params(), size.steps),
        }
        seconds: dict[str, list[float]] = {side: [] for side in (*sides, "fit, ranks")}

        class OtherSides(keras.callbacks.Callback):
            """Times each epoch of `train`, and all other sides in between."""

            def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
                for side, run in sides.items():
                    communicator.barrier()
                    begin = time.perf_counter()
                    run()
                    seconds[side].append((time.perf_counter() - begin) / size.steps)
                communicator.barrier()
                self.begin = time.perf_counter()

            def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
                seconds["fit, ranks"].append((time.perf_counter() - self.begin) / size.steps)

        train(
            new_model(),
            communicator,
            FitConfig(epochs=size.rounds, batch_size=BATCH_SIZE),
            Membership(world, 0, "benchmark", rows, (0,) * world.world_size),
            shards=(shard, Shard.open(folder / "train.arrow")),
            callbacks=[OtherSides()],
            seed_states=[],
            status=StatusPage(folder / "status"),
            report=(lambda **fields: None) if world.is_root else None,
        )
    communicator.close()
    order = ["fit on arrays", "fit", "fit, ranks", "step", "step, ranks", "allreduce", "MPI.Allreduce"]
    return {"parameters": alone.count_params(), "seconds": {side: seconds[side][1:] for side in order}}


def repeated(times: int, function: Callable[..., Any], *arguments: Any) -> Callable[[], None]:
    def run() -> None:
        for _ in range(times):
            function(*arguments)

    return run


def communication(communicator: Communicator, elements: int, times: int) -> dict[str, Callable[[], None]]:
    """Both ways to sum as many numbers as the model has parameters."""
    from mpi4py import MPI

    buffer = np.zeros(elements + 1, np.float32)  # and the rows
    return {
        "allreduce": repeated(times, communicator.allreduce, buffer),
        "MPI.Allreduce": repeated(times, MPI.COMM_WORLD.Allreduce, MPI.IN_PLACE, buffer),
    }


if __name__ == "__main__":
    sys.exit(main())
