"""A few thousand of the frames that `make fuzz` sends by the million."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import allreduce_spark


@pytest.mark.parametrize("seed", [1, 2])
def test_random_and_mutated_frames_are_refused_and_leave_nothing_behind(seed):
    script = Path(__file__).with_name("fuzz_frames.py")
    run = subprocess.run(
        [sys.executable, str(script), "--frames", "5000", "--seed", str(seed)],
        env={**os.environ, "PYTHONPATH": str(Path(allreduce_spark.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    for outcome in ("codec: refused", "sealed: refused", "handshake: refused", "handlers: heard"):
        assert outcome in run.stdout
