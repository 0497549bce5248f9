"""The README's table of what trains where says what the tests have come to, and nothing else."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

SCRIPT = runpy.run_path(str(Path(__file__).with_name("support_table.py")))


def report(*cases: tuple[str, str]) -> str:
    """Of pytest: of each test its cell, and what it came to."""
    texts = [
        f'<testcase name="{number}"><properties><property name="support" value="{cell}"/></properties>{outcome}</testcase>'
        for number, (cell, outcome) in enumerate(cases)
    ]
    return f'<testsuites><testsuite>{"".join(texts)}<testcase name="other"/></testsuite></testsuites>'


def test_a_cell_is_what_all_its_tests_came_to() -> None:
    found = SCRIPT["cells"](
        report(
            ("mpi local", ""),
            ("mpi local", "<skipped/>"),
            ("horovod docker", ""),
            ("horovod docker", "<failure/>"),
            ("mpi docker", "<error/>"),
            ("horovod-mpi connect", "<skipped/>"),
        )
    )
    assert found == {("mpi", "local"): "passed", ("horovod", "docker"): "FAILED", ("mpi", "docker"): "FAILED"}
    lines = SCRIPT["table"](found).splitlines()
    assert lines[2].startswith("| MPI | passed | not run here |")
    assert {line.count("|") for line in lines} == {8}


def test_of_a_test_that_is_in_several_reports_the_last_one_counts() -> None:
    reports = [report(("mpi docker", "<failure/>")), report(("mpi docker", ""))]
    assert SCRIPT["cells"](*reports) == {("mpi", "docker"): "passed"}
    assert SCRIPT["cells"](*reversed(reports)) == {("mpi", "docker"): "FAILED"}


def test_a_mark_that_is_not_in_the_table_is_an_error() -> None:
    with pytest.raises(ValueError, match="'mpi' and 'moon'"):
        SCRIPT["cells"](report(("mpi moon", "")))


def test_the_readme_has_one_place_for_the_table() -> None:
    text = SCRIPT["with_table"](SCRIPT["README"].read_text(), "| new |")
    assert text.count("| new |") == 1
    assert SCRIPT["with_table"](text, "| newer |").count("| new") == 1
