"""The examples are run as users run them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
NUMBER = r"([0-9.]+)"


def run(script: str, *arguments: str) -> str:
    """Run an example on two ranks of this machine; it ends with 0 where it reaches what it promises."""
    if shutil.which("java") is None and "JAVA_HOME" not in os.environ:
        pytest.skip("Java is missing: Spark needs it (apt-get install openjdk-17-jre-headless)")
    finished = subprocess.run(
        [sys.executable, str(EXAMPLES / script), "--master", "local[2]", *arguments],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


@pytest.mark.spark
@pytest.mark.slow
def test_digits_reach_the_accuracy_that_the_readme_promises() -> None:
    output = run("digits.py", "--num-ranks", "2")
    found = re.search(rf"held-out accuracy {NUMBER}", output)
    assert found is not None, output
    assert float(found[1]) >= 0.95
    assert len(re.findall(r"^Epoch \d+/15 - .* - accuracy: .* - val_loss: ", output, re.MULTILINE)) == 15


@pytest.mark.spark
@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "arguments", "says", "least"),
    [
        ("rdd.py", [], rf"held-out accuracy {NUMBER}", [0.9]),
        ("mllib.py", [], rf"held-out accuracy {NUMBER}", [0.9]),
        ("pipeline.py", [], rf"held-out accuracy {NUMBER} on wines, R2 {NUMBER} on diabetes", [0.93, 0.35]),
        ("features.py", [], rf"held-out accuracy {NUMBER} from features", [0.95]),
        (
            "search.py",
            ["--max-trials", "4", "--epochs", "5"],
            rf"accuracy {NUMBER}, of . models together {NUMBER}",
            [0.8] * 2,
        ),
    ],
)
def test_an_example_prints_what_a_model_that_has_learnt_can_do(
    script: str, arguments: list[str], says: str, least: list[float]
) -> None:
    output = run(script, *arguments)
    found = re.search(says, output)
    assert found is not None, output
    assert all(float(value) >= bound for value, bound in zip(found.groups(), least, strict=True)), found[0]
