"""What the barrier stage makes of Spark's errors."""

from __future__ import annotations

import pytest

from allreduce_spark.spark import stage


@pytest.mark.parametrize(
    ("text", "kind", "says"),
    [
        (
            "org.apache.spark.SparkException: [SPARK_JOB_CANCELLED] Job 7 cancelled part of cancelled job group nightly",
            "CancelledError",
            "Job 7 cancelled part of cancelled job group nightly",
        ),
        ("ValueError: the order was cancelled", "SparkJobFailed", "the order was cancelled"),
        ("ModuleNotFoundError: No module named 'allreduce_spark'", "MissingDependencyError", "PYSPARK_PYTHON"),
        (
            "ValueError: no\n\tat org.apache.spark.Task.run(Task.scala:147)\n\t... 3 more",
            "SparkJobFailed",
            "ValueError: no",
        ),
    ],
)
def test_errors_of_the_spark_job_are_told_apart(text: str, kind: str, says: str) -> None:
    failure = stage.failure_of_job(RuntimeError(text))
    assert failure.error == kind
    assert says in failure.cause
    assert "Task.scala" not in failure.cause


def test_the_death_of_a_worker_is_not_the_first_cause_where_its_agent_has_told_more() -> None:
    assert stage.failure_of_job(RuntimeError("Python worker exited unexpectedly (crashed)")).consequence
    assert stage.failure_of_job(RuntimeError("ExecutorLostFailure (executor 1 exited)")).consequence
    assert not stage.failure_of_job(RuntimeError("ValueError: a bad image")).consequence


def test_an_agent_that_has_lost_the_driver_is_misfortune_and_one_that_never_reached_it_is_not() -> None:
    for text in (
        "the driver is gone: the other end closed the connection",
        "rank 1 has not heard of the driver for 31 s and ends.",
    ):
        assert stage.failure_of_job(RuntimeError(f"allreduce_spark.errors.RendezvousError: {text}")).stage_lost
    text = "RendezvousError: w1 cannot reach the driver at hub:5 (timed out)"
    assert not stage.failure_of_job(RuntimeError(text)).stage_lost
