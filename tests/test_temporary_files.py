"""What the library writes beside what users ask for lies in folders that only their user can enter."""

from __future__ import annotations

import ast
import os
import stat
from pathlib import Path

import pytest

import allreduce_spark
from allreduce_spark.launch.scratch import scratch_folder

PACKAGE = Path(allreduce_spark.__file__).parent
# `mkdtemp`, and `TemporaryDirectory` over it, make folders of mode 0700. `gettempdir` makes nothing: it is where they lie.
PRIVATE = {"TemporaryDirectory", "mkdtemp", "gettempdir"}


def temporary_things(source: str) -> set[str]:
    """The names of `tempfile` that a source uses."""
    tree = ast.parse(source)
    imported = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "tempfile"
        for alias in node.names
    }
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "tempfile"
    }
    return imported | used


def test_every_way_to_name_a_temporary_file_is_seen():
    source = "import tempfile\nfrom tempfile import mkstemp\ntempfile.mktemp()\ntempfile.NamedTemporaryFile()"
    assert temporary_things(source) == {"mkstemp", "mktemp", "NamedTemporaryFile"}


@pytest.mark.parametrize("module", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_temporary_files_lie_in_private_folders(module):
    assert temporary_things(module.read_text(encoding="utf-8")) <= PRIVATE


def test_the_folder_of_an_agent_is_private_whatever_the_umask(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARK_LOCAL_DIRS", str(tmp_path))
    before = os.umask(0)
    try:
        with scratch_folder() as folder:
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    finally:
        os.umask(before)
