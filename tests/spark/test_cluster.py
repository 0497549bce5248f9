"""What a fit finds out about the Spark application it runs in."""

from __future__ import annotations

import sys

import pytest
from pyspark.sql import SparkSession

from allreduce_spark import Timeouts
from allreduce_spark.spark import cluster

pytestmark = pytest.mark.spark


def test_on_one_machine_the_first_call_of_a_session_runs_this_python(
    spark: SparkSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYSPARK_PYTHON", raising=False)
    monkeypatch.setattr(spark.sparkContext, "pythonExec", "python3-of-another-environment")
    assert cluster.active_context() is spark.sparkContext
    assert spark.sparkContext.pythonExec == sys.executable


def test_a_python_that_the_user_chose_is_left_alone(spark: SparkSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYSPARK_PYTHON", "/opt/python")
    monkeypatch.setattr(spark.sparkContext, "pythonExec", "/opt/python")
    cluster.active_context()
    assert spark.sparkContext.pythonExec == "/opt/python"


def test_all_slots_are_taken_where_num_ranks_is_not_given(spark: SparkSession) -> None:
    assert cluster.count_slots(spark.sparkContext) == 2
    assert cluster.check_cluster(spark.sparkContext, None, Timeouts()) == 2
