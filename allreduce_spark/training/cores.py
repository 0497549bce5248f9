"""Keras's backend on a part of a machine: the cores, and the GPUs, that one process may use."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Mapping

import keras

__all__ = ["use_cores", "warn_if_gpus_are_taken"]


def use_cores(threads: int) -> None:
    """Let the backend keep `threads` cores of this process busy, and take memory of GPUs only as it needs it.

    By default TensorFlow and JAX would take nearly all memory of every GPU that they see, at their first operation. This starts
    CUDA, which from then on knows the GPUs that the environment names now; so it must not happen before a rank is forked.

    Without effect where it computes already: in a Python worker that Spark uses again it has its threads and GPUs.
    """
    {"tensorflow": _use_with_tensorflow, "jax": _use_with_jax, "torch": _use_with_torch}[keras.backend.backend()](
        threads
    )


def warn_if_gpus_are_taken(environ: Mapping[str, str] = os.environ) -> None:
    """Warn where TensorFlow or JAX takes nearly all memory of this process's GPUs. Call it where ranks use the same ones."""
    taking = {"tensorflow": _tensorflow_takes_gpus, "jax": _jax_takes_gpus}.get(keras.backend.backend())
    setting = None if taking is None else taking(environ)
    if setting is not None:
        name = {"tensorflow": "TensorFlow", "jax": "JAX"}[keras.backend.backend()]
        warnings.warn(
            f"{name} takes nearly all memory of the GPUs for this process, and its ranks, on the same machine, may find too "
            f"little: set {setting} in the environment before {name} is imported.",
            stacklevel=4,
        )


def _tensorflow_takes_gpus(environ: Mapping[str, str]) -> str | None:
    """The setting that would prevent it; None where it does not."""
    if environ.get("TF_FORCE_GPU_ALLOW_GROWTH", "").lower() == "true":
        return None
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    grows = all(tf.config.experimental.get_memory_growth(gpu) for gpu in gpus)
    return None if grows else "TF_FORCE_GPU_ALLOW_GROWTH=true"


def _jax_takes_gpus(environ: Mapping[str, str]) -> str | None:
    """The same. JAX takes GPUs when it computes for the first time, which the driver has done by now: it has a model."""
    grows = environ.get("XLA_PYTHON_CLIENT_PREALLOCATE") in ("false", "False", "0")
    if grows or environ.get("XLA_PYTHON_CLIENT_ALLOCATOR", "").lower() == "platform":
        return None
    import jax

    return "XLA_PYTHON_CLIENT_PREALLOCATE=false" if any(d.platform == "gpu" for d in jax.devices()) else None


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
    jax.devices()


def _use_with_torch(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    if torch.cuda.is_available():
        torch.cuda.init()
