"""One of the faults, so that the runner does not rot; all of them are `make chaos`."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

RUNNER = Path(__file__).parent / "run.py"


@pytest.mark.spark
@pytest.mark.slow
def test_a_fit_gets_over_a_killed_agent_as_the_chaos_runner_tells(tmp_path: Path) -> None:
    if shutil.which("java") is None:
        pytest.skip("Java is missing: Spark needs it (apt-get install openjdk-17-jre-headless)")
    command = [sys.executable, str(RUNNER), "--folder", str(tmp_path), "--repeats", "1", "--faults", "kill-agent"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.split()[:2] == ["ok", "kill-agent"]


def test_the_chaos_runner_knows_at_least_as_many_faults_as_were_promised() -> None:
    listed = subprocess.run([sys.executable, str(RUNNER), "--list"], capture_output=True, text=True, check=True)
    assert len(listed.stdout.splitlines()) >= 24
