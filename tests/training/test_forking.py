"""What must not have happened before ranks are forked: see `allreduce_spark.training.forking`."""

from __future__ import annotations

import json
import os
import subprocess
import sys

LOOK_AROUND = """
import json, sys
from pathlib import Path

import allreduce_spark.training.rank
from tensorflow.python.eager import context

print(json.dumps({
    "threads": [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")],
    "modules": list(sys.modules),
    "TensorFlow has begun": context.context()._initialized,
}))
"""


def test_importing_what_a_rank_needs_starts_neither_mpi_nor_tensorflow_nor_unknown_threads():
    """With one core, as OpenBLAS then has no threads of its own; with more it ends them before each fork."""
    answer = subprocess.run(
        [sys.executable, "-c", LOOK_AROUND],
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = json.loads(answer.stdout)
    assert len(found["threads"]) - 1 == found["threads"].count("jemalloc_bg_thd") <= 1, found["threads"]
    assert "tensorflow" in found["modules"]
    assert "mpi4py" not in found["modules"]
    assert not found["TensorFlow has begun"]
