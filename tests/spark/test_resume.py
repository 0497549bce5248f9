"""A driver that is started again goes on from the folder of its checkpoints; what is not the same fit is refused."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import faulty_fits
import keras
import pytest
from faulty_fits import Outcome, X, Y, compiled, fit, steps_in
from pyspark.sql import SparkSession

from allreduce_spark import Checkpoint
from allreduce_spark.checkpoint.store import Store
from allreduce_spark.errors import ConfigError

pytestmark = pytest.mark.spark


@pytest.fixture(scope="module")
def finished(undisturbed: Outcome, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all checkpoints of a fit."""
    folder = tmp_path_factory.mktemp("finished") / "store"
    fit(checkpoint=Checkpoint(str(folder), every_steps=4, keep=99)).check_is(undisturbed)
    return folder


@pytest.fixture
def store(finished: Path, tmp_path: Path) -> Path:
    """The same, as if the driver had died in the midst of the fourth epoch."""
    folder = tmp_path / "store"
    shutil.copytree(finished, folder)
    for manifest in Store(folder).checkpoints():
        if manifest.epoch >= 4 or (manifest.epoch == 3 and manifest.step > 2):
            shutil.rmtree(folder / manifest.id)
    return folder


def run_driver(fault: str | None, folder: Path) -> subprocess.CompletedProcess[str]:
    wish = {"master": "local[2]", "store": str(folder / "store"), "folder": str(folder), "fault": fault}
    environment = {**os.environ, "PYSPARK_PYTHON": sys.executable, "SPARK_LOCAL_IP": "127.0.0.1"}
    command = [sys.executable, faulty_fits.__file__, json.dumps(wish)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_a_driver_that_is_killed_and_started_again_ends_with_the_same_bits(
    undisturbed: Outcome, nothing_is_left: None, tmp_path: Path
) -> None:
    first = run_driver("driver", tmp_path)
    assert first.returncode == -signal.SIGKILL, first.stderr
    steps_before = steps_in(tmp_path)
    second = run_driver("driver", tmp_path)  # the fault comes once
    assert second.returncode == 0, second.stderr
    Outcome.read(tmp_path / "outcome.npz").check_is(undisturbed)
    steps = steps_in(tmp_path) - steps_before
    assert steps < 6 * len(undisturbed.history["loss"]), "it has gone on from a checkpoint"


def test_a_damaged_checkpoint_is_passed_over_and_the_fit_goes_on_from_the_one_before(
    undisturbed: Outcome, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before, newest = Store(store).checkpoints()[-2:]
    share = store / newest.id / newest.shares[1].name
    content = bytearray(share.read_bytes())
    content[-1] ^= 1
    share.write_bytes(content)
    with caplog.at_level(logging.INFO, "allreduce_spark"):
        fit(checkpoint=Checkpoint(str(store), every_steps=4, keep=99), resume="auto", seed=None).check_is(undisturbed)
    assert f"checkpoint {newest.id} is damaged, falling back to the one before" in caplog.text
    assert f"going on from checkpoint {before.id}" in caplog.text
    assert not Store(store).verify(newest.id)


def test_a_fit_that_had_come_to_its_end_is_not_trained_again(
    undisturbed: Outcome, finished: Path, tmp_path: Path
) -> None:
    fit(folder=tmp_path, checkpoint=Checkpoint(str(finished)), resume="auto").check_is(undisturbed)
    assert steps_in(tmp_path) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"resume": "never"}, "holds .* checkpoints already, .*Pass resume='auto'"),
        ({"model": "wider"}, "the model: saved with 4 layers and 129 parameters"),
        ({"model": "sgd"}, "the optimizer: saved with .*Adam.*, now .*SGD"),
        ({"batch_size": 5}, "the global batch size: saved with 14, now 10"),
        ({"validation_split": 0.0, "validation_data": (X, Y)}, "the rows: saved with"),
        ({"seed": 12}, "the seed: saved with 11, now 12"),
        ({"shuffle": False}, "shuffle: saved with True, now False"),
    ],
    ids=["never", "model", "optimizer", "batch size", "rows", "seed", "shuffle"],
)
def test_what_is_another_fit_is_refused_before_any_rank_starts(
    spark: SparkSession, nothing_is_left: None, store: Path, tmp_path: Path, arguments: dict[str, Any], words: str
) -> None:
    if "model" in arguments:
        model = compiled(units=17) if arguments["model"] == "wider" else compiled()
        if arguments["model"] == "sgd":
            model.compile(keras.optimizers.SGD(0.1), "mse", metrics=["mae"])
        arguments = {**arguments, "model": model}
    for name, file in (("000004-00000000", "manifest.json"), ("000004-00000002", "share-0-1.safetensors")):
        (store / name).mkdir()
        (store / name / file).write_text("damaged, or never complete")
    files = {path: path.read_bytes() for path in store.rglob("*.*")}
    with pytest.raises(ConfigError, match=words):
        fit(folder=tmp_path, **{"checkpoint": Checkpoint(str(store)), "resume": "auto", **arguments})
    assert steps_in(tmp_path) == 0
    assert {path: path.read_bytes() for path in store.rglob("*.*")} == files


def test_a_folder_that_cannot_be_used_is_refused_before_any_rank_starts(spark: SparkSession, tmp_path: Path) -> None:
    file, foreign = tmp_path / "file", tmp_path / "foreign"
    file.touch()
    foreign.mkdir()
    (foreign / "thesis.tex").touch()
    for path, words in ((file, "file"), (file / "below", "below"), (foreign, r"no folder of checkpoints.*thesis\.tex")):
        for resume in ("auto", "never"):
            with pytest.raises(ConfigError, match=words):
                fit(folder=tmp_path, checkpoint=Checkpoint(str(path)), resume=resume)
    assert steps_in(tmp_path) == 0
