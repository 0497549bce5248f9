"""`install-horovod`: what is missing is said before anything is built, and what was built is taken again."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import fields, replace
from pathlib import Path

import pytest

from allreduce_spark.cli import install_horovod, software
from allreduce_spark.cli.install_horovod import Recipe, make_recipe, wheel_folder
from allreduce_spark.cli.main import main
from allreduce_spark.cli.result import Status
from allreduce_spark.communicator import horovod_environment
from allreduce_spark.communicator.horovod_environment import Installation, check_installed, rank_environment
from allreduce_spark.errors import AllReduceSparkError, MissingDependencyError
from allreduce_spark.world import World

RECIPE = Recipe("tensorflow 2.21.0", "cpython-311", "x86_64 glibc-2.36", "g++ 12.2.0", mpi="5.0.2")


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Returns only(*names): the PATH holds these programs alone, and those that the shell needs."""

    def only(*names):
        folder = tmp_path / "bin"
        folder.mkdir()
        for name in names:
            found = shutil.which(name)
            if found is None:
                pytest.skip(f"{name} is not there")
            (folder / name).symlink_to(found)
        monkeypatch.setenv("PATH", str(folder))
        return dict(os.environ, PATH=str(folder))

    return only


@pytest.mark.parametrize(
    ("there", "missing"), [((), "g++"), (("g++",), "cmake"), (("g++", "cmake"), "make")], ids=lambda each: str(each)
)
def test_a_missing_program_is_named_with_the_way_to_install_it(programs, there, missing):
    with pytest.raises(MissingDependencyError, match=rf"'{missing.replace('+', '.')}'.*apt-get install"):
        make_recipe(with_nccl=False, environ=programs(*there))


@pytest.mark.parametrize("version", [None, "2.17.1", "2.22.0"])
def test_a_tensorflow_that_horovod_cannot_be_built_for_is_refused(monkeypatch, version):
    monkeypatch.setattr(install_horovod, "version_of", lambda module: version)
    with pytest.raises(MissingDependencyError, match=r"TensorFlow 2\.18 to 2\.21"):
        make_recipe(with_nccl=False)


def test_missing_headers_are_said_before_anything_is_built(programs, monkeypatch, tmp_path, capsys):
    environ = programs("g++", "cmake", "make")
    monkeypatch.setattr(install_horovod, "BUILDER_PLACE", "nowhere/xla_builder.h")
    monkeypatch.setattr(install_horovod, "BUILDER_HEADER", "nowhere/else.h")
    with pytest.raises(MissingDependencyError, match="TensorFlow's headers"):
        make_recipe(with_nccl=False, environ=environ)
    assert main(["install-horovod"]) == 1
    assert "TensorFlow's headers" in capsys.readouterr().err


def test_nccl_needs_a_tensorflow_for_gpus_and_then_nvcc_and_then_its_header(tmp_path):
    nowhere = {"PATH": str(tmp_path / "bin"), "HOROVOD_CUDA_HOME": str(tmp_path)}
    with pytest.raises(MissingDependencyError, match=r"allreduce-spark\[tensorflow\]"):
        install_horovod._find_nccl("tensorflow-cpu", nowhere)
    with pytest.raises(MissingDependencyError, match="nvcc"):
        install_horovod._find_nccl("tensorflow", nowhere)
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.5, V12.5.40'\n")
    nvcc.chmod(0o755)
    if Path("/usr/include/nccl.h").exists():
        pytest.skip("NCCL is installed")
    with pytest.raises(MissingDependencyError, match=r"nccl\.h"):
        install_horovod._find_nccl("tensorflow", nowhere)
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "nccl.h").write_text("#define NCCL_MAJOR 2\n#define NCCL_VERSION_CODE 22304\n")
    assert install_horovod._find_nccl("tensorflow", nowhere) == ("12.5", "22304")


def test_a_wheel_is_kept_apart_from_those_of_all_other_recipes(tmp_path):
    environ = {"XDG_CACHE_HOME": str(tmp_path)}
    folders = {wheel_folder(replace(RECIPE, **{field.name: "other"}), environ) for field in fields(Recipe)}
    assert len(folders | {wheel_folder(RECIPE, environ)}) == len(fields(Recipe)) + 1
    assert wheel_folder(replace(RECIPE), environ) == wheel_folder(RECIPE, environ)
    assert all(folder.parent == tmp_path / "allreduce_spark" / "wheels" for folder in folders)


def test_a_wheel_that_is_there_is_installed_without_a_build(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    wheel = wheel_folder(RECIPE) / "horovod-0.28.1-any.whl"
    wheel.parent.mkdir(parents=True)
    wheel.touch()
    installed, tried = [], []
    monkeypatch.setattr(install_horovod, "make_recipe", lambda **options: RECIPE)
    monkeypatch.setattr(install_horovod, "_pip", lambda *arguments: installed.append(arguments))
    monkeypatch.setattr(install_horovod, "allreduce_of_two", lambda *arguments: tried.append(arguments[-1]) or 1.5)
    assert main(["install-horovod"]) == 0
    assert installed[-1] == ("install", "--no-deps", "--force-reinstall", str(wheel))
    assert tried == ["horovod", "horovod-mpi"]
    assert "in 1.5 ms" in capsys.readouterr().out


class Tensorflow:
    """An installed TensorFlow of which there are headers alone."""

    def __init__(self, folder, **headers):
        self.folder = folder
        for name, content in headers.items():
            path = folder / "tensorflow/include" / getattr(install_horovod, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        (folder / "tensorflow/include" / install_horovod.VENDORED[0]).mkdir(parents=True)

    def locate_file(self, path):
        return self.folder / path


def test_the_compiler_finds_the_headers_of_a_tensorflow_that_has_moved_or_left_them_out(monkeypatch, tmp_path):
    needs_llvm = '#include "llvm/ADT/ArrayRef.h"\n#include "absl/status.h"\n'
    tensorflow = Tensorflow(tmp_path, BUILDER_PLACE="class XlaBuilder;", LLVM_USER=needs_llvm)
    monkeypatch.setattr(install_horovod.metadata, "distribution", lambda package: tensorflow)
    monkeypatch.setenv("CPLUS_INCLUDE_PATH", "/mine")
    environment = install_horovod._build_environment(RECIPE, tmp_path / "work")
    ours = tmp_path / "work" / "include"
    vendored = tmp_path / "tensorflow/include/external/highwayhash"
    assert environment["CPLUS_INCLUDE_PATH"].split(":") == [str(ours), str(vendored), "/mine"]
    assert {str(path.relative_to(ours)): path.read_text().count("#include") for path in ours.rglob("*.h")} == {
        "llvm/ADT/ArrayRef.h": 1,
        "tensorflow/compiler/xla/client/xla_builder.h": 4,
    }
    assert environment["HOROVOD_WITH_MPI"] == "1"
    assert "HOROVOD_GPU_OPERATIONS" not in environment


# What Horovod asks of TensorFlow where it is built with CUDA, and of TensorFlow and CUDA as much as that needs.
HOROVOD_WITH_CUDA = """
#include "tensorflow/compiler/xla/client/xla_builder.h"
xla::StatusOr<int> status;
namespace stream_executor { namespace gpu { cudaStream_t AsGpuStreamValue(Stream* stream); } }
cudaStream_t stream(stream_executor::Stream* of) { return stream_executor::gpu::AsGpuStreamValue(of); }
"""
STREAM = """
namespace stream_executor {
struct Handle { void* stream; };
struct Stream { Handle platform_specific_handle() const; };
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_a_build_with_cuda_is_given_what_tensorflow_no_longer_has(tmp_path):
    for name, content in {
        install_horovod.BUILDER_HEADER: install_horovod.BUILDER_TEXT,
        install_horovod.BUILDER_PLACE: "namespace xla {}",
        "absl/status/statusor.h": "namespace absl { template <typename T> class StatusOr {}; }",
        "cuda_runtime.h": "typedef struct CUstream_st* cudaStream_t;",
        "xla/stream_executor/stream.h": STREAM,
        "horovod.cc": HOROVOD_WITH_CUDA,
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    command = ["g++", "-std=c++17", "-Wall", "-Werror", "-DHAVE_CUDA=1", f"-I{tmp_path}", "-c", "horovod.cc"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=60)


def test_nothing_is_added_to_a_tensorflow_that_has_its_headers_where_horovod_looks(monkeypatch, tmp_path):
    tensorflow = Tensorflow(tmp_path, BUILDER_HEADER="class XlaBuilder;")
    monkeypatch.setattr(install_horovod.metadata, "distribution", lambda package: tensorflow)
    assert install_horovod._headers() == ([tmp_path / "tensorflow/include/external/highwayhash"], {})


def test_without_mpich_it_is_built_with_gloo_alone(tmp_path):
    environment = install_horovod._build_environment(replace(RECIPE, mpi=None), tmp_path)
    assert environment["HOROVOD_WITHOUT_MPI"] == "1"
    assert "HOROVOD_WITH_MPI" not in environment


def test_only_the_line_that_forgets_the_interface_is_mended_and_a_source_without_it_is_refused(tmp_path):
    file, function = tmp_path / "gloo_context.cc", install_horovod.FAULTY_FUNCTION
    right = "void GlooContext::Initialize() {\n  device_attr.iface = gloo_iface_;\n}\n"
    file.write_text(f"{right}{function}) {{\n  device_attr.iface = gloo_iface_;\n}}\n")
    install_horovod._mend(file)
    assert file.read_text() == f"{right}{function}) {{\n  device_attr.iface = global_context.gloo_iface_;\n}}\n"
    with pytest.raises(AllReduceSparkError, match="not as expected"):
        install_horovod._mend(file)


# What there is to know of a Horovod without loading it.


@pytest.mark.parametrize(
    ("found", "backend", "words"),
    [
        (None, "horovod", "is not installed"),
        (Installation("0.28.1", "2.21.0", frozenset({"gloo"})), "horovod-mpi", "built without mpi"),
        (Installation("0.28.1", "2.21.0", frozenset({"mpi"})), "horovod", "built without gloo"),
        (Installation("0.28.1", "2.18.1", frozenset({"gloo"})), "horovod", r"for TensorFlow 2\.18\.1, while 2\.21\.1"),
    ],
)
def test_a_machine_that_lacks_what_a_backend_needs_is_told_the_command(monkeypatch, found, backend, words):
    monkeypatch.setattr(horovod_environment, "installed", lambda: found)
    monkeypatch.setattr(horovod_environment, "_tensorflow_version", lambda: "2.21.1")
    with pytest.raises(MissingDependencyError, match=f"{words}.*allreduce-spark install-horovod"):
        check_installed(backend)
    check_installed("mpi")
    check_installed("auto")


def test_a_horovod_for_another_patch_of_tensorflow_or_beside_an_unknown_one_is_used(monkeypatch):
    monkeypatch.setattr(horovod_environment, "installed", lambda: Installation("0.28.1", "2.21.0", frozenset({"gloo"})))
    for version in ("2.21.1", None):
        monkeypatch.setattr(horovod_environment, "_tensorflow_version", lambda version=version: version)
        check_installed("horovod")


def test_the_parts_of_a_library_are_seen_without_loading_it(monkeypatch, tmp_path):
    library = tmp_path / "horovod" / "tensorflow" / "mpi_lib.cpython-311-x86_64-linux-gnu.so"
    library.parent.mkdir(parents=True)
    library.write_bytes(b"\x7fELF...HOROVOD_GLOO_RENDEZVOUS_ADDR\0...\0ncclAllReduce\0")
    (tmp_path / "horovod" / "metadata.json").write_text('{"tensorflow": "2.19.0", "dummy": "none"}')
    monkeypatch.setattr(horovod_environment, "_folder", lambda: tmp_path / "horovod")
    monkeypatch.setattr(horovod_environment.metadata, "version", lambda package: "0.28.1")
    assert horovod_environment.installed() == Installation("0.28.1", "2.19.0", frozenset({"gloo", "nccl"}))


def test_the_doctor_needs_no_horovod_but_says_where_it_is_of_another_tensorflow(monkeypatch):
    monkeypatch.setattr(horovod_environment, "installed", lambda: None)
    assert software.check_horovod().status is Status.OK
    monkeypatch.setattr(horovod_environment, "installed", lambda: Installation("0.28.1", "2.18.0", frozenset({"gloo"})))
    monkeypatch.setattr(software, "version_of", lambda module: "2.21.0")
    result = software.check_horovod()
    assert result.status is Status.WARN
    assert "install-horovod" in result.advice


def test_a_rank_is_told_its_place_and_its_deadlines():
    environment = rank_environment(
        World(rank=3, world_size=4, local_rank=1, local_size=2, node_rank=1),
        "gloo",
        gloo_store=("127.0.0.1:4000/word", 4000),
        collective_s=1800.0,
        longest_s=2000.0,
    )
    told = {name.removeprefix("HOROVOD_"): value for name, value in environment.items()}
    assert [told[name] for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")] == ["3", "4", "1", "2"]
    assert (told["GLOO_RENDEZVOUS_ADDR"], told["GLOO_RENDEZVOUS_PORT"]) == ("127.0.0.1:4000/word", "4000")
    look_s, end_s = int(told["STALL_CHECK_TIME_SECONDS"]), int(told["STALL_SHUTDOWN_TIME_SECONDS"])
    assert 0 < look_s < end_s
    assert end_s + 2 * look_s <= 1800
    assert told["GLOO_TIMEOUT_SECONDS"] == "2000"
