"""`run`: functions of the user's own on barrier ranks, their results, their training loops, and how they fail."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import cloudpickle
import keras
import numpy as np
import pytest
import tensorflow as tf
from pyspark import cloudpickle as spark_cloudpickle
from pyspark.sql import SparkSession

import allreduce_spark
from allreduce_spark import Communicator, DistributedOptimizer, ReduceOp, Timeouts, broadcast, run, shard_dataset
from allreduce_spark.errors import ConfigError, RankFailedError

pytestmark = pytest.mark.spark

for pickler in (cloudpickle, spark_cloudpickle):
    pickler.register_pickle_by_value(sys.modules[__name__])

X = np.random.default_rng(0).standard_normal((45, 3)).astype("float32")
Y = X @ np.float32([[1], [2], [-1]])
BATCH = 4


@pytest.fixture(autouse=True)
def session(spark: SparkSession) -> SparkSession:
    return spark


def meet(communicator: Communicator, greeting: str, *, number: int) -> tuple[Any, ...]:
    sys.stdout.write(f"{greeting} from rank {communicator.rank}\n")
    sum_, largest = np.full(3, communicator.rank + number, np.float32), np.array([communicator.rank])
    communicator.allreduce(sum_)
    communicator.allreduce(largest, ReduceOp.MAX)
    return communicator.rank, communicator.world_size, sum_, int(largest[0])


def test_every_rank_calls_the_function_and_results_come_in_their_order(caplog):
    caplog.set_level(logging.INFO, logger="allreduce_spark.rank")
    before = set(threading.enumerate())
    results = run(meet, "hello", num_ranks=2, number=10)
    assert [result[:2] for result in results] == [(0, 2), (1, 2)]
    assert not [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("allreduce")]
    assert all(result[2].tolist() == [21, 21, 21] and result[3] == 1 for result in results)
    assert sorted(line.message.partition("] ")[2] for line in caplog.records if "hello" in line.message) == [
        "hello from rank 0",
        "hello from rank 1",
    ]


def new_model(seed: int) -> keras.Model:
    keras.utils.set_random_seed(seed)
    hidden = keras.layers.Dense(5, activation="tanh")
    return keras.Sequential([keras.Input((3,)), hidden, keras.layers.Dense(1)])


def train(communicator: Communicator) -> dict[str, Any]:
    rows = shard_dataset(tf.data.Dataset.from_tensor_slices((X, Y)), communicator).batch(BATCH)
    mine = [x.numpy() for x, _ in rows]

    own_loop = new_model(communicator.rank)
    broadcast(own_loop, communicator)
    optimizer = DistributedOptimizer(keras.optimizers.SGD(0.1, momentum=0.9), communicator)

    @tf.function
    def step(x: Any, y: Any) -> None:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(own_loop(x) - y))
        optimizer.apply(tape.gradient(loss, own_loop.trainable_variables), own_loop.trainable_variables)

    for x, y in rows:
        step(x, y)

    fitted = new_model(communicator.rank)
    broadcast(fitted.weights, communicator, root=1)
    fitted.compile(DistributedOptimizer(keras.optimizers.SGD(0.1), communicator), "mse", jit_compile=False)
    fitted.fit(rows, epochs=2, verbose=0)
    again = ""
    try:
        DistributedOptimizer(optimizer, communicator)
    except allreduce_spark.AllReduceSparkError as error:
        again = str(error)
    return {"rows": mine, "loop": own_loop.get_weights(), "fit": fitted.get_weights(), "again": again}


def test_loops_of_ones_own_are_those_of_one_process_on_the_global_batches():
    results = run(train, num_ranks=2)
    assert [np.concatenate(result["rows"]).tolist() for result in results] == [X[:44:2].tolist(), X[1:44:2].tolist()]
    for name in ("loop", "fit"):
        for ours, others in zip(results[0][name], results[1][name], strict=True):
            np.testing.assert_array_equal(ours, others)
    assert all("is distributed already" in result["again"] for result in results)

    # 22 rows each, in batches of 4, 4, 4, 4, 4 and 2: as many on both ranks, so the mean of the means is that of all.
    batches = [np.r_[2 * start : min(2 * (start + BATCH), 44)] for start in range(0, 22, BATCH)]
    loop, fitted = new_model(0), new_model(1)
    loop.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    fitted.compile(keras.optimizers.SGD(0.1), "mse")
    for batch in batches:
        loop.train_on_batch(X[batch], Y[batch])
    for batch in batches * 2:
        fitted.train_on_batch(X[batch], Y[batch])
    for name, plain in (("loop", loop), ("fit", fitted)):
        for ours, expected in zip(results[0][name], plain.get_weights(), strict=True):
            np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


def fail(communicator: Communicator) -> None:
    if communicator.rank == 1:
        raise KeyError("no such column")
    communicator.barrier()


def test_what_a_rank_raises_is_the_first_cause_and_the_next_function_runs(undisturbed):
    with pytest.raises(RankFailedError, match="KeyError: 'no such column'") as raised:
        run(fail, num_ranks=2)
    assert (raised.value.rank, raised.value.phase) == (1, "function")
    assert run(lambda communicator: communicator.rank, num_ranks=2) == [0, 1]


def disagree(communicator: Communicator) -> None:
    if communicator.rank == 1:
        communicator.barrier()


def test_ranks_that_do_not_call_the_same_collectives_are_told_so(undisturbed):
    """The barrier of the one is met by that which all ranks wait in when they have returned; then nothing fits any more."""
    with pytest.raises(
        RankFailedError,
        match=r"do not agree on the next collective: rank 0 called close\(\); rank 1 called barrier\(\)",
    ):
        run(disagree, num_ranks=2)


def wait_for_ever(communicator: Communicator) -> None:
    if communicator.rank == 0:
        threading.Event().wait()
    communicator.barrier()


def test_a_function_that_goes_on_no_more_is_ended_and_its_rank_named(undisturbed):
    with pytest.raises(RankFailedError, match=r"Timeouts\.function_s") as raised:
        run(wait_for_ever, num_ranks=2, timeouts=Timeouts(function_s=2))
    assert raised.value.rank == 0


def die_once(communicator: Communicator, folder: Path) -> int:
    communicator.barrier()
    if communicator.rank == 1 and not (folder / "died").exists():
        (folder / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    communicator.barrier()
    return communicator.rank


def test_a_function_begins_anew_where_a_rank_has_died_if_it_may(undisturbed, tmp_path):
    assert run(die_once, tmp_path, num_ranks=2, max_restarts=1) == [0, 1]
    (tmp_path / "died").unlink()
    with pytest.raises(RankFailedError, match="SIGKILL"):
        run(die_once, tmp_path, num_ranks=2)


def test_what_cannot_travel_is_named():
    with pytest.raises(ConfigError, match="cannot be sent to the executors"):
        run(meet, threading.Lock(), num_ranks=1, number=1)
    with pytest.raises(ConfigError, match=r"returned on rank 0 cannot be sent to the driver.*Return plain values"):
        run(lambda communicator: threading.Lock(), num_ranks=1)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("no function",), "run needs a function, got 'no function'"),
        ((meet, 1), "num_ranks must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused_before_any_rank_starts(arguments, says):
    with pytest.raises(ConfigError, match=says):
        run(*arguments, num_ranks=0)
