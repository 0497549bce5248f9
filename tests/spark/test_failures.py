"""Whatever ends a fit, the user sees the first cause, nothing is left behind, and the next fit on the session works."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import keras
import numpy as np
import pytest
from leftovers import scratch_folders
from py4j.protocol import Py4JJavaError
from pyspark import cloudpickle as spark_cloudpickle
from pyspark.sql import SparkSession
from waiting import wait_until

from allreduce_spark import SparkModel, Timeouts
from allreduce_spark.errors import CancelledError, DataError, RankFailedError

pytestmark = pytest.mark.spark

for pickler in (cloudpickle, spark_cloudpickle):
    pickler.register_pickle_by_value(sys.modules[__name__])

LIMIT_S = 60.0


def compiled() -> keras.Model:
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    return model


DATA = (np.ones((64, 3), "float32"), np.ones((64, 1), "float32"))


def fit(num_ranks: int = 2, timeouts: Timeouts | None = None, data: Any = DATA, **arguments: Any) -> Any:
    spark_model = SparkModel(compiled(), num_ranks=num_ranks, timeouts=timeouts)
    return spark_model.fit(data, **{"batch_size": 4, "verbose": 0, "max_restarts": 0, **arguments})


def test_a_module_that_only_the_driver_has_is_named_with_the_way_to_send_it(
    spark: SparkSession, nothing_is_left: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "only_here.py").write_text("import keras\nclass Quiet(keras.callbacks.Callback): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    import only_here

    with pytest.raises(RankFailedError, match=r"No module named 'only_here'\. .* travel with spark-submit --py-files"):
        fit(callbacks=[only_here.Quiet()])


class Slow(keras.callbacks.Callback):
    """Makes an epoch last for minutes, and writes down which rank runs in which process."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if batch == 2:
            sys.stdout.write("the third step is done\n")
            (self.folder / f"rank-{os.environ['PMI_RANK']}").write_text(str(os.getpid()))
        if batch >= 2:
            time.sleep(30)


class Pausing(Slow):
    """Goes on after a moment, step by step: only a rank that is stopped hangs."""

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if batch == 2:
            (self.folder / f"rank-{os.environ['PMI_RANK']}").write_text(str(os.getpid()))
        time.sleep(2)


class OnOneRank(keras.callbacks.Callback):
    """Does something in the second step, on rank 1 only."""

    def __init__(self, deed: Any) -> None:
        super().__init__()
        self.deed = deed

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if batch == 1 and os.environ["PMI_RANK"] == "1":
            self.deed()


def pid_of_rank(folder: Path, rank: int) -> int:
    """The process of a rank that has trained for three steps."""
    wait_until(lambda: len(list(folder.glob("rank-*"))) == 2, "both ranks train", LIMIT_S)
    return int(wait_until((folder / f"rank-{rank}").read_text, "the rank has said who it is", LIMIT_S))


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/status").read_text().split("PPid:")[1].split()[0])


@pytest.fixture
def next_fit_works(spark: SparkSession, nothing_is_left: None) -> Iterator[None]:
    yield
    assert np.isfinite(fit().history["loss"][0])


def in_background(deed: Any) -> threading.Thread:
    thread = threading.Thread(target=deed, daemon=True)
    thread.start()
    return thread


def test_a_rank_that_is_killed_ends_the_fit_within_seconds_and_is_named(
    spark: SparkSession, tmp_path: Path, next_fit_works: None
) -> None:
    killed_at = []

    def kill() -> None:
        pid = pid_of_rank(tmp_path, 1)
        killed_at.append(time.monotonic())
        os.kill(pid, signal.SIGKILL)

    in_background(kill)
    with pytest.raises(RankFailedError) as caught:
        fit(callbacks=[Slow(tmp_path)])
    assert time.monotonic() - killed_at[0] < 5
    error = caught.value
    assert (error.rank, error.phase, error.step) == (1, "train", 2)
    assert error.host == os.uname().nodename
    assert "killed by SIGKILL" in error.cause
    assert "the third step is done" in error.log_tail
    assert f"rank 1 on {error.host} failed first in phase 'train' at epoch 0, step 2" in str(error)


def test_an_agent_that_is_killed_takes_its_rank_along_and_its_folder_is_cleared_by_the_next_fit(
    spark: SparkSession, tmp_path: Path, next_fit_works: None
) -> None:
    def kill() -> None:
        warm_process = parent_of(pid_of_rank(tmp_path, 1))
        os.kill(parent_of(warm_process), signal.SIGKILL)

    in_background(kill)
    with pytest.raises(RankFailedError, match="the agent is gone") as caught:
        fit(callbacks=[Slow(tmp_path)])
    assert (caught.value.rank, caught.value.host) == (1, os.uname().nodename)


def test_the_rows_of_a_predict_that_is_killed_are_removed_by_the_next_one(
    spark: SparkSession, own_temporary_folder: str
) -> None:
    model = SparkModel(compiled(), num_ranks=2)
    rows, before = np.zeros((8, 3), "float32"), scratch_folders(own_temporary_folder)
    with pytest.raises(Py4JJavaError):
        model.predict(
            spark.sparkContext.parallelize(list(rows), 1).map(lambda row: os.kill(os.getpid(), signal.SIGKILL))
        )
    (left,) = scratch_folders(own_temporary_folder) - before
    assert model.predict(rows).shape == (8, 1)
    assert left not in scratch_folders(own_temporary_folder)


def raise_in_callback() -> None:
    raise KeyError("a mistake in the user's callback")


def test_an_exception_in_a_callback_on_one_rank_is_shown_with_its_traceback(
    spark: SparkSession, nothing_is_left: None
) -> None:
    with pytest.raises(RankFailedError) as caught:
        fit(callbacks=[OnOneRank(raise_in_callback)])
    error = caught.value
    assert (error.rank, error.phase, error.step) == (1, "train", 1)
    assert error.cause.startswith('KeyError: "a mistake in the user\'s callback"')
    assert "in raise_in_callback" in error.cause


def test_a_rank_that_exits_is_not_taken_for_one_that_is_done(spark: SparkSession, nothing_is_left: None) -> None:
    def leave() -> None:
        sys.stdout.write("leaving\n")
        os._exit(3)

    with pytest.raises(RankFailedError, match=r"rank 1 .*exit code 3 before its work was done") as caught:
        fit(callbacks=[OnOneRank(leave)])
    assert "leaving" in caught.value.log_tail


def test_a_bad_row_ends_the_fit_with_its_place(spark: SparkSession, nothing_is_left: None) -> None:
    rows = [(np.ones(3), 1.0)] * 9 + [(np.ones(5), 1.0)]
    with pytest.raises(DataError, match=r"partition 1, row 4, x has shape \(5,\), but shape \(3,\) in the first row"):
        fit(data=spark.sparkContext.parallelize(rows, 2))


def test_an_exception_in_the_users_map_function_is_the_cause_that_is_shown(
    spark: SparkSession, nothing_is_left: None
) -> None:
    def parse(number: int) -> Any:
        if number == 7:
            raise ValueError("no such image: 7.png")
        return np.ones(3), 1.0

    with pytest.raises(RankFailedError, match=r"no such image: 7\.png") as caught:
        fit(data=spark.sparkContext.parallelize(range(10), 2).map(parse))
    assert "in parse" in str(caught.value)
    assert "org.apache.spark.scheduler" not in str(caught.value)


def test_cancelling_the_users_own_job_group_cancels_the_fit(
    spark: SparkSession, tmp_path: Path, next_fit_works: None
) -> None:
    context = spark.sparkContext
    context.setJobGroup("nightly", "the user's own group", interruptOnCancel=True)
    cancelled_at = []

    def cancel() -> None:
        pid_of_rank(tmp_path, 0)
        cancelled_at.append(time.monotonic())
        context.cancelJobGroup("nightly")

    in_background(cancel)
    try:
        with pytest.raises(CancelledError, match="nightly"):
            fit(callbacks=[Slow(tmp_path)])
        assert time.monotonic() - cancelled_at[0] < 8
    finally:
        context._jsc.clearJobGroup()


def test_a_rank_that_hangs_is_named_when_its_step_takes_too_long(
    spark: SparkSession, tmp_path: Path, next_fit_works: None
) -> None:
    stopped_at = []

    def stop() -> None:
        pid = pid_of_rank(tmp_path, 1)
        stopped_at.append(time.monotonic())
        os.kill(pid, signal.SIGSTOP)

    in_background(stop)
    with pytest.raises(RankFailedError) as caught:
        fit(timeouts=Timeouts(step_s=12.0), callbacks=[Pausing(tmp_path)])
    assert time.monotonic() - stopped_at[0] < 20
    # Rank 0 waits for it, and so has not gone on either: from outside they cannot always be told apart.
    assert caught.value.rank == 1 or "ranks [1]" in caught.value.cause
    assert "Timeouts.step_s" in caught.value.cause


PROGRAM = """
import sys, time
from pathlib import Path
import keras, numpy as np

from pyspark.sql import SparkSession
from allreduce_spark import SparkModel

class Slow(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        import os
        Path(sys_argv, "rank-" + os.environ["PMI_RANK"]).write_text(str(os.getpid()))
        time.sleep(30)

sys_argv = sys.argv[1]
spark = SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false").getOrCreate()
model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
model.compile("sgd", "mse")
try:
    SparkModel(model, num_ranks=2).fit((np.ones((64, 3)), np.ones(64)), callbacks=[Slow()], verbose=0)
except KeyboardInterrupt:
    print("interrupted", flush=True)
    sys.exit(130)
"""


def test_ctrl_c_on_the_driver_leaves_no_rank(nothing_is_left: None, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(PROGRAM)
    with subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as driver:
        try:
            pids = [pid_of_rank(tmp_path, rank) for rank in (0, 1)]
            os.killpg(driver.pid, signal.SIGINT)  # as a terminal does it: to the whole foreground group
            output, _ = driver.communicate(timeout=20)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(driver.pid, signal.SIGKILL)
    assert driver.returncode == 130
    assert "interrupted" in output
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
