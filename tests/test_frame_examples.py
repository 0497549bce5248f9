"""The examples of Spark ML, run as users run them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(script: str) -> str:
    if shutil.which("java") is None and "JAVA_HOME" not in os.environ:
        pytest.skip("Java is missing: Spark needs it (apt-get install openjdk-17-jre-headless)")
    finished = subprocess.run(
        [sys.executable, str(EXAMPLES / script), "--master", "local[2]"],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


@pytest.mark.spark
@pytest.mark.slow
def test_pipelines_classify_and_predict_rows_they_have_not_seen() -> None:
    output = run("pipeline.py")
    found = re.search(r"held-out accuracy ([0-9.]+) on wines, R2 ([0-9.]+) on diabetes", output)
    assert found is not None, output
    assert float(found[1]) >= 0.93
    assert float(found[2]) >= 0.35


@pytest.mark.spark
@pytest.mark.slow
def test_features_of_a_network_tell_digits_apart_better_than_their_pixels() -> None:
    output = run("features.py")
    found = re.search(r"held-out accuracy ([0-9.]+) from features, ([0-9.]+) from pixels", output)
    assert found is not None, output
    assert float(found[1]) >= 0.95
    assert float(found[1]) > float(found[2])
