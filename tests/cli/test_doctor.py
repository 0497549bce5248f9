"""The doctor: what each check says of a machine that has a thing, lacks it, or has a wrong one."""

from __future__ import annotations

import ast
import glob
import mmap
import os
import subprocess
import sys
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import pytest

from allreduce_spark.cli import doctor, machine, software, two_ranks
from allreduce_spark.cli.main import main
from allreduce_spark.cli.result import Status, fail, ok, warn
from allreduce_spark.errors import CollectiveTimeoutError
from allreduce_spark.launch import gpus

REPOSITORY = Path(__file__).parents[2]


class Usage(NamedTuple):
    """Of what `shutil.disk_usage` returns, the part that is read."""

    free: int


@pytest.fixture
def program(tmp_path):
    """Writes a small program with this name and body; returns an environment whose PATH holds it first."""

    def write(name, body):
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
        return {"PATH": f"{folder}:/usr/bin:/bin"}

    return write


@pytest.fixture
def installed(monkeypatch):
    """Makes the doctor believe that these packages, in these versions, are all there is."""

    def pretend(**versions):
        monkeypatch.setattr(software, "version_of", lambda module: versions.get(module))
        monkeypatch.setattr(metadata, "packages_distributions", lambda: {module: [module] for module in versions})

    return pretend


# Python and Java


def test_an_old_python_is_refused():
    assert software.check_python((3, 9, 18)).status is Status.FAIL
    assert software.check_python((3, 10, 0)) == ok("3.10.0")


@pytest.mark.parametrize(
    ("answer", "version"),
    [
        ('openjdk version "17.0.15" 2025-04-15', 17),
        ('java version "1.8.0_362"', 8),
        ('openjdk version "21" 2023-09-19', 21),
        ('openjdk version "25-ea"', 25),
        ("bash: java: command not found", None),
        ("", None),
    ],
)
def test_the_java_version_is_read_in_its_old_and_new_form(answer, version):
    assert software.java_version(answer) == version


def test_java_on_the_path_is_found(program):
    result = software.check_java(program("java", """echo 'openjdk version "17.0.1" 2021-10-19' >&2"""))
    assert result.status is Status.OK
    assert result.found.startswith("17 (")


def test_java_home_wins_over_the_path(program, tmp_path):
    environ = program("java", """echo 'openjdk version "17.0.1"' >&2""")
    result = software.check_java({**environ, "JAVA_HOME": str(tmp_path / "nowhere")})
    assert result.status is Status.FAIL
    assert "nowhere holds no bin/java" in result.found


def test_a_missing_java_comes_with_the_way_to_install_it(tmp_path):
    result = software.check_java({"PATH": str(tmp_path)})
    assert result.status is Status.FAIL
    assert "openjdk-17" in result.advice
    assert "JAVA_HOME" in result.advice


@pytest.mark.parametrize(("spark", "status"), [("4.0.0", Status.FAIL), (None, Status.FAIL), ("3.5.1", Status.WARN)])
def test_an_old_java_is_refused_unless_spark_is_old_as_well(program, installed, spark, status):
    installed(**({"pyspark": spark} if spark else {}))
    assert software.check_java(program("java", """echo 'openjdk version "11.0.2"' >&2""")).status is status


def test_a_java_that_does_not_run_is_refused(program, installed):
    installed()
    assert "does not tell its version" in software.check_java(program("java", "echo no such jvm >&2; exit 3")).found


# Packages


@pytest.mark.parametrize(
    ("version", "status"),
    [(None, Status.FAIL), ("3.4.2", Status.FAIL), ("3.5.1", Status.OK), ("4.3.0", Status.OK), ("5.0.0", Status.WARN)],
)
def test_spark_versions(installed, version, status):
    installed(pyspark=version)
    assert software.check_spark().status is status


@pytest.mark.parametrize(
    ("version", "status"), [(None, Status.FAIL), ("2.15.1", Status.FAIL), ("2.18.0", Status.OK), ("2.21.0", Status.OK)]
)
def test_tensorflow_versions(installed, version, status):
    installed(tensorflow=version)
    assert software.check_tensorflow().status is status


def test_two_tensorflows_in_one_place_are_a_warning(installed, monkeypatch):
    installed(tensorflow="2.21.0")
    both = {"tensorflow": ["tensorflow-cpu", "tensorflow"]}
    monkeypatch.setattr(metadata, "packages_distributions", lambda: both)
    result = software.check_tensorflow()
    assert result.status is Status.WARN
    assert "tensorflow and tensorflow-cpu" in result.found


@pytest.mark.parametrize(
    ("environ", "status"),
    [
        ({}, Status.OK),
        ({"KERAS_BACKEND": "tensorflow"}, Status.OK),
        ({"KERAS_BACKEND": "jax"}, Status.OK),
        ({"KERAS_BACKEND": "torch"}, Status.FAIL),  # it is not installed
        ({"KERAS_BACKEND": "numpy"}, Status.FAIL),
        ({"TF_USE_LEGACY_KERAS": "1"}, Status.WARN),
        ({"TF_USE_LEGACY_KERAS": "0"}, Status.OK),
    ],
)
def test_keras_must_stand_on_what_can_train(installed, tmp_path, environ, status):
    installed(keras="3.15.0", jax="0.10.2")
    assert software.check_keras({"KERAS_HOME": str(tmp_path), **environ}).status is status


def test_the_backend_is_read_from_the_settings_file_of_keras(installed, tmp_path):
    installed(keras="3.15.0")
    (tmp_path / "keras.json").write_text('{"backend": "torch"}')
    result = software.check_keras({"KERAS_HOME": str(tmp_path)})
    assert result.status is Status.FAIL
    assert "keras.json" in result.found


def test_keras_2_is_refused(installed):
    installed(keras="2.15.0")
    assert software.check_keras({}).status is Status.FAIL


@pytest.mark.parametrize(
    ("packages", "status"), [({}, Status.FAIL), ({"mpi4py": "3.1.6"}, Status.FAIL), ({"mpi4py": "4.1.2"}, Status.WARN)]
)
def test_mpi_without_its_packages(installed, packages, status):
    installed(**packages)
    result = software.check_mpi()
    assert result.status is status
    assert "pip install" in result.advice


def test_a_version_is_found_without_package_metadata(tmp_path, monkeypatch):
    # As on a cluster, where spark-submit puts SPARK_HOME/python on the path.
    (tmp_path / "sparkling").mkdir()
    (tmp_path / "sparkling" / "__init__.py").write_text("raise ImportError('must not be imported')")
    (tmp_path / "sparkling" / "version.py").write_text('__version__: str = "3.5.1"\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    assert software.version_of("sparkling") == "3.5.1"
    assert software.version_of("no_such_package_anywhere") is None


# The Python of Spark's workers


def test_workers_with_this_python_are_fine():
    assert software.check_workers({"PYSPARK_PYTHON": sys.executable}).status is Status.OK


def test_workers_in_another_environment_are_a_warning(program):
    version = "{}.{}".format(*sys.version_info[:2])
    assert software.check_workers(program("python3", f"echo {version} /elsewhere")).status is Status.WARN


@pytest.mark.parametrize("body", ["echo 2.7 /usr", "exit 1"])
def test_workers_with_another_python_are_refused(program, body):
    result = software.check_workers(program("python3", body))
    assert result.status is Status.FAIL
    assert f"PYSPARK_PYTHON={sys.executable}" in result.advice


def test_workers_without_python_are_refused():
    assert "is not there" in software.check_workers({"PYSPARK_PYTHON": "/nowhere/python", "PATH": os.defpath}).found


# The machine


def test_a_host_name_that_resolves_to_nothing_is_a_warning():
    result = machine.check_network({"SPARK_LOCAL_IP": "no-such-host.invalid"})
    assert result.status is Status.WARN
    assert "/etc/hosts" in result.advice


def test_a_loopback_address_is_a_warning():
    assert "no other host can reach" in machine.check_network({"SPARK_LOCAL_IP": "127.0.0.1"}).found


def test_an_address_of_another_machine_is_a_warning():
    # 203.0.113.0/24 is set aside for documentation (RFC 5737).
    assert "no network interface" in machine.check_network({"SPARK_LOCAL_IP": "203.0.113.9"}).found


def test_missing_shared_memory_is_refused(tmp_path):
    assert machine.check_shared_memory(str(tmp_path / "nowhere")).status is Status.FAIL


def test_little_shared_memory_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: Usage(64 * 2**20))
    result = machine.check_shared_memory(str(tmp_path))
    assert result.status is Status.WARN
    assert "--shm-size" in result.advice


def test_a_segment_that_no_process_has_mapped_is_left_over(tmp_path):
    for name in ("mpich_shm_used", "mpich_shm_left", "another_program"):
        (tmp_path / name).write_bytes(b"\0" * mmap.PAGESIZE)
    with (tmp_path / "mpich_shm_used").open("r+b") as file, mmap.mmap(file.fileno(), 0):
        assert machine.leftovers(str(tmp_path)) == [str(tmp_path / "mpich_shm_left")]
        result = machine.check_shared_memory(str(tmp_path))
    assert result.status is Status.WARN
    assert "1 segments" in result.found


@pytest.mark.parametrize(("free", "status"), [(2**29, Status.FAIL), (2**31, Status.WARN), (2**35, Status.OK)])
def test_disk_space(tmp_path, monkeypatch, free, status):
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: Usage(free))
    result = machine.check_disk({"SPARK_LOCAL_DIRS": f"{tmp_path},/other"})
    assert result.status is status
    assert str(tmp_path) in result.found


def test_one_core_is_a_warning():
    assert machine.check_cores(1).status is Status.WARN
    assert machine.check_cores(4).status is Status.OK


def test_gpus_are_of_use_where_tensorflow_and_spark_know_of_them(tmp_path, monkeypatch):
    dev, driver = tmp_path / "dev", tmp_path / "driver"
    for folder in (dev, driver):
        folder.mkdir()
    check = partial(machine.check_gpus, devices=dev, driver=driver)
    assert check({}) == ok("none: ranks train on processors")
    (driver / "version").touch()
    assert "no GPU in /dev" in check({}).found
    for number in range(2):
        (dev / f"nvidia{number}").touch()
    assert check({"CUDA_VISIBLE_DEVICES": ""}) == ok("2, hidden by CUDA_VISIBLE_DEVICES='': ranks train on processors")
    monkeypatch.setattr(gpus, "why_tensorflow_has_none", lambda environ: "TensorFlow is a build without CUDA")
    assert check({}).found == "2, but TensorFlow is a build without CUDA: ranks train on processors"
    assert "tensorflow[and-cuda]" in check({}).advice
    assert "defaults of Spark" in check({"KERAS_BACKEND": "torch", "SPARK_CONF_DIR": str(tmp_path)}).found
    monkeypatch.setattr(gpus, "why_tensorflow_has_none", lambda environ: None)
    told = check({"CUDA_VISIBLE_DEVICES": "1", "SPARK_CONF_DIR": str(tmp_path)})
    assert (told.status, told.found) == (Status.WARN, "1, of which the defaults of Spark here say nothing")
    (tmp_path / "spark-defaults.conf").write_text("spark.task.resource.gpu.amount 1\n")
    assert check({"SPARK_CONF_DIR": str(tmp_path)}) == ok("2, which Spark assigns to tasks")


# Two ranks


@pytest.mark.parametrize("check", [two_ranks.check_shared_memory_allreduce, two_ranks.check_tcp_allreduce])
def test_two_ranks_reduce_together(check):
    result = check()
    assert result.status is Status.OK, result
    assert "2 ranks" in result.found


def test_ranks_that_are_late_are_killed_and_leave_nothing():
    before = set(glob.glob("/dev/shm/mpich_*"))
    with pytest.raises(CollectiveTimeoutError, match="0 of 2 ranks"):
        two_ranks.allreduce_of_two((0, 0), None, timeout_s=0.05)
    assert not two_ranks_processes()
    assert set(glob.glob("/dev/shm/mpich_*")) <= before


def test_the_last_words_of_a_rank_that_failed_are_told(program, tmp_path, monkeypatch):
    program("python", "echo cannot open libmpi.so.12; exit 3")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    result = two_ranks.check_shared_memory_allreduce()
    assert result.status is Status.FAIL
    assert "exit code 3" in result.advice
    assert "cannot open libmpi.so.12" in result.advice
    assert not two_ranks_processes()


def two_ranks_processes():
    """The command lines of our child processes that are ranks of the doctor."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    lines = [Path(f"/proc/{child}/cmdline").read_bytes().decode() for child in children]
    return [line for line in lines if "two_ranks" in line]


# The command


def test_the_report_has_one_line_a_check_and_then_the_advice():
    results = {"java": fail("not found", "Install it."), "spark": ok("4.3.0"), "cores": warn("1", "Get more.")}
    assert doctor.report(results).splitlines() == [
        "fail  java   not found",
        "ok    spark  4.3.0",
        "warn  cores  1",
        "",
        "java: Install it.",
        "",
        "cores: Get more.",
    ]


@pytest.mark.parametrize(("result", "code"), [(ok("x"), 0), (warn("x", "y"), 0), (fail("x", "y"), 1)])
def test_only_a_failed_check_makes_the_exit_code_1(monkeypatch, capsys, result, code):
    monkeypatch.setattr(doctor, "CHECKS", {"it": lambda: result})
    assert main(["doctor"]) == code
    assert capsys.readouterr().out.startswith(f"{result.status.value:<4}  it  x")


def test_a_check_that_raises_has_failed_and_the_others_still_run(monkeypatch):
    monkeypatch.setattr(doctor, "CHECKS", {"broken": lambda: 1 / 0, "fine": lambda: ok("yes")})
    results = doctor.run(doctor.CHECKS)
    assert results["broken"].status is Status.FAIL
    assert "ZeroDivisionError" in results["broken"].found
    assert results["fine"] == ok("yes")


def test_an_unknown_check_is_refused_with_the_names_there_are(capsys):
    with pytest.raises(SystemExit):
        main(["doctor", "--only", "jva"])
    assert "no check is called 'jva'; there are python, java" in capsys.readouterr().err


def test_python_and_java_are_checked_before_anything_is_installed():
    # -S leaves out all installed packages: what `make` has on a new machine.
    command = [sys.executable, "-S", "-m", "allreduce_spark.cli.main", "doctor", "--only", "python,java"]
    answer = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)
    assert answer.stdout.startswith("ok    python  "), answer.stderr


def test_a_python_too_old_for_the_library_can_still_be_told_so():
    ask = (
        "import sys, allreduce_spark.cli.main; print(*(m.__file__ for n, m in sys.modules.items() if 'allreduce' in n))"
    )
    answer = subprocess.run([sys.executable, "-c", ask], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    files = answer.stdout.split()
    assert len(files) >= 6
    for file in files:
        ast.parse(Path(file).read_text(), feature_version=(3, 8))


def test_the_command_is_installed():
    scripts = metadata.entry_points(group="console_scripts", name="allreduce-spark")
    assert [script.value for script in scripts] == ["allreduce_spark.cli.main:main"]
