"""For training loops of the user's own, in a function that `allreduce_spark.run` calls: an optimizer, variables, data sets."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from allreduce_spark.communicator.base import Communicator
from allreduce_spark.errors import ConfigError
from allreduce_spark.training.backends import ours
from allreduce_spark.training.optimizer import StepRows, distribute

if TYPE_CHECKING:
    import tensorflow as tf

__all__ = ["DistributedOptimizer", "broadcast", "shard_dataset"]

_order = ours.ProgramOrder()  # of all optimizers of this rank: a step may apply several


def DistributedOptimizer(
    optimizer: keras.optimizers.Optimizer, communicator: Communicator
) -> keras.optimizers.Optimizer:
    """Let an optimizer apply the mean of all ranks' gradients, in `model.fit` and in loops that call `optimizer.apply`.

    Every rank's gradient counts alike; where ranks have batches of different sizes, scale the loss. With TensorFlow and
    PyTorch compile models with `jit_compile=False`: their compiled code knows no way out to the other ranks. JAX's does.
    (Keras uses XLA on GPUs unless it is told.)

    With "mixed_float16" give it a `keras.optimizers.LossScaleOptimizer`, so that ranks reduce before one looks for an
    overflow, and skip the same steps. `Model.compile` would put one around the optimizer, where each rank decides by itself.

    Args:
        optimizer: Of Keras 3; built or not. Changed in place, it keeps its class.
        communicator: What the function was given.

    Returns:
        The same optimizer.

    Raises:
        ConfigError: It is no optimizer of Keras, or already distributed; or Keras's policy is "mixed_float16", and it scales no
            loss.
    """
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise ConfigError(f"DistributedOptimizer takes an optimizer of Keras 3, got {optimizer!r}.")
    scales_loss = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    if keras.config.dtype_policy().name == "mixed_float16" and not scales_loss:
        raise ConfigError(
            "with the policy mixed_float16 the ranks must skip the same steps: write "
            "DistributedOptimizer(keras.optimizers.LossScaleOptimizer(optimizer), communicator)."
        )
    if "apply" in vars(optimizer):
        raise ConfigError(f"{optimizer!r} is distributed already; its gradients would be summed twice.")
    distribute(optimizer, communicator, StepRows(mine=1, total=communicator.world_size), order=_order)
    return optimizer


def broadcast(variables: Any, communicator: Communicator, root: int = 0) -> None:
    """Give variables of all ranks the values that those of one rank have.

    Args:
        variables: A model or an optimizer, or a list of variables of Keras or TensorFlow. They must be built, and the same on
            all ranks but for their values.
        communicator: What the function was given.
        root: The rank whose values count.

    Raises:
        CollectiveError: The ranks have other variables, or one is gone.
    """
    several: Iterable[Any] = getattr(variables, "variables", variables)
    for variable in several:
        value = np.array(variable.numpy())
        communicator.broadcast(value, root)
        variable.assign(value)


def shard_dataset(dataset: tf.data.Dataset, communicator: Communicator) -> tf.data.Dataset:
    """Every `world_size`-th element of a data set, from this rank's own first one.

    All ranks get equally many elements: a last few, fewer than there are ranks, are left out. Else some ranks would take a step
    more than others, and wait in it for them.

    Args:
        dataset: The same on all ranks, in the same order: shuffle it afterwards, or with one seed. Shard before you batch.
        communicator: What the function was given.
    """
    rank, world_size = communicator.rank, communicator.world_size
    groups = dataset.window(world_size, drop_remainder=True)
    return groups.flat_map(lambda *parts: _zipped(parts).skip(rank).take(1))


def _zipped(parts: tuple[Any, ...]) -> tf.data.Dataset:
    """One data set of elements, from the data sets of their components that `window` gives."""
    import tensorflow as tf  # whoever has such a data set has imported it

    structure = parts if len(parts) > 1 else parts[0]
    return structure if isinstance(structure, tf.data.Dataset) else tf.data.Dataset.zip(structure)
