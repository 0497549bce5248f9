"""What the client of a Connect session decides by itself, without a server."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from allreduce_spark.errors import ConfigError
from allreduce_spark.rendezvous.group import Failure
from allreduce_spark.spark.connect.driver import END, Outcome
from allreduce_spark.spark.connect.operation import Operation, Stage, running
from allreduce_spark.spark.connect.session import check_result_size, slots_of
from allreduce_spark.spark.connect.stage import barrier_has_begun, outcome_of
from allreduce_spark.spark.engine import engine_for

SOURCE = Stage(0, 5, 5, True)  # of the user's, with a shuffle behind it
MAP = Stage(2, 8, 8, True)  # brings its rows to two ranks


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        ([], False),
        ([Stage(0, 2, 0, False)], False),
        ([Stage(0, 2, 2, True), Stage(1, 2, 0, False), Stage(2, 5, 3, False)], False),
        ([SOURCE, Stage(1, 5, 0, False), Stage(2, 8, 0, False)], False),
        ([SOURCE, MAP, Stage(4, 8, 0, False), Stage(5, 2, 0, False)], True),
        ([SOURCE, MAP, Stage(4, 8, 0, False), Stage(5, 2, 1, False)], True),
        ([SOURCE, Stage(1, 8, 3, False), Stage(2, 2, 0, False)], False),  # without adaptive execution
        ([SOURCE, Stage(1, 8, 8, True), Stage(2, 2, 0, False)], True),
    ],
)
def test_the_stage_of_the_ranks_is_known_by_its_tasks_and_by_the_stage_before(
    stages: list[Stage], expected: bool
) -> None:
    assert barrier_has_begun(stages, num_ranks=2) is expected


class Frame:
    """A query that does not end."""

    def toLocalIterator(self) -> Iterator[Any]:
        threading.Event().wait()
        return iter(())


class Session:
    """A session whose server is gone.

    Args:
        waits_s: For how long it is asked again before that is an error.
    """

    def __init__(self, waits_s: float) -> None:
        self.waits_s = waits_s

    def getTags(self) -> set[str]:
        return set()

    def addTag(self, tag: str) -> None: ...
    def registerProgressHandler(self, handler: Any) -> None: ...

    def interruptTag(self, tag: str) -> None:
        time.sleep(self.waits_s)
        raise ConnectionError("the server is gone")


@pytest.mark.parametrize("waits_s", [0, 600])
def test_what_ends_a_query_is_raised_and_soon_also_where_the_server_is_gone(waits_s: float) -> None:
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), running(Operation(Session(waits_s), Frame(), print), teardown_s=0.5):  # type: ignore[arg-type]
        raise KeyboardInterrupt
    assert time.monotonic() - began < 5


def test_a_thread_that_has_made_no_session_uses_the_default_one(monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip("pyspark.sql.connect.session", exc_type=ImportError)
    monkeypatch.setenv("SPARK_CONNECT_MODE_ENABLED", "1")
    with ThreadPoolExecutor(1) as another_thread:
        monkeypatch.setattr(module.SparkSession, "_default_session", None)
        with pytest.raises(ConfigError, match="there is no active Spark Connect session"):
            another_thread.submit(engine_for, ()).result()
        default = SimpleNamespace(is_stopped=False, session_id="of the thread that has made it")
        monkeypatch.setattr(module.SparkSession, "_default_session", default)
        assert another_thread.submit(engine_for, ()).result().application == default.session_id


def gpus(of_executor: int | None, of_task: float, cores: int | None = 4) -> dict[str, str]:
    settings = {"spark.executor.cores": cores, "spark.executor.resource.gpu.amount": of_executor}
    asked = {"spark.task.resource.gpu.amount": of_task, "spark.master": "spark://master:7077"}
    return {name: str(value) for name, value in {**settings, **asked}.items() if value is not None}


@pytest.mark.parametrize(
    ("cores", "settings", "expected"),
    [
        (8, {}, 8),
        (8, {"spark.task.cpus": "3"}, 2),
        (12, {"spark.task.cpus": "3", "spark.executor.cores": "4"}, 3),  # a core of each executor is left
        (12, gpus(2, 1), 6),
        (12, gpus(8, 1), 12),
        (12, gpus(4, 2), 6),
        (12, gpus(1, 0.5), 6),
        (12, gpus(1, 0.3), 9),
        (12, {**gpus(2, 1), "spark.task.resource.fpga.amount": "1", "spark.executor.resource.fpga.amount": "1"}, 3),
        (12, gpus(2, 1, cores=None), None),
        (12, gpus(None, 1), None),
        (4, {"spark.master": "local[4]", "spark.executor.cores": "3"}, 4),
    ],
)
def test_slots_are_counted_by_all_that_a_task_asks_for(
    cores: int, settings: dict[str, str], expected: int | None
) -> None:
    assert slots_of(cores, settings) == expected


@pytest.mark.parametrize(
    ("setting", "limit"),
    [
        (None, 1 << 30),
        ("1g", 1 << 30),
        ("64MB", 64 << 20),
        ("2k", 2048),
        ("700", 700),
        ("100b", 100),
        ("0", None),
        ("x", None),
    ],
)
def test_a_model_that_the_server_would_not_take_back_is_refused(setting: str | None, limit: int | None) -> None:
    settings = {} if setting is None else {"spark.driver.maxResultSize": setting}
    check_result_size(settings, limit or 1 << 50)
    if limit is not None:
        with pytest.raises(ConfigError, match=rf"spark\.driver\.maxResultSize={setting or '1g'} .* or more"):
            check_result_size(settings, limit + 1)


def test_a_model_that_the_server_would_not_take_back_is_refused_with_its_size() -> None:
    with pytest.raises(
        ConfigError, match=r"are 1500 MiB at least, .* Start the server with spark.driver.maxResultSize=1688m"
    ):
        check_result_size({}, 1500 << 20)


def test_a_failure_that_the_ranks_driver_names_counts_for_more_than_what_spark_says(tmp_path: Path) -> None:
    spark_says = RuntimeError("Job aborted due to stage failure: ExecutorLostFailure")
    assert "ExecutorLost" in outcome_of(tmp_path, spark_says).failure.cause
    Outcome(None, place=(3, 1)).write(tmp_path)
    assert outcome_of(tmp_path, None) == Outcome(None, place=(3, 1))
    assert outcome_of(tmp_path, spark_says).stage_is_lost, "results may be missing"
    (tmp_path / END).touch()
    assert outcome_of(tmp_path, spark_says) == Outcome(None, place=(3, 1)), (
        "another task was stuck, and has been cancelled"
    )
    (tmp_path / END).unlink()
    named = Outcome(Failure("AgentLost", "the machine of rank 1 is gone", rank=1), True, (2, 0))
    named.write(tmp_path)
    assert outcome_of(tmp_path, spark_says) == named
