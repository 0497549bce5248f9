"""Executors, workers and drivers of a real cluster are killed while ranks train: the fit goes on, and ends as it should."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faulty_fits
import pyspark
import pytest
from faulty_fits import Outcome
from leftovers import scratch_folders
from pyspark.sql import SparkSession

pytestmark = [pytest.mark.spark, pytest.mark.cluster, pytest.mark.slow]

SUBMIT = str(Path(pyspark.__file__).parent / "bin" / "spark-submit")
RUN_S = 150.0


@contextlib.contextmanager
def driver(cluster: Any, command: list[str], **wish: Any) -> Iterator[subprocess.Popen[str]]:
    """The program `faulty_fits`, in a group of its own that is gone at the end."""
    arguments = json.dumps({"master": cluster.url, **wish})
    with subprocess.Popen(
        [*command, faulty_fits.__file__, arguments],
        env=cluster.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as started:
        try:
            yield started
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGKILL)


def run(cluster: Any, folder: Path, command: list[str], **wish: Any) -> tuple[int, str]:
    """Run a driver to its end: its exit code, and what it printed."""
    with driver(cluster, command, folder=str(folder), store=str(folder / "store"), **wish) as started:
        output, _ = started.communicate(timeout=RUN_S)
        return started.returncode, output


def ranks(folder: Path) -> list[str]:
    """The processes of ranks that run in a cluster with this folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (process / "cmdline").read_bytes()
            if b"allreduce_spark.training" in command and str(folder).encode() in (process / "environ").read_bytes():
                found.append(process.name)
    return found


def check_nothing_is_left(cluster: Any) -> None:
    deadline = time.monotonic() + 5
    while any(left := (ranks(cluster.folder), scratch_folders(cluster.folder))):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


@pytest.fixture(scope="module")
def without_dropout(spark: SparkSession) -> Outcome:
    """What the fit ends with if it is left alone. Masks of dropout are each rank's own, so one rank draws others than two."""
    return faulty_fits.fit(model=faulty_fits.compiled(dropout=0.0), max_restarts=0)


def test_an_executor_that_is_killed_is_replaced_and_the_weights_are_the_same(
    doomed_cluster: Any, without_dropout: Outcome, tmp_path: Path
) -> None:
    before = len(doomed_cluster.executors())
    code, output = run(doomed_cluster, tmp_path, [sys.executable], dropout=0.0, fault="executor")
    assert code == 0, output
    assert len(doomed_cluster.executors()) == before + 3
    assert "another barrier stage goes on from" in output
    # With a new executor in time there are two ranks again, and the same bits; else one takes the batches of both.
    outcome = Outcome.read(tmp_path / "outcome.npz")
    if "with 1 of 2 ranks" not in output:
        outcome.check_is(without_dropout)
    outcome.check_is_close_to(without_dropout)
    check_nothing_is_left(doomed_cluster)
    sys.stdout.write(output[-400:])


def test_a_driver_that_is_killed_and_submitted_again_goes_on_with_the_same_bits(
    doomed_cluster: Any, without_dropout: Outcome, tmp_path: Path
) -> None:
    command = [SUBMIT, "--conf", "spark.executor.cores=1"]
    code, output = run(doomed_cluster, tmp_path, command, dropout=0.0, fault="driver")
    assert code != 0, output
    steps_before = faulty_fits.steps_in(tmp_path)
    code, output = run(doomed_cluster, tmp_path, command, dropout=0.0, fault="driver")  # the fault comes once
    assert code == 0, output
    Outcome.read(tmp_path / "outcome.npz").check_is(without_dropout)
    steps = faulty_fits.steps_in(tmp_path) - steps_before
    assert steps < 6 * len(without_dropout.history["loss"]), "it has gone on from a checkpoint"
    check_nothing_is_left(doomed_cluster)


# The last one: the cluster does not get its worker back.
def test_a_machine_that_is_lost_for_good_leaves_its_shards_to_the_other_one(
    doomed_cluster: Any, without_dropout: Outcome, tmp_path: Path
) -> None:
    wish = {"folder": str(tmp_path), "store": str(tmp_path / "store"), "dropout": 0.0, "pause_s": 0.2}
    with driver(doomed_cluster, [sys.executable], **wish) as started:
        deadline = time.monotonic() + RUN_S
        while faulty_fits.steps_in(tmp_path) < 9:
            assert time.monotonic() < deadline
            assert started.poll() is None
            time.sleep(0.05)
        os.killpg(doomed_cluster.workers[1].pid, signal.SIGKILL)  # and with it its executor
        output, _ = started.communicate(timeout=RUN_S)
    assert started.returncode == 0, output
    assert re.search(r"from epoch 1, step [024] with 1 of 2 ranks", output)
    Outcome.read(tmp_path / "outcome.npz").check_is_close_to(without_dropout)
    assert ranks(doomed_cluster.folder) == []  # of the files on a machine that is lost nobody can take care
    sys.stdout.write(output[-400:])
