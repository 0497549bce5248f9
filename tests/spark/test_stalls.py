"""Spark's own tasks that do not end: a fit that waits for them gives up when its setting says so, and says for which."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import keras
import numpy as np
import pytest
from pyspark import SparkContext
from pyspark.sql import SparkSession

from allreduce_spark import SparkModel, Timeouts
from allreduce_spark.errors import AllReduceSparkError, RendezvousTimeoutError

pytestmark = pytest.mark.spark

LIMIT_S = 60.0
ROWS = [(np.ones(3), 1.0)] * 8


def hang(rows: Iterable[Any]) -> Iterator[Any]:
    time.sleep(600)
    yield from rows


def fit(rows: Any, timeouts: Timeouts | None = None) -> Any:
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    return SparkModel(model, num_ranks=2, timeouts=timeouts).fit(rows, verbose=0, max_restarts=0)


@pytest.fixture
def context(spark: SparkSession, nothing_is_left: None) -> Iterator[SparkContext]:
    """At the end no task runs any more, and the next fit works."""
    yield spark.sparkContext
    deadline = time.monotonic() + LIMIT_S
    while stages := spark.sparkContext.statusTracker().getActiveStageIds():
        assert time.monotonic() < deadline, f"stages {stages} still run"
        time.sleep(0.1)
    assert np.isfinite(fit(spark.sparkContext.parallelize(ROWS, 2)).history["loss"][0])


@pytest.mark.parametrize("partitions", [2, 3], ids=["in the stage itself", "in a stage before"])
def test_rows_that_never_come_are_waited_for_until_spool_s_is_over(context: SparkContext, partitions: int) -> None:
    rows = context.parallelize(ROWS, partitions).mapPartitions(hang)
    with pytest.raises(AllReduceSparkError) as caught:
        fit(rows, Timeouts(spool_s=3))
    assert "Setting: Timeouts.spool_s" in str(caught.value)


def test_a_job_that_keeps_the_slots_is_named_when_spool_s_is_over(context: SparkContext) -> None:
    def keep() -> None:
        context.setJobGroup("keeper", "the user's own job", interruptOnCancel=True)
        with pytest.raises(Exception, match="cancelled"):
            context.parallelize(range(2), 2).mapPartitions(hang).count()

    with ThreadPoolExecutor(1) as pool:
        keeper = pool.submit(keep)
        while not context.statusTracker().getActiveStageIds():
            time.sleep(0.01)
        try:
            with pytest.raises(RendezvousTimeoutError) as caught:
                fit(context.parallelize(ROWS, 2), Timeouts(spool_s=3))
        finally:
            context.cancelJobGroup("keeper")
        keeper.result(LIMIT_S)
    assert "waited 3 s for the tasks of Spark's stages" in str(caught.value)
    assert "(count at " in str(caught.value)
    assert "Setting: Timeouts.spool_s" in str(caught.value)
