"""Fits that run at once in one driver take turns for the slots."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import keras
import numpy as np
import pytest

from allreduce_spark import SparkModel, Timeouts
from allreduce_spark.spark import ranks, slots
from allreduce_spark.spark.slots import hold_slots
from allreduce_spark.spark.stage import run_stage


class Holders:
    """Threads that hold slots until they are told to let go; says who holds them, in the order in which they got them."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.order: list[str] = []
        self.got = threading.Semaphore(0)

    def start(self, name: str, num_ranks: int, kind: str | None = None) -> threading.Event:
        let_go = threading.Event()

        def hold() -> None:
            with hold_slots(num_ranks, lambda: self.total, kind):
                self.order.append(name)
                self.got.release()
                assert let_go.wait(30)

        threading.Thread(target=hold, daemon=True).start()
        return let_go


def test_fits_that_fit_side_by_side_do_not_wait():
    holders = Holders(total=4)
    one, two = holders.start("one", 2), holders.start("two", 2)
    assert holders.got.acquire(timeout=10)
    assert holders.got.acquire(timeout=10)
    one.set()
    two.set()


def test_fits_whose_slots_are_of_different_kinds_do_not_run_side_by_side():
    holders = Holders(total=4)
    first = holders.start("with GPUs", 2, "gpu=1")
    assert holders.got.acquire(timeout=10)
    second = holders.start("without", 1)
    assert not holders.got.acquire(timeout=0.7)
    first.set()
    assert holders.got.acquire(timeout=10)
    second.set()


def test_a_small_fit_does_not_overtake_a_large_one_that_waits():
    holders = Holders(total=2)
    first = holders.start("first", 1)
    assert holders.got.acquire(timeout=10)
    large = holders.start("large", 2)
    while not_yet_waiting():
        pass
    small = holders.start("small", 1)
    assert not holders.got.acquire(timeout=0.7)  # neither: the large one lacks a slot, the small one its turn
    first.set()
    assert holders.got.acquire(timeout=10)
    large.set()
    assert holders.got.acquire(timeout=10)
    small.set()
    assert holders.order == ["first", "large", "small"]


def not_yet_waiting() -> bool:
    return not slots._waiting


def test_a_fit_that_needs_more_than_there_is_runs_alone():
    with hold_slots(5, lambda: 2):
        pass


def test_an_error_gives_the_slots_back():
    with pytest.raises(ZeroDivisionError), hold_slots(2, lambda: 2):
        raise ZeroDivisionError
    with hold_slots(2, lambda: 2):
        pass


@pytest.mark.spark
def test_two_threads_that_each_want_all_slots_train_one_after_the_other(spark, monkeypatch):
    x = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
    y = x.sum(axis=1)
    running, most = [], []

    def watched(*arguments):
        running.append(1)
        most.append(len(running))
        try:
            return run_stage(*arguments)
        finally:
            running.pop()

    monkeypatch.setattr(ranks, "run_stage", watched)

    def train(seed: int) -> list[float]:
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        model.compile(keras.optimizers.SGD(0.1), "mse")
        return SparkModel(model, num_ranks=2).fit((x, y), epochs=20, batch_size=8, verbose=0, seed=seed).history["loss"]

    with ThreadPoolExecutor(2) as pool:
        losses = list(pool.map(train, (1, 2)))
    assert most == [1, 1]
    assert all(loss[-1] < 0.1 * loss[0] for loss in losses)


@pytest.mark.spark
def test_start_s_does_not_run_while_another_job_has_the_slots_or_the_rows_are_made(spark):
    def slowly(rows: Iterable[Any]) -> Iterator[Any]:
        time.sleep(16)  # longer than start_s
        yield from rows

    context, x = spark.sparkContext, np.random.default_rng(0).normal(size=(16, 4)).astype("float32")
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    with ThreadPoolExecutor(1) as pool:
        other_job = pool.submit(context.parallelize(range(2), 2).mapPartitions(slowly).count)
        while not context.statusTracker().getActiveStageIds():
            time.sleep(0.01)
        rows = context.parallelize([(row, row.sum()) for row in x], 2).mapPartitions(slowly)
        history = SparkModel(model, num_ranks=2, timeouts=Timeouts(start_s=13)).fit(rows, batch_size=8, verbose=0)
    assert other_job.result() == 2
    assert len(history.history["loss"]) == 1
