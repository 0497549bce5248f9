"""Keras's backend on a part of a machine: the cores, and the GPUs, that one process may use."""

from __future__ import annotations

import contextlib
import os

import keras

__all__ = ["use_cores"]


def use_cores(threads: int) -> None:
    """Let the backend keep `threads` cores of this process busy, and take memory of GPUs only as it needs it.

    Without effect where it computes already: in a Python worker that Spark uses again it has its threads.
    """
    {"tensorflow": _use_with_tensorflow, "jax": _use_with_jax, "torch": _use_with_torch}[keras.backend.backend()](
        threads
    )


def _use_with_tensorflow(threads: int) -> None:
    import tensorflow as tf

    with contextlib.suppress(RuntimeError):  # it cannot be changed any more
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        # One to compute and one for reading ahead; in a rank the all-reduce occupies the first while it waits.
        tf.config.threading.set_inter_op_parallelism_threads(max(2, threads))
        for gpu in tf.config.list_physical_devices("GPU"):
            tf.config.experimental.set_memory_growth(gpu, True)


def _use_with_jax(threads: int) -> None:
    import jax

    # JAX looks at these when it computes for the first time.
    os.environ["NPROC"] = str(threads)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    # Steps that were started and still run when the next one comes can block each other where they call numpy code
    # (jax-ml/jax#25861).
    jax.config.update("jax_cpu_enable_async_dispatch", False)


def _use_with_torch(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
