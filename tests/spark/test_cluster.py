"""What a fit finds out about the Spark application it runs in."""

from __future__ import annotations

import sys
from types import SimpleNamespace

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


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"spark.driver.host": "10.0.0.1"}, ("10.0.0.1", "10.0.0.1")),
        ({"spark.driver.host": "driver", "spark.driver.bindAddress": "0.0.0.0"}, ("0.0.0.0", "driver")),
        ({"spark.driver.host": "[fd00::1]", "spark.driver.bindAddress": "[::]"}, ("::", "fd00::1")),
    ],
)
def test_addresses_of_the_driver_are_taken_from_spark_without_the_brackets_of_ipv6(
    settings: dict[str, str], expected: tuple[str, str]
) -> None:
    context = SimpleNamespace(master="spark://anywhere:7077", getConf=lambda: settings)
    assert cluster.driver_addresses(context) == expected
