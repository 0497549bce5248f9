"""`allreduce_spark.run`: any training function on barrier ranks, each with a communicator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cloudpickle
from pyspark.resource import ResourceProfile

from allreduce_spark.config import Recovery, Timeouts, check_num_ranks, check_ranks_per_gpu
from allreduce_spark.errors import ConfigError
from allreduce_spark.launch.scratch import scratch_folder
from allreduce_spark.spark.engine import engine_for
from allreduce_spark.spark.resources import check_resources
from allreduce_spark.training.checks import check_backends
from allreduce_spark.training.function import FunctionJob
from allreduce_spark.training.job import pickle_objects
from allreduce_spark.training.settings import KerasSettings

__all__ = ["run"]


def run(
    function: Callable[..., Any],
    /,
    *args: Any,
    num_ranks: int | None = None,
    backend: str = "mpi",
    timeouts: Timeouts | None = None,
    max_restarts: int = 0,
    resources: ResourceProfile | None = None,
    ranks_per_gpu: int = 1,
    **kwargs: Any,
) -> list[Any]:
    """Call `function(communicator, *args, **kwargs)` once on every rank, all at the same time.

    All ranks run or none does. If one fails, all are ended, and the first cause is raised here. What the function prints goes
    to the logger "allreduce_spark.rank" on the driver; with Spark Connect to the stderr of rank 0's executor.

    Keras is set up as it is here: backend, floatx, dtype policy, epsilon and image_data_format. Ranks stay equal in what the
    function reduces or broadcasts, and in nothing else: `DistributedOptimizer` says what that is for it, and for callbacks.

    Args:
        function: Gets a `Communicator`, its rank's place among the others (`communicator.world` has the one within its host,
            too) and its way to them; the rest is up to it. With
            `DistributedOptimizer`, `broadcast` and `shard_dataset`, a loop for one process becomes one for many. It travels by
            cloudpickle, as its arguments do.
        num_ranks: How many ranks; None for as many as there are slots.
        backend: What the ranks reduce by, as for `SparkModel`.
        timeouts: Deadlines; `function_s` is that of the function.
        max_restarts: How often in a row ranks may be started again where one has died. The function then begins anew: it is up
            to it to go on from something that it has saved.
        resources, ranks_per_gpu: As for `SparkModel`; but where Spark gives a task several GPUs, the function sees them all.

    Returns:
        What the function returned, in the order of the ranks. It comes by cloudpickle: with Spark Connect, trust the cluster.
        There all of it together must be less than spark.driver.maxResultSize of the server.

    Raises:
        ConfigError: An argument cannot work, or what a rank returned cannot be sent.
        RankFailedError: A rank raised, or died; names the first one.
        CancelledError, KeyboardInterrupt: What ended the job.
    """
    if not callable(function):
        raise ConfigError(f"run needs a function, got {function!r}.")
    timeouts, backend = timeouts or Timeouts(), check_backends(backend)
    resources, ranks_per_gpu = check_resources(resources), check_ranks_per_gpu(ranks_per_gpu)
    max_restarts = Recovery(max_restarts).max_restarts
    call = pickle_objects((function, args, kwargs))
    engine = engine_for(resources=resources)
    wanted = engine.check_slots(None if num_ranks is None else check_num_ranks(num_ranks), timeouts)
    with scratch_folder() as folder:
        engine.run(
            FunctionJob(call, timeouts, KerasSettings.here()), wanted, backend, max_restarts, folder, ranks_per_gpu
        )
        return [cloudpickle.loads((folder / f"result-{rank}").read_bytes()) for rank in range(wanted)]
