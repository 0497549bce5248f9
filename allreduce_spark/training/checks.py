"""What can be seen to be wrong with a model or its callbacks on the driver, before anything starts."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from numbers import Real
from typing import Any

import keras

from allreduce_spark.errors import ConfigError
from allreduce_spark.training.metrics import metric_variables

__all__ = ["check_callbacks", "check_model"]


def check_model(model: object) -> keras.Model:
    """Return the model, or say why it cannot be trained on several ranks.

    Raises:
        ConfigError: It is no Keras model, is not compiled, or uses something whose distributed result would not be exact.
    """
    if not isinstance(model, keras.Model):
        raise ConfigError(f"SparkModel needs a keras.Model, got {type(model).__module__}.{type(model).__qualname__}.")
    if keras.backend.backend() != "tensorflow":
        raise ConfigError(
            f"Keras runs on the backend {keras.backend.backend()!r}; this version trains with KERAS_BACKEND=tensorflow only."
        )
    if not model.compiled or model.optimizer is None:
        raise ConfigError("the model is not compiled. Call model.compile(optimizer, loss, metrics=[...]) first.")
    _drop_words_among_loss_weights(model)
    _refuse_losses_without_reduction(model)
    _refuse_hidden_optimizers(model)
    if any(getattr(variable, "overwrite_with_gradient", False) for variable in model.trainable_variables):
        raise ConfigError("float8 quantization-aware training keeps scales per process and is not supported.")
    metric_variables(model)
    return model


def check_callbacks(callbacks: Sequence[object]) -> list[keras.callbacks.Callback]:
    """Return the callbacks as a list, or say which of them cannot work.

    Raises:
        ConfigError: Something is no Keras callback, or is one that would act on one rank alone.
    """
    if isinstance(callbacks, keras.callbacks.Callback):
        callbacks = [callbacks]
    for callback in callbacks:
        if not isinstance(callback, keras.callbacks.Callback):
            raise ConfigError(f"callbacks must be keras.callbacks.Callback objects, got {callback!r}.")
        if isinstance(callback, keras.callbacks.BackupAndRestore):
            raise ConfigError(
                "BackupAndRestore would restore one rank only, and the ranks would go different ways. Leave it out; "
                "ModelCheckpoint works (it writes on rank 0)."
            )
    return list(callbacks)  # type: ignore[arg-type]


def _compile_arguments(model: keras.Model) -> dict[str, Any]:
    return model._compile_config.config if model._compile_config is not None else {}


def _drop_words_among_loss_weights(model: keras.Model) -> None:
    """`compile(optimizer, loss, ['acc'])` was right in Keras 2; in Keras 3 the third argument is `loss_weights`."""
    arguments = dict(_compile_arguments(model))
    weights = arguments.get("loss_weights")
    wrong = [w for w in keras.tree.flatten(weights) if w is not None and not isinstance(w, Real)]
    if not wrong:
        return
    warnings.warn(
        f"loss_weights={weights!r} are not numbers and are dropped. The third positional argument of compile() is "
        "loss_weights in Keras 3; pass metrics by name: compile(optimizer, loss, metrics=[...]).",
        stacklevel=4,
    )
    arguments["loss_weights"] = None
    arguments["optimizer"] = model.optimizer  # the object, with its state
    model.compile(**arguments)


def _refuse_losses_without_reduction(model: keras.Model) -> None:
    for loss in keras.tree.flatten(_compile_arguments(model).get("loss")):
        if isinstance(loss, keras.losses.Loss) and loss.reduction in (None, "none"):
            raise ConfigError(
                f"the loss {loss.name!r} has reduction={loss.reduction!r}, so it is a number per row and there is no mean "
                "over the global batch. Use 'sum_over_batch_size', 'mean_with_sample_weight' or 'sum'."
            )


def _refuse_hidden_optimizers(model: keras.Model) -> None:
    for name, value in vars(model).items():
        if isinstance(value, keras.optimizers.Optimizer) and value is not model.optimizer:
            raise ConfigError(
                f"the model has a second optimizer, {name!r}. Only the one that compile() was given reduces its gradients "
                "over the ranks, so the ranks would go different ways."
            )
