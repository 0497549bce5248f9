"""What the all-reduce costs a training step: two ranks on this machine, each side against the same step without it.

All sides run in the same two processes, one after the other, in rounds, so that a change of the machine's mood hits
them alike. The sides of a round:

    fit on arrays     plain `model.fit` on numpy arrays, in both processes at once, which do not know of each other
    fit               the same on the batches of a shard: what reading a shard costs
    fit, ranks        one epoch of `training.rank.train`, the product's own loop, with its callbacks
    step              `model.train_step` in a `tf.function`, on a batch that is already a tensor; no all-reduce
    step, ranks       the same with a distributed optimizer
    allreduce         our communicator alone: as many float32 as the model has parameters
    MPI.Allreduce     the library alone: blocking, without agreement, deadline or yielding

A round's time is the mean of the two ranks. The table shows medians over the rounds, and from quartile to quartile.
What was added is compared round by round, and only then is the median taken.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from ranks import is_a_rank, join_group, run_ranks
from table import print_table

from allreduce_spark.communicator.base import Communicator
from allreduce_spark.config import FitConfig
from allreduce_spark.data import Shard, ShardWriter, arrays_to_blocks, decode_block
from allreduce_spark.rendezvous.status import StatusPage
from allreduce_spark.training.batches import BatchPlan, ShardBatches
from allreduce_spark.training.cores import use_cores
from allreduce_spark.training.optimizer import StepRows, distribute
from allreduce_spark.training.rank import train
from allreduce_spark.world import Membership, worlds_of

NUM_RANKS = 2
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
    goal: str


SIZES = {
    "0.1M": Size(128, 200, 16, "goal: at most +1 ms"),
    "2M": Size(1024, 40, 16, "goal: at most 1.3 times"),
    "25M": Size(4608, 4, 9, "no goal"),
}
SIDES = ["fit on arrays", "fit", "fit, ranks", "step", "step, ranks", "allreduce", "MPI.Allreduce"]
ALONE = {"fit, ranks": "fit", "step, ranks": "step"}  # what each is compared with


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sizes", nargs="*", default=list(SIZES), help=f"of {', '.join(SIZES)}; default: all")
    parser.add_argument("--optimizer", default="adam")
    arguments = parser.parse_args()
    if is_a_rank():
        print(json.dumps(measure(SIZES[arguments.sizes[0]], arguments.optimizer)))
        return
    for name in arguments.sizes:
        results = run_ranks(__file__, NUM_RANKS, [name, "--optimizer", arguments.optimizer])
        parameters = results[0]["parameters"]
        print(f"\n{parameters:,} parameters, batch {BATCH_SIZE}, {arguments.optimizer}, {NUM_RANKS} ranks; ", end="")
        print(f"{SIZES[name].goal}")
        show(parameters, [result["seconds"] for result in results])


# In the benchmark's own process.


def show(parameters: int, seconds_of_ranks: list[dict[str, list[float]]]) -> None:
    """Print the table of one model, from the seconds per step of each rank, side and round."""
    rounds = {
        side: [statistics.mean(pair) for pair in zip(*(seconds[side] for seconds in seconds_of_ranks), strict=True)]
        for side in SIDES
    }
    rows = []
    for side, seconds in rounds.items():
        milliseconds = 1000 * statistics.median(seconds)
        low, _, high = (1000 * quartile for quartile in statistics.quantiles(seconds, n=4))
        added = times = rate = ""
        if side in ALONE:
            pairs = list(zip(seconds, rounds[ALONE[side]], strict=True))
            added = f"{1000 * statistics.median(ours - alone for ours, alone in pairs):+.2f}"
            times = f"{statistics.median(ours / alone for ours, alone in pairs):.2f}"
        if "llreduce" in side:
            rate = f"{4 * parameters / 1e6 / milliseconds:.2f}"
        rows.append([side, f"{milliseconds:.2f}", f"{low:.2f} - {high:.2f}", added, times, rate])
    print_table(["side", "ms/step", "quartiles", "added ms", "times", "GB/s"], rows)


# In each rank.


def measure(size: Size, optimizer: str) -> dict[str, Any]:
    """Run all rounds; the number of parameters, and the seconds per step of each side and round."""
    use_cores(int(os.environ["OMP_NUM_THREADS"]))
    communicator = join_group()
    world = worlds_of(["here"] * communicator.world_size)[communicator.rank]
    random = np.random.default_rng(world.rank)
    x = random.standard_normal((size.steps * BATCH_SIZE, FEATURES), np.float32)
    y = random.integers(0, CLASSES, len(x))
    models = [new_model(size.width, optimizer) for _ in range(5)]
    with tempfile.TemporaryDirectory(prefix="allreduce_spark-benchmark-") as name:
        folder = Path(name)
        write_shard(folder / "train.arrow", x, y)
        rows = (len(x),) * world.world_size
        shard = Shard.open(folder / "train.arrow")
        batches = ShardBatches({world.rank: shard}, BatchPlan(rows, BATCH_SIZE, world.world_size), seed=0)
        other_sides = OtherSides(
            communicator,
            size.steps,
            {
                "fit on arrays": lambda: models[0].fit(x, y, BATCH_SIZE, verbose=0),
                "fit": lambda: models[1].fit(batches.dataset(), shuffle=False, verbose=0),
                **bare_steps(models[2], models[3], communicator, (x[:BATCH_SIZE], y[:BATCH_SIZE]), size.steps),
                **communication(communicator, models[0].count_params() + 1, size.steps),  # and the number of rows
            },
        )
        train(
            models[4],
            communicator,
            FitConfig(epochs=size.rounds, batch_size=BATCH_SIZE),
            Membership(world, 0, "benchmark", rows, (0,) * world.world_size),
            shards={world.rank: (shard, shard)},  # the second, with its 0 rows, is not looked at
            callbacks=[other_sides],
            seed_states=[],
            status=StatusPage(folder / "status"),
            report=(lambda **fields: None) if world.is_root else None,
        )
    communicator.close()
    seconds = {side: per_round[1:] for side, per_round in other_sides.seconds.items()}
    return {"parameters": models[0].count_params(), "seconds": seconds}


class OtherSides(keras.callbacks.Callback):
    """A user's callback in the product's own loop: times each epoch, and all other sides before it."""

    def __init__(self, communicator: Communicator, steps: int, sides: dict[str, Callable[[], Any]]) -> None:
        super().__init__()
        self._communicator, self._steps, self._sides = communicator, steps, sides
        self.seconds: dict[str, list[float]] = {side: [] for side in SIDES}

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        for side, run in self._sides.items():
            self._begin()
            run()
            self._end(side)
        self._begin()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._end("fit, ranks")

    def _begin(self) -> None:
        self._communicator.barrier()  # so that both ranks are busy at the same time
        self._began_at = time.perf_counter()

    def _end(self, side: str) -> None:
        self.seconds[side].append((time.perf_counter() - self._began_at) / self._steps)


def new_model(width: int, optimizer: str) -> keras.Model:
    keras.utils.set_random_seed(0)
    hidden = [keras.layers.Dense(width, activation="relu") for _ in range(2)]
    model = keras.Sequential([keras.Input((FEATURES,)), *hidden, keras.layers.Dense(CLASSES)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"])
    return model


def write_shard(path: Path, x: np.ndarray, y: np.ndarray) -> None:
    with ShardWriter(path) as writer:
        for _, block in arrays_to_blocks(x, y, role="train", num_shards=1):
            writer.write(decode_block(block))


def bare_steps(
    alone: keras.Model, distributed: keras.Model, communicator: Communicator, batch: tuple[Any, ...], times: int
) -> dict[str, Callable[[], None]]:
    """The compiled training step itself, without and with the all-reduce in it."""
    distribute(distributed.optimizer, communicator, StepRows(BATCH_SIZE, BATCH_SIZE * communicator.world_size))
    tensors = tuple(tf.constant(array) for array in batch)
    return {
        "step": repeated(times, tf.function(alone.train_step), tensors),
        "step, ranks": repeated(times, tf.function(distributed.train_step), tensors),
    }


def communication(communicator: Communicator, elements: int, times: int) -> dict[str, Callable[[], None]]:
    """Both ways to sum so many numbers."""
    from mpi4py import MPI  # not above: a process that imports it before our communicator initialises MPI

    buffer = np.zeros(elements, np.float32)
    return {
        "allreduce": repeated(times, communicator.allreduce, buffer),
        "MPI.Allreduce": repeated(times, MPI.COMM_WORLD.Allreduce, MPI.IN_PLACE, buffer),
    }


def repeated(times: int, function: Callable[..., Any], *arguments: Any) -> Callable[[], None]:
    def run() -> None:
        for _ in range(times):
            function(*arguments)

    return run


if __name__ == "__main__":
    main()
