"""TensorFlow on a part of a machine: the cores, and the GPUs, that one process may use."""

from __future__ import annotations

import contextlib

import tensorflow as tf

__all__ = ["use_cores"]


def use_cores(threads: int) -> None:
    """Let TensorFlow keep `threads` cores of this process busy, and take memory of GPUs only as it needs it.

    Without effect where TensorFlow computes already: in a Python worker that Spark uses again it has its threads.
    """
    with contextlib.suppress(RuntimeError):  # it cannot be changed any more
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        # One to compute and one for reading ahead; in a rank the all-reduce occupies the first while it waits.
        tf.config.threading.set_inter_op_parallelism_threads(max(2, threads))
        for gpu in tf.config.list_physical_devices("GPU"):
            tf.config.experimental.set_memory_growth(gpu, True)
