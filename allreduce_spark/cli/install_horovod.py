"""`allreduce-spark install-horovod`: build Horovod against the installed TensorFlow, keep the wheel, install it, and try it.

Horovod has not been released since 2023. The TensorFlow of today has moved some headers that it includes, keeps others where no
compiler looks, or leaves them out: the compiler is given what it misses (`_headers`). In Horovod itself one line is changed, so
that Gloo keeps to the network interface that it is told (`_source`). Seen to build with 2.18.1, 2.19.1 and 2.21.0; the headers
of 2.20.0 were compiled alone. With NCCL it was seen to build for 2.21.0, by CUDA 13; no GPU has run it yet.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from allreduce_spark.cli.software import numbers, version_of
from allreduce_spark.cli.two_ranks import allreduce_of_two
from allreduce_spark.errors import AllReduceSparkError, MissingDependencyError

__all__ = ["Recipe", "install_horovod", "make_recipe", "wheel_folder"]

VERSION = "0.28.1"
SOURCE_SHA256 = "92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0"
TENSORFLOWS = ((2, 18), (2, 22))  # from, and below
# Gloo's connections within a process set, that of all ranks among them, forget HOROVOD_GLOO_IFACE and use the address that the
# host's own name has: on Debian 127.0.1.1, which no other host reaches.
FAULTY_FILE, FAULTY_FUNCTION = "horovod/common/gloo/gloo_context.cc", "void GlooContext::InitializeForProcessSet("
FAULT, REMEDY = "iface = gloo_iface_;", "iface = global_context.gloo_iface_;"
FLAGS = ("CXXFLAGS", "CPLUS_INCLUDE_PATH", "LDFLAGS")
BUILD_TOOLS = ("setuptools<81", "wheel", "packaging")
NEEDED_BY_HOROVOD = ("cloudpickle", "packaging", "psutil", "pyyaml")
ANSWER_S = 30.0
TRY_S = 180.0
SHOWN_LINES = 25

# Where TensorFlow's headers are, relative to its `include`.
BUILDER_HEADER = "tensorflow/compiler/xla/client/xla_builder.h"  # until 2.18, and where Horovod looks for it
BUILDER_PLACE = "xla/hlo/builder/xla_builder.h"  # since 2.19
# With CUDA, Horovod also asks for a name and a function that 2.21 no longer has. Only one of its files includes this header.
BUILDER_TEXT = f"""#include "{BUILDER_PLACE}"
#if HAVE_CUDA
#include <cuda_runtime.h>
#include "absl/status/statusor.h"
#include "xla/stream_executor/stream.h"
namespace xla {{
using absl::StatusOr;
}}
namespace stream_executor::gpu {{
cudaStream_t AsGpuStreamValue(Stream* stream) {{
  return static_cast<cudaStream_t>(stream->platform_specific_handle().stream);
}}
}}  // namespace stream_executor::gpu
#endif
"""
VENDORED = ("external/highwayhash", "external/farmhash_archive/src")
# 2.19 includes two headers of LLVM that it does not bring, to declare a class that Horovod does not use: any list will do.
LLVM_USER = "xla/stream_executor/gpu/tma_metadata.h"
LLVM_HEADER = """#pragma once
#include <vector>
namespace llvm {{ template <typename T> using {name} = std::vector<T>; }}
"""


@dataclass(frozen=True)
class Recipe:
    """All that decides what a built wheel is: the same recipe makes the same wheel.

    Attributes:
        tensorflow: Its version and the package that it is from.
        python, machine: The tag of the interpreter; the processor and the C library.
        compiler: First line of what it says of its version.
        mpi: Version of the package mpich; None for a Horovod without MPI.
        cuda, nccl: Version of nvcc, and of NCCL by its header; None without GPU operations.
        settings: Variables of the user's environment that the build reads, as NAME=VALUE.
    """

    tensorflow: str
    python: str
    machine: str
    compiler: str
    mpi: str | None = None
    cuda: str | None = None
    nccl: str | None = None
    settings: tuple[str, ...] = ()


def install_horovod(*, with_nccl: bool) -> int:
    """Build Horovod unless its wheel is there, install it into this environment, and try it; returns the exit code.

    Raises:
        MissingDependencyError: Something that the build needs is missing; nothing has been built.
        AllReduceSparkError: The build, or the trial, failed.
    """
    recipe = make_recipe(with_nccl=with_nccl)
    folder = wheel_folder(recipe)
    wheel = next(iter(folder.glob("horovod-*.whl")), None)
    if wheel is None:
        parts = ["Gloo", *(["MPI"] if recipe.mpi else []), *(["NCCL"] if recipe.nccl else [])]
        print(
            f"Building Horovod {VERSION} with {', '.join(parts)} for {recipe.tensorflow}; this takes minutes.",
            flush=True,
        )
        if not recipe.mpi:
            print("It will have no MPI: the package mpich is not installed in this environment (pip install mpich).")
        wheel = _build(recipe, folder)
    print(f"Installing {wheel}", flush=True)
    _pip("install", *NEEDED_BY_HOROVOD)
    _pip("install", "--no-deps", "--force-reinstall", str(wheel))
    for backend in ("horovod", *(["horovod-mpi"] if recipe.mpi else [])):
        milliseconds = allreduce_of_two((0, 0), "lo", TRY_S, backend)
        print(f"backend={backend!r}: 1 MiB of 2 ranks on this machine in {milliseconds:.1f} ms", flush=True)
    if recipe.nccl:
        print("NCCL is built in, but has not been tried here: that takes two GPUs.")
    return 0


def make_recipe(*, with_nccl: bool, environ: Mapping[str, str] = os.environ) -> Recipe:
    """Look at all that the build needs.

    Raises:
        MissingDependencyError: Something is missing; the message says how to get it.
    """
    tensorflow = version_of("tensorflow")
    if tensorflow is None or not TENSORFLOWS[0] <= numbers(tensorflow) < TENSORFLOWS[1]:
        raise MissingDependencyError(
            f"Horovod {VERSION} can be built for TensorFlow 2.18 to 2.21; here it is {tensorflow or 'not installed'}."
        )
    package = _tensorflow_package()
    compiler = environ.get("CXX", "g++")
    for program, how in ((compiler, "g++"), ("cmake", "cmake"), ("make", "make")):
        if shutil.which(program, path=environ.get("PATH")) is None:
            raise MissingDependencyError(
                f"the build of Horovod needs {program!r}, which is not there: apt-get install {how}"
            )
    cmake = re.search(r"\d+(\.\d+)+", _first_line("cmake", "--version"))
    if cmake is None or numbers(cmake.group()) < (3, 13):
        raise MissingDependencyError(
            f"the build of Horovod needs cmake 3.13 or newer, here it is {cmake and cmake.group()}."
        )
    _headers()
    cuda, nccl = _find_nccl(package, environ) if with_nccl else (None, None)
    libc = "-".join(platform.libc_ver())
    return Recipe(
        f"{package} {tensorflow}",
        sys.implementation.cache_tag,
        f"{platform.machine()} {libc}",
        _first_line(compiler, "--version"),
        version_of("mpich") if Path(sys.prefix, "bin", "mpicxx").exists() else None,
        cuda,
        nccl,
        tuple(
            sorted(f"{name}={value}" for name, value in environ.items() if name.startswith("HOROVOD_") or name in FLAGS)
        ),
    )


def wheel_folder(recipe: Recipe, environ: Mapping[str, str] = os.environ) -> Path:
    """Where the wheel of a recipe is kept: a folder of its own, beside a file that tells the recipe."""
    cache = environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    digest = hashlib.sha256(repr((VERSION, REMEDY, BUILDER_TEXT, LLVM_HEADER, recipe)).encode()).hexdigest()[:12]
    return Path(cache, "allreduce_spark", "wheels", f"horovod-{recipe.tensorflow.replace(' ', '-')}-{digest}")


def _build(recipe: Recipe, folder: Path) -> Path:
    """Build the wheel in a private folder, and move it to its place when it is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "build.log"
    with tempfile.TemporaryDirectory(prefix="allreduce_spark-horovod-") as name:
        work = Path(name)
        tools = work / "tools"
        _pip("install", "--target", str(tools), *BUILD_TOOLS)
        environment = {**os.environ, **_build_environment(recipe, work), "PYTHONPATH": str(tools)}
        # Without pip's cache: it would give back a wheel that was built for another TensorFlow.
        options = ["--no-cache-dir", "--no-build-isolation", "--no-deps", "--wheel-dir", name]
        command = [sys.executable, "-m", "pip", "wheel", "-v", *options, str(_source(work, environment))]
        with log.open("wb") as output:
            code = subprocess.run(
                command, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False
            ).returncode
        if code:
            lines = log.read_text(errors="replace").splitlines()
            told = [line for line in lines if re.search(r"\berror\b|CMake Error", line, re.I)][:SHOWN_LINES]
            raise AllReduceSparkError(
                f"Horovod could not be built: pip ended with exit code {code}. What the log says of errors:\n"
                + "\n".join(told or ["(nothing: was the build killed?)"])
                + f"\nAll of it: {log}"
            )
        built = next(work.glob("horovod-*.whl"))
        (folder / "recipe.txt").write_text("".join(f"{name}: {value}\n" for name, value in asdict(recipe).items()))
        part = folder / f"{built.name}.part{os.getpid()}"
        shutil.copyfile(built, part)
        return part.rename(folder / built.name)


def _source(work: Path, environment: Mapping[str, str]) -> Path:
    """Fetch Horovod's source, check that it is the one that was released, and mend it; return its folder."""
    requirements, fetched = work / "requirements.txt", work / "fetched"
    requirements.write_text(f"horovod=={VERSION} --hash=sha256:{SOURCE_SHA256}\n")
    options = [
        "--no-build-isolation",
        "--no-deps",
        "--require-hashes",
        "--no-binary",
        "horovod",
        "--dest",
        str(fetched),
    ]
    _pip("download", *options, "-r", str(requirements), environment=environment)
    shutil.unpack_archive(next(fetched.glob("horovod-*.tar.gz")), work / "source")
    folder = next((work / "source").iterdir())
    _mend(folder / FAULTY_FILE)
    return folder


def _mend(file: Path) -> None:
    before, name, after = file.read_text().partition(FAULTY_FUNCTION)
    if FAULT not in after:
        raise AllReduceSparkError(f"{FAULTY_FILE} of Horovod {VERSION} is not as expected: there is no {FAULT!r}.")
    file.write_text(before + name + after.replace(FAULT, REMEDY, 1))


def _build_environment(recipe: Recipe, work: Path) -> dict[str, str]:
    """What Horovod's build reads."""
    folders, headers = _headers()
    for name, content in headers.items():
        header = work / "include" / name
        header.parent.mkdir(parents=True, exist_ok=True)
        header.write_text(content)
    given = os.environ.get("CPLUS_INCLUDE_PATH")
    places = [str(work / "include"), *map(str, folders), *([given] if given else [])]
    programs = [str(Path(sys.prefix, "bin")), os.environ.get("PATH", os.defpath)]  # of mpich, mpicxx
    variables = {
        "HOROVOD_WITH_TENSORFLOW": "1",
        "HOROVOD_WITHOUT_PYTORCH": "1",
        "HOROVOD_WITHOUT_MXNET": "1",
        "HOROVOD_WITH_GLOO": "1",
        "HOROVOD_WITH_MPI" if recipe.mpi else "HOROVOD_WITHOUT_MPI": "1",
        "CPLUS_INCLUDE_PATH": os.pathsep.join(places),
        "PATH": os.pathsep.join(programs),
        "MAKEFLAGS": os.environ.get("MAKEFLAGS") or f"-j{len(os.sched_getaffinity(0))}",
        "CMAKE_POLICY_VERSION_MINIMUM": "3.5",  # what the Gloo in Horovod asks for is more than CMake 4 gives unasked
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    if recipe.mpi:
        variables["MPI_HOME"] = sys.prefix
    if recipe.nccl:
        variables["HOROVOD_GPU_OPERATIONS"] = "NCCL"
    return variables


def _headers() -> tuple[list[Path], dict[str, str]]:
    """Folders that the compiler has to look into as well, and headers to write for it: by their place, their content.

    Raises:
        MissingDependencyError: TensorFlow's headers are not there.
    """
    include = Path(str(metadata.distribution(_tensorflow_package()).locate_file("tensorflow/include")))
    headers = {}
    if not (include / BUILDER_HEADER).exists():
        if not (include / BUILDER_PLACE).exists():
            raise MissingDependencyError(
                f"the build of Horovod needs TensorFlow's headers, and {include} has no {BUILDER_PLACE}: install TensorFlow "
                "again."
            )
        headers[BUILDER_HEADER] = BUILDER_TEXT
    user = include / LLVM_USER
    if user.exists():
        for name in re.findall(r'#include "llvm/ADT/(\w+)\.h"', user.read_text()):
            headers[f"llvm/ADT/{name}.h"] = LLVM_HEADER.format(name=name)
    return [include / folder for folder in VENDORED if (include / folder).is_dir()], headers


def _tensorflow_package() -> str:
    return next(iter(sorted(set(metadata.packages_distributions().get("tensorflow", [])))), "tensorflow")


def _find_nccl(package: str, environ: Mapping[str, str]) -> tuple[str, str]:
    """Versions of nvcc and of NCCL."""
    if package.endswith("cpu"):
        raise MissingDependencyError(
            f"NCCL is for GPUs, and {package} has none: pip install 'allreduce-spark[tensorflow]'"
        )
    home = environ.get("HOROVOD_CUDA_HOME") or "/usr/local/cuda"
    nvcc = shutil.which("nvcc", path=os.pathsep.join([f"{home}/bin", environ.get("PATH", os.defpath)]))
    if nvcc is None:
        raise MissingDependencyError(
            "Horovod with NCCL needs the compiler of CUDA, and there is no nvcc on the PATH or in /usr/local/cuda: install the "
            "CUDA toolkit of TensorFlow's version, or set HOROVOD_CUDA_HOME to its folder."
        )
    places = [
        environ.get("HOROVOD_NCCL_INCLUDE"),
        *(f"{root}/include" for root in (environ.get("HOROVOD_NCCL_HOME"), home) if root),
    ]
    header = next(
        (path for place in [*places, "/usr/include"] if place and (path := Path(place, "nccl.h")).is_file()), None
    )
    if header is None:
        raise MissingDependencyError(
            "Horovod with NCCL needs NCCL's header nccl.h: apt-get install libnccl-dev (of NVIDIA's repository), or set "
            "HOROVOD_NCCL_HOME to the folder that NCCL is in."
        )
    code = re.search(r"#define\s+NCCL_VERSION_CODE\s+(\d+)", header.read_text())
    answer = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=ANSWER_S, check=False).stdout
    release = re.search(r"release (\S+?),", answer)
    return release.group(1) if release else nvcc, code.group(1) if code else str(header)


def _first_line(program: str, option: str) -> str:
    answer = subprocess.run([program, option], capture_output=True, text=True, timeout=ANSWER_S, check=False).stdout
    return answer.strip().partition("\n")[0]


def _pip(*arguments: str, environment: Mapping[str, str] | None = None) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", check=False)
    if ended.returncode:
        raise AllReduceSparkError(f"'pip {' '.join(arguments)}' failed:\n{ended.stderr.strip()[-2000:]}")
