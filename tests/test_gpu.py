"""What takes a real GPU: how its memory is taken, that it gives the weights that processors give, and NCCL.

Skipped where there is none; only here is a GPU real, everywhere else Spark is told of some that are not there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from allreduce_spark.communicator.horovod_environment import installed
from allreduce_spark.launch.gpus import gpu_environment, machine_gpus, why_tensorflow_has_none

GPUS = machine_gpus()
MISSING = "no GPU here" if not GPUS else why_tensorflow_has_none()
HOROVOD = installed()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(MISSING is not None, reason=str(MISSING)),
]

FORKED = """
import json, os
from pathlib import Path
import allreduce_spark.training.rank
from allreduce_spark.training.cores import use_cores
import tensorflow as tf

def devices():
    names = (os.path.realpath(path) for path in Path("/proc/self/fd").iterdir())
    return [name for name in names if name.startswith("/dev/nvidia")]

before, rank = devices(), os.fork()
if rank:
    os.waitpid(rank, 0)
else:
    use_cores(1)
    total = float(tf.reduce_sum(tf.ones((64, 64)) @ tf.ones((64, 64))))
    gpus = tf.config.list_physical_devices("GPU")
    grows = [tf.config.experimental.get_memory_growth(gpu) for gpu in gpus]
    gpu = os.environ["CUDA_VISIBLE_DEVICES"]
    free = os.popen(f"nvidia-smi --query-gpu=memory.used,memory.total --format=csv,noheader,nounits --id={gpu}").read()
    print(json.dumps([before, len(gpus), grows, total, [int(number) for number in free.split(",")]]), flush=True)
    os._exit(0)
"""


def test_a_forked_rank_sees_its_gpu_alone_and_takes_little_of_its_memory() -> None:
    environment = {**os.environ, **gpu_environment(GPUS[:1])}
    environment.pop("TF_FORCE_GPU_ALLOW_GROWTH", None)
    answer = subprocess.run(
        [sys.executable, "-c", FORKED], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    before, count, grows, total, (used, there) = json.loads(answer.stdout.splitlines()[-1])
    assert before == [], "CUDA had been started before the fork"
    assert (count, grows, total) == (1, [True], 64.0**3)
    assert used < 0.5 * there, "MiB: with all memory taken, a second process would find none"


@pytest.mark.spark
@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_a_fit_on_gpus_ends_with_the_weights_of_one_process(spark: Any, policy: str) -> None:
    check_fit(backend="mpi", policy=policy, ranks_per_gpu=1 if len(GPUS) > 1 else 2)


@pytest.mark.spark
@pytest.mark.skipif(len(GPUS) < 2, reason="NCCL takes one GPU for each rank: no two GPUs here")
@pytest.mark.skipif(HOROVOD is None or "nccl" not in HOROVOD.parts, reason="no Horovod with NCCL here")
def test_horovod_with_nccl_is_chosen_and_ends_with_the_weights_of_one_process(spark: Any) -> None:
    from allreduce_spark import run

    def reduces_in_the_graph(communicator: Any) -> bool:
        return communicator.graph is not None

    assert run(reduces_in_the_graph, num_ranks=2, backend="auto") == [True, True]
    check_fit(backend="auto", policy="float32", ranks_per_gpu=1)


def check_fit(backend: str, policy: str, ranks_per_gpu: int) -> None:
    import keras
    import numpy as np

    from allreduce_spark import SparkModel, run

    def devices(communicator: Any) -> list[str]:
        import tensorflow as tf

        return [device.name for device in tf.config.list_logical_devices("GPU")]

    assert run(devices, num_ranks=2, ranks_per_gpu=ranks_per_gpu) == [["/device:GPU:0"]] * 2

    x = np.random.default_rng(0).normal(size=(64, 8)).astype("float32")
    y = x.sum(axis=1)

    def model() -> keras.Model:
        keras.utils.set_random_seed(1)
        made = keras.Sequential(
            [keras.Input((8,)), keras.layers.Dense(16, "tanh", dtype=policy), keras.layers.Dense(1)]
        )
        sgd = keras.optimizers.SGD(0.05, momentum=0.9)
        # Far from overflows: the mean over a rank's rows is larger than what they add to the mean over all ranks' rows.
        scaled = keras.optimizers.LossScaleOptimizer(sgd, initial_scale=256.0)
        made.compile(sgd if policy == "float32" else scaled, "mse")
        return made

    ours, expected = model(), model()
    settings = {"epochs": 3, "shuffle": False, "verbose": 0}
    SparkModel(ours, num_ranks=2, backend=backend, ranks_per_gpu=ranks_per_gpu).fit((x, y), batch_size=8, **settings)
    expected.fit(x, y, batch_size=16, **settings)
    for mine, theirs in zip(ours.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-3 if policy == "float32" else 3e-2, atol=1e-3)
