"""Which GPU a rank uses: the one that Spark gave to its task; where Spark knows of none, the one of its local rank."""

from __future__ import annotations

import contextlib
import ctypes.util
import importlib.util
import itertools
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

__all__ = ["choose_gpus", "gpu_environment", "machine_gpus", "names_of", "seen_by_cuda", "why_tensorflow_has_none"]

log = logging.getLogger(__name__)

ANSWER_S = 15.0  # a driver that nobody else uses at the moment takes seconds to begin


def choose_gpus(
    assigned: Sequence[str] | None, local_rank: int, environ: Mapping[str, str] = os.environ
) -> tuple[str, ...] | None:
    """The GPUs that one process is to see, by the addresses that CUDA_VISIBLE_DEVICES takes.

    Args:
        assigned: What Spark gave to the task; None where the task asked for no GPU.
        local_rank: Index among the processes of this machine that choose.
        environ: The environment that the process would inherit; its KERAS_BACKEND names what is to use the GPU.

    Returns:
        None where nothing is known of a GPU here that could be used: the environment then stays as it is.
    """
    if assigned is not None:
        return tuple(assigned)
    found = machine_gpus(environ)
    on_tensorflow = environ.get("KERAS_BACKEND", "tensorflow") == "tensorflow"
    if not found or (on_tensorflow and why_tensorflow_has_none(environ) is not None):
        return None
    return (found[local_rank % len(found)],)


def machine_gpus(environ: Mapping[str, str] = os.environ, devices: Path = Path("/dev")) -> tuple[str, ...]:
    """Addresses of the NVIDIA GPUs that a process of this environment sees. CUDA is not asked: that would start it here.

    A container, or a control group, may name devices in /dev that nobody in it can open; CUDA does not count those. As in
    CUDA, what follows the first unknown entry of CUDA_VISIBLE_DEVICES does not count, so "-1" and "" hide all.
    """
    count = sum(_can_be_opened(path) for path in devices.glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name))
    listed = environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None or not count:
        return tuple(map(str, range(count)))
    entries = (entry.strip() for entry in listed.split(","))
    return tuple(itertools.takewhile(lambda entry: _names_a_gpu(entry, count), entries))


def _can_be_opened(device: Path) -> bool:
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def _names_a_gpu(entry: str, count: int) -> bool:
    return entry.startswith(("GPU-", "MIG-")) or (re.fullmatch(r"\d+", entry) is not None and int(entry) < count)


def names_of(gpus: Sequence[str]) -> tuple[str, ...]:
    """Names that two processes of one host have in common exactly for one GPU, as far as NVIDIA's own tool tells them.

    An address will not do: where a cluster manager shows each executor its own GPUs alone, the first is 0 in all of them.
    """
    tool = shutil.which("nvidia-smi")
    if tool is None or not all(gpu.isdigit() for gpu in gpus):
        return tuple(gpus)
    command = [tool, "--query-gpu=uuid", "--format=csv,noheader", f"--id={','.join(gpus)}"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_S, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("%s does not tell the names of GPUs %s: %s", tool, ", ".join(gpus), error)
        return tuple(gpus)
    return tuple(told) if len(told) == len(gpus) else tuple(gpus)


def why_tensorflow_has_none(environ: Mapping[str, str] = os.environ) -> str | None:
    """Why the installed TensorFlow runs on processors alone, as far as its files tell; None where it should use GPUs."""
    spec = importlib.util.find_spec("tensorflow")
    folder = next(iter(spec.submodule_search_locations or []), None) if spec else None
    if folder is None:
        return "TensorFlow is not installed"
    about = Path(folder, "python", "platform", "build_info.py")
    # ('is_cuda_build', False): a file that TensorFlow's build writes
    if about.exists() and re.search(r"is_cuda_build\W+False", about.read_text()):
        return "the installed TensorFlow is a build without CUDA"
    packages = importlib.util.find_spec("nvidia")
    folders = [Path(sys.prefix, "lib")]  # where conda has them
    folders += [Path(part) for part in environ.get("LD_LIBRARY_PATH", "").split(os.pathsep) if part]
    folders += [
        path for place in (packages and packages.submodule_search_locations) or [] for path in Path(place).glob("*/lib")
    ]
    if ctypes.util.find_library("cudart") or any(next(path.glob("libcudart.so*"), None) for path in folders):
        return None
    return "TensorFlow does not find the libraries of CUDA"


def gpu_environment(gpus: Sequence[str], environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What lets a process see these GPUs, and no others."""
    # Cluster managers number GPUs as nvidia-smi does, by their place on the bus; CUDA alone would put the fastest first.
    return {"CUDA_DEVICE_ORDER": environ.get("CUDA_DEVICE_ORDER", "PCI_BUS_ID"), "CUDA_VISIBLE_DEVICES": ",".join(gpus)}


@contextlib.contextmanager
def seen_by_cuda(gpus: Sequence[str] | None) -> Iterator[None]:
    """Let CUDA see these GPUs alone if it is started within; None changes nothing.

    It reads the environment once. Left as it is then, that would mislead what this process does later for somebody else.
    """
    before = dict(os.environ)
    os.environ.update(gpu_environment(gpus) if gpus is not None else {})
    try:
        yield
    finally:
        for name in ("CUDA_DEVICE_ORDER", "CUDA_VISIBLE_DEVICES"):
            if name in before:
                os.environ[name] = before[name]
            else:
                os.environ.pop(name, None)
