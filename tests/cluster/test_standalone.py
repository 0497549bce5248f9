"""A real standalone cluster: scripts run with spark-submit and with python, and come to an end by themselves."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyspark
import pytest
from leftovers import scratch_folders

pytestmark = [pytest.mark.spark, pytest.mark.cluster, pytest.mark.slow]

REPOSITORY = Path(__file__).parents[2]
DIGITS = str(REPOSITORY / "examples" / "digits.py")
SUBMIT = str(Path(pyspark.__file__).parent / "bin" / "spark-submit")
RUN_S = 200.0
EXIT_S = 20.0  # of which Spark's own shutdown takes some seconds


class Watchdog:
    """Kills a driver, and all that it has started, when its time is over."""

    def __init__(self, driver: subprocess.Popen[str]) -> None:
        self._driver, self.expired = driver, False
        self.expire_in(RUN_S)

    def expire_in(self, limit_s: float) -> None:
        self.stop()
        self._timer = threading.Timer(limit_s, self._expire)
        self._timer.daemon = True
        self._timer.start()

    def stop(self) -> None:
        if hasattr(self, "_timer"):
            self._timer.cancel()

    def _expire(self) -> None:
        self.expired = True
        os.killpg(self._driver.pid, signal.SIGKILL)


def run(command: list[str], environment: dict[str, str], on_line: Callable[[str], None] = lambda line: None) -> str:
    """Run a driver to its end and return what it printed; it must exit with 0, and soon after its last line."""
    with subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as driver:
        watchdog = Watchdog(driver)
        try:
            assert driver.stdout is not None
            lines = []
            for line in driver.stdout:
                lines.append(line)
                on_line(line)
                if line.startswith(("held-out accuracy", "the work is done")):
                    watchdog.expire_in(EXIT_S)
            driver.wait()
        finally:
            watchdog.stop()
    output = "".join(lines)
    assert not watchdog.expired, f"the driver did not come to its end:\n{output}"
    assert driver.returncode == 0, output
    return output


def test_spark_submit_trains_on_two_executors_and_returns(cluster: Any) -> None:
    before = set(cluster.executors())
    settings = ["--conf", "spark.executor.cores=1", "--conf", "spark.cores.max=2"]
    output = run([SUBMIT, "--master", cluster.url, *settings, DIGITS, "--num-ranks", "2"], cluster.environment)
    found = re.search(r"held-out accuracy ([0-9.]+)", output)
    assert found is not None, output
    assert float(found[1]) >= 0.9
    assert {path.split("/")[0] for path in set(cluster.executors()) - before} == {"worker-1", "worker-2"}
    assert scratch_folders(cluster.folder) == set()


PROGRAM = """
import sys
import keras, numpy as np
from pyspark.sql import SparkSession
from allreduce_spark import SparkModel, Timeouts
from allreduce_spark.errors import ConfigError
from allreduce_spark.spark.cluster import count_slots

model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
model.compile("sgd", "mse")
spark = SparkSession.builder.master(sys.argv[1]).getOrCreate()
print("slots at the start:", count_slots(spark.sparkContext), flush=True)
history = SparkModel(model, num_ranks=2).fit((np.ones((8, 3)), np.ones(8)), verbose=2)
print("slots at the end:", count_slots(spark.sparkContext))
try:
    SparkModel(model, num_ranks=3, timeouts=Timeouts(slots_s=1)).fit((np.ones((8, 3)), np.ones(8)), verbose=2)
except ConfigError as error:
    print("refused:", error)
print("the work is done", flush=True)
"""


def test_a_fit_right_after_the_session_is_created_waits_for_the_executors(cluster: Any, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(PROGRAM)

    def let_workers(signal_number: int) -> None:
        for worker in cluster.workers:
            os.killpg(worker.pid, signal_number)

    def let_workers_go_on(line: str) -> None:
        if line.startswith("slots at the start"):
            threading.Timer(2, let_workers, [signal.SIGCONT]).start()

    let_workers(signal.SIGSTOP)  # so that no executor can be there yet
    try:
        output = run([sys.executable, str(script), cluster.url], cluster.environment, let_workers_go_on)
    finally:
        let_workers(signal.SIGCONT)
    assert "slots at the start: 0" in output
    assert "Epoch 1/1" in output
    assert "slots at the end: 2" in output
    assert re.search(r"refused: num_ranks=3 needs 3 slots at once, .* has 2 .*2 executors", output)


def test_spark_submit_in_local_mode_returns(java: None, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(PROGRAM)
    environment = {**os.environ, "PYSPARK_PYTHON": sys.executable, "SPARK_LOCAL_IP": "127.0.0.1"}
    output = run([SUBMIT, "--master", "local[2]", str(script), "local[2]"], environment)
    assert "slots at the end: 2" in output
