"""Losses whose mean is not over rows: made to mean, on every rank, what they mean over the global batch.

`optimizer` weighs each rank's gradient by its rows. That is exact for a loss that is a mean over the rows, as nearly all are.
Three kinds are not, and `GlobalLoss` corrects each in the forward pass, so that weighing by rows is right again:

* masked outputs and `ignore_class`: Keras divides by the number of *valid* entries, which differs from rank to rank;
* `reduction="mean_with_sample_weight"`: Keras divides by the sum of the weights;
* `reduction="sum"`: Keras does not divide at all.

With numerator N_r and denominator D_r of rank r, and R the rows of all ranks, the corrected loss is
`N_r * R / (rows_r * sum(D))`: weighed by rows and divided by R, the sum over the ranks is `sum(N) / sum(D)`.

A loss that returns one number for a batch has reduced it already. It is taken for a mean over the rows, which is what most are;
where it cannot be that, it is refused.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras.src.backend import get_keras_mask
from keras.src.losses.loss import reduce_weighted_values

from allreduce_spark.communicator.base import Communicator
from allreduce_spark.errors import ConfigError
from allreduce_spark.training.backends import Order, ours
from allreduce_spark.training.optimizer import StepRows

__all__ = ["GlobalLoss", "globalize_losses"]


def globalize_losses(model: keras.Model, communicator: Communicator, rows: StepRows, order: Order) -> None:
    """Put a `GlobalLoss` around each loss that the model was compiled with."""
    compiled = model._compile_loss
    if compiled is None or communicator.world_size == 1:
        return

    def wrap() -> None:
        compiled._flat_losses = [
            entry._replace(loss=GlobalLoss(entry.loss, communicator, rows, order))
            if type(entry.loss).__call__ is keras.losses.Loss.__call__
            else entry
            for entry in compiled._flat_losses
        ]

    if compiled.built:
        wrap()
        return
    build = compiled.build  # Keras finds out which losses there are when it traces the first step

    def build_and_wrap(y_true: Any, y_pred: Any) -> None:
        build(y_true, y_pred)
        wrap()

    compiled.build = build_and_wrap


class GlobalLoss(keras.losses.Loss):
    """A Keras loss that divides by the denominator of the global batch, where that is not the number of rows.

    Everywhere else it is the wrapped loss itself: nothing else is computed, and no message sent.

    Raises:
        ConfigError: The loss returns one number for a batch, and rows are to be added up, or have weights.
    """

    def __init__(self, loss: keras.losses.Loss, communicator: Communicator, rows: StepRows, order: Order) -> None:
        super().__init__(name=loss.name, reduction=loss.reduction, dtype=loss.dtype)
        self._loss, self._communicator, self._rows, self._order = loss, communicator, rows, order

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        losses = self._loss.call(*keras.tree.map_structure(self._convert, (y_true, y_pred)))
        if not hasattr(losses, "shape"):  # a number of Python's, such as 0.0 for an output that is not to count
            return self._convert(losses)
        if len(losses.shape) == 0:
            self._check_is_mean(sample_weight)
            return self._convert(losses)
        masks = [m for m in (get_keras_mask(y_pred), get_keras_mask(losses)) if m is not None]
        weighted = self.reduction == "mean_with_sample_weight" and sample_weight is not None
        if not masks and not weighted and self.reduction != "sum":
            return reduce_weighted_values(losses, sample_weight, None, self.reduction, self.dtype)

        losses = self._convert(losses)
        weights = None if sample_weight is None else keras.ops.cast(sample_weight, losses.dtype)
        valid = None
        for mask in masks:
            mask = keras.ops.cast(mask, losses.dtype)
            valid = mask if valid is None else valid * mask
        if valid is not None:
            weights = valid if weights is None else _align(weights, valid) * valid
        numerator = keras.ops.sum(losses if weights is None else losses * _align(weights, losses))
        if self.reduction == "sum":
            denominator = None
        elif weighted or (self.reduction == "mean_with_sample_weight" and masks):
            denominator = keras.ops.sum(weights)
        else:
            # Keras spreads the valid entries over the whole mask; the mask may be coarser than the losses.
            size = keras.ops.cast(keras.ops.prod(keras.ops.shape(losses)), losses.dtype)
            mask_size = keras.ops.cast(keras.ops.prod(keras.ops.shape(valid)), losses.dtype)
            denominator = keras.ops.sum(valid) * size / mask_size
        return numerator * self._correction(denominator, losses.dtype)

    def _check_is_mean(self, sample_weight: Any) -> None:
        if self.reduction == "sum" or sample_weight is not None:
            why = "reduction='sum' asks for their sum" if self.reduction == "sum" else "the rows have weights"
            raise ConfigError(
                f"the loss {self.name!r} returns one number for a batch, but {why}, so it would depend on the number of ranks. "
                "Let it return one for each row: keras.ops.mean(..., axis=-1)."
            )

    def _convert(self, value: Any) -> Any:
        return keras.ops.convert_to_tensor(value, dtype=self.dtype)

    def _correction(self, denominator: Any | None, dtype: str) -> Any:
        """R / (rows_r * sum(D)), or R / rows_r where there is no denominator; computed when the step runs."""
        if isinstance(denominator, keras.KerasTensor):
            return 1.0  # Keras works out shapes; no step runs
        wide, ops = ours.widest_float(), keras.ops
        argument = ops.zeros((0,), wide) if denominator is None else ops.reshape(ops.cast(denominator, wide), (1,))
        (factor,) = self._order.call(
            lambda array: [self._sum_denominators(array)], [ops.stop_gradient(argument)], [((), wide)]
        )
        return ops.cast(factor, dtype)

    def _sum_denominators(self, denominator: np.ndarray) -> np.float64:
        mine, total = self._rows.mine, self._rows.total
        if total == 0:  # A callback of the user's evaluates, on this rank alone.
            own = denominator[0] if denominator.size else 1.0
            return np.float64(1.0 / own if own else 0.0)
        of_all = np.array(denominator if mine else np.zeros_like(denominator), np.float64)
        if of_all.size:
            self._communicator.allreduce(of_all)
        divisor = mine * (of_all[0] if of_all.size else 1.0)
        return np.float64(total / divisor if divisor else 0.0)


def _align(weights: Any, values: Any) -> Any:
    """Give `weights` the rank of `values`, one short at most, as Keras does."""
    if len(weights.shape) == len(values.shape) + 1 and weights.shape[-1] == 1:
        return keras.ops.squeeze(weights, -1)
    if len(weights.shape) + 1 == len(values.shape):
        return keras.ops.expand_dims(weights, -1)
    return weights
