"""Keras on JAX and on PyTorch, without TensorFlow. Keras chooses its backend when it is imported, so each has a run of pytest
for itself."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
LIMIT_S = 600

# Compiling takes most of the time, and nothing here is computed often.
QUICKLY = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


@pytest.mark.slow
@pytest.mark.timeout(LIMIT_S + 10)
@pytest.mark.parametrize("room", ["training", pytest.param("spark", marks=pytest.mark.spark)])
@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_ranks_are_exact_with_keras_on(tmp_path: Path, backend: str, room: str) -> None:
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed: pip install 'allreduce-spark[{backend}]'; `make test-{backend}` does")
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow/__init__.py").write_text('raise ImportError("TensorFlow is not to be needed here")')
    path = os.pathsep.join([str(tmp_path), str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "KERAS_BACKEND": backend, "XLA_FLAGS": QUICKLY}
    arguments = ["-p", "no:cacheprovider", "--quiet", str(TESTS / room / "on_any_keras_backend.py")]
    answer = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    if answer.returncode:
        pytest.fail(f"with KERAS_BACKEND={backend}, pytest says:\n{answer.stdout[-20000:]}", pytrace=False)
