"""Which GPU a process is to use: what Spark gave, what the machine has, and what TensorFlow can do with it."""

from __future__ import annotations

import importlib.util
import os
from types import SimpleNamespace

import pytest

from allreduce_spark.launch import gpus
from allreduce_spark.launch.gpus import choose_gpus, gpu_environment, machine_gpus, names_of, seen_by_cuda


@pytest.fixture
def dev(tmp_path):
    """A /dev with two GPUs, and the other files that NVIDIA's driver makes there."""
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "nvidia-modeset", "null"):
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("listed", "seen"),
    [
        (None, ("0", "1")),
        ("", ()),
        ("-1", ()),
        ("1", ("1",)),
        ("1, 0", ("1", "0")),
        ("1,7,0", ("1",)),
        ("NoDevFiles", ()),
        ("GPU-8932f937,MIG-GPU-8932f937/1/0", ("GPU-8932f937", "MIG-GPU-8932f937/1/0")),
    ],
)
def test_the_gpus_of_a_machine_are_those_that_cuda_would_show(dev, listed, seen):
    assert machine_gpus({} if listed is None else {"CUDA_VISIBLE_DEVICES": listed}, dev) == seen
    assert machine_gpus({"CUDA_VISIBLE_DEVICES": "0"}, dev / "none") == ()


def test_a_gpu_that_cannot_be_opened_does_not_count(dev, monkeypatch):
    def refuse(path, flags):
        if path.name == "nvidia0":
            raise PermissionError(1, "Operation not permitted", str(path))
        return os.dup(0)

    monkeypatch.setattr(gpus.os, "open", refuse)
    assert machine_gpus({}, dev) == ("0",), "CUDA numbers those that it can open"


def test_two_executors_may_call_different_gpus_by_one_address(tmp_path, monkeypatch, caplog):
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert names_of(["0"]) == ("0",)
    tool.write_text('#!/bin/sh\n[ "$3" = --id=0,1 ] || exit 6\necho GPU-aa\necho GPU-bb\n')
    tool.chmod(0o755)
    assert names_of(["0", "1"]) == ("GPU-aa", "GPU-bb")
    assert names_of(["MIG-1", "0"]) == ("MIG-1", "0")
    assert not caplog.records
    assert names_of(["7"]) == ("7",)
    assert "does not tell the names of GPUs 7" in caplog.text


def test_a_rank_takes_what_spark_gave_and_else_the_gpu_of_its_local_rank(monkeypatch):
    monkeypatch.setattr(gpus, "machine_gpus", lambda environ: ("0", "1"))
    monkeypatch.setattr(gpus, "why_tensorflow_has_none", lambda environ: None)
    assert [choose_gpus(None, local_rank) for local_rank in range(3)] == [("0",), ("1",), ("0",)]
    assert choose_gpus(["3", "2"], 1) == ("3", "2")
    monkeypatch.setattr(gpus, "why_tensorflow_has_none", lambda environ: "no CUDA")
    assert choose_gpus(None, 0) is None, "TensorFlow on processors leaves the GPUs to others"
    assert choose_gpus(["3"], 1) == ("3",)


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Returns lay(is_cuda_build, library): a TensorFlow of that build, and whether CUDA's runtime lies in a package."""

    def lay(is_cuda_build, library):
        about = tmp_path / "tensorflow" / "python" / "platform" / "build_info.py"
        about.parent.mkdir(parents=True, exist_ok=True)
        about.write_text(f"build_info = collections.OrderedDict([('is_cuda_build', {is_cuda_build}), ('x', False)])\n")
        folder = tmp_path / "nvidia" / "cuda_runtime" / "lib"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "libcudart.so.12").touch() if library else (folder / "libcudart.so.12").unlink(missing_ok=True)

    def find_spec(name):
        return (
            SimpleNamespace(submodule_search_locations=[str(tmp_path / name)]) if (tmp_path / name).exists() else None
        )

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    monkeypatch.setattr(gpus.ctypes.util, "find_library", lambda name: None)
    return lay


def test_a_tensorflow_that_cannot_use_gpus_is_told_by_its_files(packages, tmp_path):
    assert gpus.why_tensorflow_has_none({}) == "TensorFlow is not installed"
    packages(is_cuda_build=False, library=True)
    assert "build without CUDA" in gpus.why_tensorflow_has_none({})
    packages(is_cuda_build=True, library=False)
    assert "libraries of CUDA" in gpus.why_tensorflow_has_none({})
    (tmp_path / "libcudart.so.12").touch()
    assert gpus.why_tensorflow_has_none({"LD_LIBRARY_PATH": f"/nowhere:{tmp_path}"}) is None
    packages(is_cuda_build=True, library=True)
    assert gpus.why_tensorflow_has_none({}) is None


def test_spark_and_cuda_number_gpus_alike_and_a_worker_keeps_its_environment(monkeypatch):
    assert gpu_environment(["3"], {}) == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "3"}
    assert gpu_environment([], {"CUDA_DEVICE_ORDER": "FASTEST_FIRST"})["CUDA_DEVICE_ORDER"] == "FASTEST_FIRST"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    before = dict(os.environ)
    with seen_by_cuda(None):
        assert dict(os.environ) == before
    with seen_by_cuda(("2",)):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "2"
    assert dict(os.environ) == before
