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


@pytest.mark.spark
@pytest.mark.slow
def test_digits_reach_the_accuracy_that_the_readme_promises() -> None:
    if shutil.which("java") is None and "JAVA_HOME" not in os.environ:
        pytest.skip("Java is missing: Spark needs it (apt-get install openjdk-17-jre-headless)")
    finished = subprocess.run(
        [sys.executable, str(EXAMPLES / "digits.py"), "--master", "local[2]", "--num-ranks", "2"],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    found = re.search(r"held-out accuracy ([0-9.]+)", finished.stdout)
    assert found is not None
    assert float(found[1]) >= 0.95
    assert len(re.findall(r"^Epoch \d+/15 - .* - accuracy: .* - val_loss: ", finished.stdout, re.MULTILINE)) == 15
