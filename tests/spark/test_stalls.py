"""What does not come to an end (a task of Spark's, a store) is given up when its setting says so, and named."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from pyspark import SparkContext
from pyspark.sql import SparkSession

from allreduce_spark import Checkpoint, SparkModel, Timeouts
from allreduce_spark.checkpoint.store import Store
from allreduce_spark.errors import AllReduceSparkError, ConfigError, RendezvousTimeoutError

pytestmark = pytest.mark.spark

LIMIT_S = 60.0
X, Y = np.ones((8, 3)), np.ones(8)
ROWS = [(np.ones(3), 1.0)] * 8


def hang(rows: Iterable[Any]) -> Iterator[Any]:
    time.sleep(600)
    yield from rows


def fit(rows: Any, timeouts: Timeouts | None = None, **arguments: Any) -> Any:
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    return SparkModel(model, num_ranks=2, timeouts=timeouts).fit(rows, verbose=0, max_restarts=0, **arguments)


@pytest.fixture
def context(spark: SparkSession, nothing_is_left: None) -> Iterator[SparkContext]:
    """At the end no task runs any more, and the next fit works."""
    yield spark.sparkContext
    deadline = time.monotonic() + LIMIT_S
    while stages := spark.sparkContext.statusTracker().getActiveStageIds():
        assert time.monotonic() < deadline, f"stages {stages} still run"
        time.sleep(0.1)
    assert np.isfinite(fit(spark.sparkContext.parallelize(ROWS, 2)).history["loss"][0])


@pytest.mark.parametrize(("resume", "method"), [("auto", "latest"), ("never", "put_model")])
def test_a_store_that_hangs_is_waited_for_until_checkpoint_s_is_over(
    context: SparkContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: str, method: str
) -> None:
    answers = threading.Event()
    monkeypatch.setattr(Store, method, lambda *_: answers.wait(LIMIT_S))
    place = str(tmp_path / "store")
    with pytest.raises(ConfigError, match=rf"{place}.* not answered for 0\.5 s\. Setting: Timeouts\.checkpoint_s"):
        fit((X, Y), Timeouts(checkpoint_s=0.5), checkpoint=Checkpoint(place), resume=resume)
    answers.set()


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
