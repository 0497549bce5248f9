"""For training loops of the user's own, in a function that `allreduce_spark.run` calls: an optimizer, variables, data sets."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from allreduce_spark.communicator.base import Communicator
from allreduce_spark.errors import ConfigError
from allreduce_spark.training.backends import ours
from allreduce_spark.training.optimizer import StepRows, distribute, distribute_steps, moving_variables

if TYPE_CHECKING:
    import tensorflow as tf

__all__ = ["DistributedOptimizer", "broadcast", "shard_dataset"]

_order = ours.ProgramOrder()  # of all optimizers of this rank: a step may apply several
_SCALES_OUTSIDE = (
    "with the policy mixed_float16 the ranks must skip the same steps: write "
    "DistributedOptimizer(keras.optimizers.LossScaleOptimizer(optimizer), communicator)."
)


def DistributedOptimizer(
    optimizer: keras.optimizers.Optimizer, communicator: Communicator, *, model: keras.Model | None = None
) -> keras.optimizers.Optimizer:
    """Let an optimizer apply the mean of all ranks' gradients, in `model.fit` and in loops that call `optimizer.apply`.

    Every rank's gradient counts alike; where ranks have batches of different sizes, scale the loss. With TensorFlow and
    PyTorch compile models with `jit_compile=False`: their compiled code knows no way out to the other ranks. JAX's does.
    (Keras uses XLA on GPUs unless it is told.)

    So ranks that begin with the same weights go on with the same. What is not trained by gradients, but moved by the forward
    pass, as the statistics of BatchNormalization are, is averaged too for a `model` that is given; otherwise each rank has its
    own. With JAX that is done in `model.fit`, and not in steps of your own.

    Metrics are of each rank's own rows, and so is what callbacks decide by them: with ReduceLROnPlateau ranks may go on with
    different learning rates, without an error; with EarlyStopping one may stop, and the others wait for it in vain. Decide by
    a number that `communicator.allreduce` has made the same on all ranks, or train by `SparkModel`, which does so.

    With "mixed_float16" give it a `keras.optimizers.LossScaleOptimizer`, so that ranks reduce before one looks for an
    overflow, and skip the same steps. `Model.compile` would put one around the optimizer, where each rank decides by itself:
    that is refused here, or in the first step.

    Args:
        optimizer: Of Keras 3; built or not. Changed in place, it keeps its class.
        communicator: What the function was given.
        model: That it trains; built, compiled or not. All ranks must call this then: what the forward pass moves begins with
            the values of rank 0.

    Returns:
        The same optimizer.

    Raises:
        ConfigError: It is no optimizer of Keras, or already distributed; or the policy is "mixed_float16", and it scales no
            loss; or the model is not built.
    """
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise ConfigError(f"DistributedOptimizer takes an optimizer of Keras 3, got {optimizer!r}.")
    scales_loss = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    policy = keras.config.dtype_policy() if model is None else model.dtype_policy
    if policy.name == "mixed_float16" and not scales_loss:
        raise ConfigError(_SCALES_OUTSIDE)
    if "apply" in vars(optimizer):
        raise ConfigError(f"{optimizer!r} is distributed already; its gradients would be summed twice.")
    rows = StepRows(mine=1, total=communicator.world_size)
    if model is None:
        distribute(optimizer, communicator, rows, order=_order)
    else:
        if not model.built:
            raise ConfigError(
                f"the model {model.name!r} has no variables yet, so nobody knows what its forward pass moves. Build it first: "
                "model.build(shape), keras.Input, or a call on a batch of data."
            )
        broadcast(moving_variables(model), communicator)
        distribute_steps(model, communicator, rows, _order, optimizer)
    if communicator.world_size > 1:
        _refuse_to_be_scaled(optimizer)
    return optimizer


def _refuse_to_be_scaled(optimizer: keras.optimizers.Optimizer) -> None:
    """Let `apply` raise where a `LossScaleOptimizer` calls it: after an overflow it would not, and the other ranks would wait.

    Nothing tells an optimizer that another one is put around it. Whoever calls is among the frames of the stack.
    """
    apply_anywhere = optimizer.apply

    def apply(grads: Sequence[Any], trainable_variables: Sequence[keras.Variable] | None = None) -> Any:
        frame: FrameType | None = sys._getframe()
        while frame is not None:
            if frame.f_globals.get("__name__") == keras.optimizers.LossScaleOptimizer.__module__:
                raise ConfigError(_SCALES_OUTSIDE)
            frame = frame.f_back
        return apply_anywhere(grads, trainable_variables)

    optimizer.apply = apply


def broadcast(variables: Any, communicator: Communicator, root: int = 0) -> None:
    """Give variables of all ranks the values that those of one rank have.

    Of a model or layer these are the weights. The states of its random generators are not among them: with equal ones all ranks
    would drop the same units for every row of the global batch. Let each rank seed its own, by `communicator.rank`.

    Args:
        variables: A model, a layer or an optimizer, or a list of variables of Keras or TensorFlow. They must be built, and the
            same on all ranks but for their values.
        communicator: What the function was given.
        root: The rank whose values count.

    Raises:
        CollectiveError: The ranks have other variables, or one is gone.
    """
    several: Iterable[Any] = getattr(variables, "variables", variables)
    if isinstance(variables, keras.Layer):
        several = variables.weights
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

    Raises:
        ConfigError: It is no data set of TensorFlow.
    """
    if not callable(getattr(dataset, "window", None)) or not hasattr(dataset, "flat_map"):
        raise ConfigError(
            f"shard_dataset takes a tf.data.Dataset, got {type(dataset).__module__}.{type(dataset).__qualname__}. Of arrays "
            "take rows[communicator.rank :: communicator.world_size], equally many on each rank: else one may take a step "
            "more, and wait in it for the others."
        )
    rank, world_size = communicator.rank, communicator.world_size
    groups = dataset.window(world_size, drop_remainder=True)
    return groups.flat_map(lambda *parts: _zipped(parts).skip(rank).take(1))


def _zipped(parts: tuple[Any, ...]) -> tf.data.Dataset:
    """One data set of elements, from the data sets of their components that `window` gives."""
    import tensorflow as tf  # whoever has such a data set has imported it

    structure = parts if len(parts) > 1 else parts[0]
    return structure if isinstance(structure, tf.data.Dataset) else tf.data.Dataset.zip(structure)
