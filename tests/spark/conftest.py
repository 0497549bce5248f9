"""What fits must not leave behind, and the fit that others are compared with."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

sys.path.insert(0, str(Path(__file__).parent))  # for `faulty_fits`, which is also a program
from leftovers import orphaned_segments, scratch_folders


@pytest.fixture(scope="session")
def undisturbed(spark: SparkSession) -> Any:
    """What the fit of `faulty_fits` ends with if it is left alone."""
    from faulty_fits import SETTINGS, fit  # only here: it imports Keras

    outcome = fit(max_restarts=0)
    assert 3 < len(outcome.history["loss"]) < SETTINGS["epochs"], "EarlyStopping has its part in it"
    return outcome


def rank_processes(temporary_folder: str) -> set[int]:
    """The ranks of this test run, and the processes that they are forked from.

    They know its temporary folder, which those of other runs on this machine do not.
    """
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            is_rank = b"allreduce_spark.training" in (process / "cmdline").read_bytes()
            if is_rank and temporary_folder.encode() in (process / "environ").read_bytes():
                found.add(int(process.name))
    return found


@pytest.fixture
def nothing_is_left(own_temporary_folder: str) -> Iterator[None]:
    """After the test there is no rank, no shared memory and no temporary folder that was not there before."""

    def all_there_is() -> tuple[set[int], set[str], set[str]]:
        return rank_processes(own_temporary_folder), orphaned_segments(), scratch_folders(own_temporary_folder)

    before = all_there_is()
    yield
    deadline = time.monotonic() + 3
    while any(left := [now - then for now, then in zip(all_there_is(), before, strict=True)]):
        assert time.monotonic() < deadline, "left behind: ranks {}, shared memory {}, folders {}".format(*left)
        time.sleep(0.1)
