"""The doctor's look at what is installed: Python, Java, Spark, TensorFlow, Keras, MPI, Horovod.

Nothing is imported to learn its version: that would take seconds, and could itself be what is broken.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from allreduce_spark.cli.result import Result, fail, ok, warn

__all__ = [
    "check_horovod",
    "check_java",
    "check_keras",
    "check_mpi",
    "check_python",
    "check_spark",
    "check_tensorflow",
    "check_workers",
    "java_version",
    "numbers",
    "version_of",
]

ANSWER_S = 30.0  # how long another program may take to tell its version

INSTALL_JAVA = (
    "Spark needs Java 17 or newer: 'apt-get install openjdk-17-jre-headless' (Debian, Ubuntu), "
    "'dnf install java-17-openjdk-headless' (Fedora, RHEL), 'conda install -c conda-forge openjdk=17', or "
    "https://adoptium.net. Then 'java -version' should work, or JAVA_HOME should name the folder that holds bin/java."
)
INSTALL_TENSORFLOW = (
    "Use the TensorFlow of your cluster, or: pip install 'allreduce-spark[tensorflow]' "
    "(or [tensorflow-cpu], the smaller build without GPU support)."
)


def check_python(version: tuple[int, ...] = tuple(sys.version_info[:3])) -> Result:
    text = ".".join(map(str, version))
    if version >= (3, 10):
        return ok(text)
    return fail(text, "Python 3.10 or newer is needed; this library is tested with 3.11.")


def check_java(environ: Mapping[str, str] = os.environ) -> Result:
    home = environ.get("JAVA_HOME")
    java = shutil.which(os.path.join(home, "bin", "java") if home else "java", path=environ.get("PATH"))
    if java is None:
        found = f"JAVA_HOME={home} holds no bin/java" if home else "not found: neither JAVA_HOME nor java on the PATH"
        return fail(found, INSTALL_JAVA)
    # To stderr: openjdk version "17.0.15" 2025-04-15
    answer = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=ANSWER_S, check=False).stderr
    version = java_version(answer)
    if version is None:
        return fail(f"{java} does not tell its version: {answer.strip()[:80]!r}", INSTALL_JAVA)
    if version >= 17:
        return ok(f"{version} ({java})")
    spark = version_of("pyspark")
    if spark and numbers(spark) < (4,):
        return warn(f"{version} ({java})", f"Spark {spark} may run on it, but Spark 4 will not. {INSTALL_JAVA}")
    return fail(f"{version} ({java})", INSTALL_JAVA)


def java_version(answer: str) -> int | None:
    """The major version in what `java -version` prints.

    >>> java_version('openjdk version "17.0.15" 2025-04-15'), java_version('java version "1.8.0_362"')
    (17, 8)
    """
    match = re.search(r'version "(?:1\.)?(\d+)', answer)
    return int(match.group(1)) if match else None


def check_spark() -> Result:
    version = version_of("pyspark")
    if version is None:
        return fail("not found", "Use the pyspark of your cluster, or: pip install 'allreduce-spark[spark]'")
    if numbers(version) < (3, 5):
        return fail(version, "Spark 3.5 or newer is needed: it is the first with Arrow batches in a barrier stage.")
    if numbers(version) >= (5,):
        return warn(version, "This library is made for Spark 3.5 to 4.")
    return ok(version)


def check_workers(environ: Mapping[str, str] = os.environ) -> Result:
    """Spark starts its Python workers by name: another `python3` on the PATH is the classic surprise."""
    name = environ.get("PYSPARK_PYTHON", "python3")
    advice = f"Start Spark with PYSPARK_PYTHON={sys.executable}, or activate this environment first."
    python = shutil.which(name, path=environ.get("PATH"))
    if python is None:
        return fail(f"Spark would start its workers with {name!r}, which is not there", advice)
    ask = "import sys; print('%d.%d' % sys.version_info[:2], sys.prefix)"
    asked = subprocess.run([python, "-c", ask], capture_output=True, text=True, timeout=ANSWER_S, check=False)
    version, _, prefix = asked.stdout.strip().partition(" ")
    ours = "{}.{}".format(*sys.version_info[:2])
    if version != ours:
        found = f"{python}, which is Python {version}" if version else f"{python}, which does not run"
        return fail(f"Spark would start its workers with {found}; this is Python {ours}", advice)
    if Path(prefix).resolve() != Path(sys.prefix).resolve():
        return warn(f"Spark would start its workers in another environment: {python}", advice)
    return ok(f"Spark starts its workers with {python}")


def check_tensorflow(environ: Mapping[str, str] = os.environ) -> Result:
    version, (backend, _) = version_of("tensorflow"), keras_backend(environ)
    if version is None and backend in ("jax", "torch"):
        return ok(f"not found, and not needed: Keras runs on {backend}")
    if version is None:
        return fail("not found", INSTALL_TENSORFLOW)
    if numbers(version) < (2, 18):
        return fail(version, f"TensorFlow 2.18 or newer is needed. {INSTALL_TENSORFLOW}")
    packages = sorted(set(metadata.packages_distributions().get("tensorflow", [])))
    if len(packages) > 1:
        return warn(
            f"{version}, from {' and '.join(packages)}", "They overwrite each other's files: uninstall all but one."
        )
    return ok(f"{version} ({packages[0]})" if packages else version)


def check_keras(environ: Mapping[str, str] = os.environ) -> Result:
    version = version_of("keras")
    if version is None:
        return fail("not found", f"Keras comes with TensorFlow. {INSTALL_TENSORFLOW}")
    if numbers(version) < (3, 8):
        return fail(version, "Keras 3.8 or newer is needed: pip install 'keras>=3.8,<4'")
    backend, source = keras_backend(environ)
    if backend not in ("tensorflow", "jax", "torch"):
        advice = "Set KERAS_BACKEND to tensorflow, jax or torch."
        return fail(f"{version} with backend {backend!r} (from {source})", advice)
    if version_of(backend) is None and backend != "tensorflow":
        advice = f"pip install 'allreduce-spark[{backend}]', here and on the executors."
        return fail(f"{version} with backend {backend!r} (from {source}), which is not installed", advice)
    if environ.get("TF_USE_LEGACY_KERAS", "0").lower() not in ("", "0", "false"):
        return warn(
            f"{version}, but TF_USE_LEGACY_KERAS is set", "Unset it: models from tf.keras would be those of Keras 2."
        )
    return ok(f"{version}, backend {backend}")


def keras_backend(environ: Mapping[str, str]) -> tuple[str, str]:
    """Which backend Keras will take, and who says so: the environment, else its settings file, else its default."""
    if environ.get("KERAS_BACKEND"):
        return environ["KERAS_BACKEND"], "KERAS_BACKEND"
    settings = Path(environ.get("KERAS_HOME") or Path.home() / ".keras") / "keras.json"
    try:
        return str(json.loads(settings.read_text())["backend"]), str(settings)
    except (OSError, ValueError, KeyError, TypeError):
        return "tensorflow", "its default"


def check_mpi() -> Result:
    mpi4py, mpich = version_of("mpi4py"), version_of("mpich")
    install = "pip install 'mpi4py>=4.1,<5' 'mpich>=5,<6'"
    if mpi4py is None or numbers(mpi4py) < (4,):
        return fail(f"mpi4py {mpi4py or 'not found'}", install)
    if mpich is None:
        return warn(
            f"mpi4py {mpi4py}, without the package mpich",
            f"{install}: mpi4py would take an MPI library of the system, and a Spark task cannot start every kind.",
        )
    libraries = [file.locate() for file in metadata.files("mpich") or [] if file.name.startswith("libmpi.so")]
    if not any(os.path.exists(str(library)) for library in libraries):
        return fail(f"mpi4py {mpi4py}, but the package mpich {mpich} lacks libmpi.so", f"{install} --force-reinstall")
    return ok(f"mpi4py {mpi4py} on MPICH {mpich}")


def check_horovod() -> Result:
    # Not at the top: an old Python must load this file.
    from allreduce_spark.communicator.horovod_environment import installed

    found, tensorflow = installed(), version_of("tensorflow")
    if found is None:
        return ok("not installed; only backend='horovod' needs it (allreduce-spark install-horovod)")
    text = f"{found.version} for TensorFlow {found.tensorflow}, with {', '.join(sorted(found.parts))}"
    if found.tensorflow != tensorflow:
        return warn(f"{text}, but TensorFlow is {tensorflow}", "Build it again: allreduce-spark install-horovod")
    return ok(text)


def version_of(module: str) -> str | None:
    """The version of an installed package, without importing it; None where there is none.

    A cluster's Spark is often on the PYTHONPATH without any package metadata: then its own version.py is read.
    """
    for package in dict.fromkeys([module, *metadata.packages_distributions().get(module, [])]):
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    spec = importlib.util.find_spec(module)
    if spec is None:
        return None
    for folder in spec.submodule_search_locations or []:
        source = Path(folder, "version.py")
        match = re.search(r"""^__version__.*=\s*["']([^"']+)""", source.read_text(), re.M) if source.exists() else None
        if match:
            return match.group(1)
    return "0 (it does not tell its version)"


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version, to compare with.

    >>> numbers("2.21.0rc1") >= (2, 18)
    True
    """
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, match.group().split("."))) if match else ()
