"""TensorFlow on a part of a machine: the cores, and the GPUs, that one process may use."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping

import tensorflow as tf

__all__ = ["use_cores", "warn_if_gpus_are_taken"]


def use_cores(threads: int) -> None:
    """Let TensorFlow keep `threads` cores of this process busy, and take memory of GPUs only as it needs it.

    By default it would take nearly all memory of every GPU that it sees, at its first operation. This starts CUDA, which from
    then on knows the GPUs that the environment names now; so it must not happen before a rank is forked.

    Raises:
        RuntimeError: TensorFlow computes already, and has its threads and GPUs.
    """
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    # One to compute and one for reading ahead; in a rank the all-reduce occupies the first while it waits.
    tf.config.threading.set_inter_op_parallelism_threads(max(2, threads))
    for gpu in tf.config.list_physical_devices("GPU"):
        tf.config.experimental.set_memory_growth(gpu, True)


def warn_if_gpus_are_taken(environ: Mapping[str, str] = os.environ) -> None:
    """Warn where this process takes nearly all memory of its GPUs for itself. To be called where ranks use the same ones."""
    if environ.get("TF_FORCE_GPU_ALLOW_GROWTH", "").lower() == "true":
        return
    gpus = tf.config.list_physical_devices("GPU")
    if not all(tf.config.experimental.get_memory_growth(gpu) for gpu in gpus):
        warnings.warn(
            "TensorFlow takes nearly all memory of the GPUs for this process, and its ranks, on the same machine, may find too "
            "little: set TF_FORCE_GPU_ALLOW_GROWTH=true in the environment before TensorFlow is imported.",
            stacklevel=4,
        )
