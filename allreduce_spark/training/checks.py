"""What can be seen to be wrong with a model, its callbacks or its rows on the driver, before any rank starts."""

from __future__ import annotations

import warnings
from numbers import Real
from typing import Any

import keras
import numpy as np

from allreduce_spark.config import check_backend
from allreduce_spark.data.spec import STRING, LeafSpec, NestSpec, RowSpec
from allreduce_spark.errors import ConfigError, DataError
from allreduce_spark.training.backends import KERAS_BACKEND
from allreduce_spark.training.metrics import metric_variables
from allreduce_spark.training.models.heads import Head, heads_of
from allreduce_spark.training.models.layout import outputs_of
from allreduce_spark.training.models.model_bytes import compile_arguments

__all__ = [
    "check_backends",
    "check_callbacks",
    "check_classes",
    "check_inputs",
    "check_labels",
    "check_model",
    "warn_if_diverged",
]


def check_model(model: object) -> keras.Model:
    """Return the model, or say why it cannot be trained on several ranks.

    Raises:
        ConfigError: It is no Keras model, is not compiled, or uses something whose distributed result would not be exact.
    """
    if not isinstance(model, keras.Model):
        raise ConfigError(f"SparkModel needs a keras.Model, got {type(model).__module__}.{type(model).__qualname__}.")
    if not model.compiled or model.optimizer is None:
        raise ConfigError("the model is not compiled. Call model.compile(optimizer, loss, metrics=[...]) first.")
    _drop_words_among_loss_weights(model)
    _refuse_losses_without_reduction(model)
    _refuse_hidden_optimizers(model)
    if any(getattr(variable, "overwrite_with_gradient", False) for variable in model.trainable_variables):
        raise ConfigError("float8 quantization-aware training keeps scales per process and is not supported.")
    synchronized = [layer.name for layer in model._flatten_layers() if getattr(layer, "synchronized", False)]
    if synchronized:
        raise ConfigError(
            f"the layers {synchronized} ask for statistics over all replicas (synchronized=True), which is not supported: "
            "each rank normalises with its own batch. Leave the argument out."
        )
    _refuse_activity_sums(model)
    metric_variables(model)
    _refuse_half_built(model)
    return model


def check_backends(wanted: object) -> str:
    """Return what the ranks are to reduce by, or say why they cannot.

    Raises:
        ConfigError: There is no such backend, or it is Horovod and Keras does not run on TensorFlow.
    """
    backend = check_backend(wanted)
    if backend.startswith("horovod") and KERAS_BACKEND != "tensorflow":
        raise ConfigError(
            f"backend={backend!r} reduces what TensorFlow computes, but Keras runs on {KERAS_BACKEND} here. Leave it "
            "out (or use backend='mpi'), or set KERAS_BACKEND=tensorflow before Keras is imported."
        )
    return backend


def check_callbacks(callbacks: object) -> list[keras.callbacks.Callback]:
    """Return the callbacks as a list, or say which of them cannot work.

    Raises:
        ConfigError: Something is no Keras callback, or is one that would act on one rank alone.
    """
    if isinstance(callbacks, keras.callbacks.Callback):
        callbacks = [callbacks]
    if not isinstance(callbacks, (list, tuple)):
        raise ConfigError(f"callbacks must be a list of keras.callbacks.Callback objects, got {callbacks!r}.")
    for callback in callbacks:
        if not isinstance(callback, keras.callbacks.Callback):
            raise ConfigError(f"callbacks must be keras.callbacks.Callback objects, got {callback!r}.")
        if isinstance(callback, keras.callbacks.BackupAndRestore):
            raise ConfigError(
                "BackupAndRestore would restore one rank only, and the ranks would go different ways. Leave it out; "
                "ModelCheckpoint works (it writes on rank 0)."
            )
    return list(callbacks)


def check_labels(model: keras.Model, spec: RowSpec) -> None:
    """Make sure that the rows have labels where the loss needs them, class indices or one-hot vectors as it takes them.

    Raises:
        DataError: They have none, or the other kind.
    """
    loss = compile_arguments(model).get("loss")
    if spec.y is None and loss is not None:
        name = loss if isinstance(loss, str) else getattr(loss, "name", None) or getattr(loss, "__name__", repr(loss))
        raise DataError(f"the rows have no labels, but the model was compiled with the loss {name!r}: give (x, y).")
    head = _only_head(model)
    if head is None or not isinstance(spec.y, LeafSpec) or None in head.shape or not head.shape:
        return
    if head.takes_indices and spec.y.shape == head.shape != (1,):
        raise DataError(
            f"y has rows of shape {spec.y.shape}, one number per class, but the loss {head.loss} takes class indices: compile "
            f"the model with {head.loss.removeprefix('Sparse')}, or give y.argmax(axis=-1)."
        )
    if head.takes_one_hot and spec.y.shape in ((), (1,)) and head.shape != (1,):
        raise DataError(
            f"y has rows of shape {spec.y.shape}, but the model's output has shape {head.shape} and the loss {head.loss} takes "
            f"one number per class: compile the model with Sparse{head.loss}, or give keras.utils.to_categorical(y)."
        )


def check_classes(model: keras.Model, y: Any) -> None:
    """Make sure that an array of class indices names classes that the model has. TensorFlow would find out in the ranks only.

    Args:
        y: The labels of all rows, in any form that `fit` takes; what is no array of class indices is not looked at.

    Raises:
        DataError: A label is none of the classes; names the first.
    """
    head = _only_head(model)
    if head is None or not head.takes_indices or not head.shape or head.shape[-1] is None:
        return
    if not isinstance(y, np.ndarray) or y.dtype.kind not in "iuf":
        return
    wrong = np.flatnonzero(~((y >= 0) & (y < head.shape[-1])).reshape(len(y), -1).all(axis=1))
    if len(wrong):
        raise DataError(
            f"y has the label {y[wrong[0]]!s} in row {wrong[0]} (of {len(wrong)} such rows), but the model has "
            f"{head.shape[-1]} classes, 0 to {head.shape[-1] - 1}: renumber the labels, or widen the last layer."
        )


def warn_if_diverged(model: keras.Model) -> None:
    """Warn where training has left weights that are no numbers: Keras goes on with them in silence."""
    lost = [v.path for v in model.trainable_variables if not np.isfinite(v.numpy()).all()]
    if lost:
        warnings.warn(
            f"after training, {len(lost)} of {len(model.trainable_variables)} weights hold NaN or infinity, {lost[0]!r} first: "
            "a NaN in the rows, or a learning rate that is too high. keras.callbacks.TerminateOnNaN stops where it begins.",
            stacklevel=4,
        )


def _only_head(model: keras.Model) -> Head | None:
    """What the output of a compiled model with one output means; None where that is not known."""
    outputs = outputs_of(model)
    return heads_of(model, "auto")[0] if outputs is not None and len(outputs) == 1 else None


def check_inputs(model: keras.Model, spec: RowSpec) -> None:
    """Make sure that the x of such rows fits the model, as far as can be told without running it.

    A model that is not built takes whatever comes first, and the `call` of a subclass may do anything: those are not
    looked at.

    Raises:
        DataError: The inputs of the model take something else; both are named.
    """
    problem = _misfit(model, spec.x) if getattr(model, "inputs", None) else None
    if problem is None and KERAS_BACKEND != "tensorflow" and any(leaf.dtype == STRING for leaf in _leaves(spec.x)):
        problem = f"x is {spec.x}, but Keras on {KERAS_BACKEND} computes with numbers only: encode the strings first."
    if problem is not None:
        raise DataError(problem)


def _misfit(model: keras.Model, x: LeafSpec | NestSpec) -> str | None:
    """Why the inputs of a functional or Sequential model do not take rows with this x, or None where they do."""
    tensors = {tensor.name: tensor for tensor in model.inputs}
    named = not isinstance(model, keras.Sequential) and isinstance(model.input, dict)
    if named:
        tensors = dict(model.input)
    if isinstance(x, LeafSpec):
        leaves: tuple[Any, ...] = (x,)
    else:
        leaves = x.parts
    if isinstance(x, NestSpec) and x.kind == "dict":
        missing, surplus = sorted(set(tensors) - set(x.keys)), sorted(set(x.keys) - set(tensors))
        # Beside named inputs Keras takes a surplus array for the input whose place in the alphabet it has.
        if missing or (named and surplus):
            return f"the model has the inputs {sorted(tensors)}, but x is {x}: the names must be the same."
        by_name = dict(zip(x.keys, x.parts, strict=True))
        leaves = tuple(by_name[name] for name in tensors)
    elif len(leaves) != len(tensors) or (named and isinstance(x, NestSpec) and list(tensors) != sorted(tensors)):
        names = ", ".join(map(repr, tensors))
        return (
            f"the model has {len(tensors)} inputs ({names}), but x is {'one array' if len(leaves) == 1 else x}: give a dict "
            "{name: array}; of a DataFrame, name one column per input in features_col."
        )
    for leaf, (name, tensor) in zip(leaves, tensors.items(), strict=True):
        if isinstance(leaf, LeafSpec) and not _may_take(tensor, leaf) and not _takes(model, x):
            shape = tuple(tensor.shape[1:])
            which = "the model takes" if len(tensors) == 1 else f"the input {name!r} of the model takes"
            return (
                f"{leaf.name} has rows of shape {leaf.shape} and type {leaf.dtype}, but {which} shape {shape} and type "
                f"{tensor.dtype}: reshape or convert the rows, or make the model with keras.Input({leaf.shape})."
            )
    return None


def _leaves(x: LeafSpec | NestSpec) -> list[LeafSpec]:
    return [x] if isinstance(x, LeafSpec) else [leaf for part in x.parts for leaf in _leaves(part)]


def _may_take(tensor: Any, leaf: LeafSpec) -> bool:
    expected = tensor.shape[1:]
    same_shape = len(expected) == len(leaf.shape) and all(
        size in (None, given) for size, given in zip(expected, leaf.shape, strict=True)
    )
    return same_shape and (leaf.dtype == STRING) == (tensor.dtype == "string")


def _takes(model: keras.Model, x: LeafSpec | NestSpec) -> bool:
    """Ask Keras itself, with one row of zeros: it is more lenient than its shapes say, above all in a Sequential model."""
    zeros, _, _ = RowSpec(x).zeros(1)
    try:
        model(zeros)
    except Exception:  # noqa: BLE001 - the layers, the user's among them, raise whatever they like
        return False
    return True


def _drop_words_among_loss_weights(model: keras.Model) -> None:
    """`compile(optimizer, loss, ['acc'])` was right in Keras 2; in Keras 3 the third argument is `loss_weights`."""
    arguments = dict(compile_arguments(model))
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
    for loss in keras.tree.flatten(compile_arguments(model).get("loss")):
        if isinstance(loss, keras.losses.Loss) and loss.reduction in (None, "none"):
            raise ConfigError(
                f"the loss {loss.name!r} has reduction={loss.reduction!r}, so it is a number per row and there is no mean "
                "over the global batch. Use 'sum_over_batch_size', 'mean_with_sample_weight' or 'sum'."
            )


def _refuse_activity_sums(model: keras.Model) -> None:
    """Older Keras adds activity regularizers up over a batch, newer takes the mean: only the mean can be weighed by rows."""
    regularized = [layer.name for layer in model._flatten_layers() if getattr(layer, "activity_regularizer", None)]
    if regularized:
        probe = keras.layers.Activation("linear", activity_regularizer="l2")
        losses = []
        for rows in (1, 2):
            probe(np.ones((rows, 1), "float32"))
            losses.append(float(probe.losses[0]))
        if losses[0] != losses[1]:
            raise ConfigError(
                f"the layers {regularized} have an activity_regularizer, which Keras {keras.__version__} adds up over the "
                "rows of a batch, so its weight would change with the number of ranks. Newer versions of Keras take the mean."
            )


def _refuse_half_built(model: keras.Model) -> None:
    unbuilt = [layer.name for layer in model._flatten_layers() if not layer.built]
    if model.built and unbuilt:
        # `build(input_shape)` of a subclassed model may leave it so; Keras could save such a model, but not load it.
        raise ConfigError(
            f"the model is built, but its layers {unbuilt} are not. Call the model once on a batch of data before "
            "SparkModel, or do not build it: then the first fit does."
        )


def _refuse_hidden_optimizers(model: keras.Model) -> None:
    for name, value in vars(model).items():
        held = [value]
        if not name.startswith("_"):  # Keras's own books hold every optimizer a second time
            held += value if isinstance(value, (list, tuple)) else value.values() if isinstance(value, dict) else []
        if any(isinstance(part, keras.optimizers.Optimizer) and part is not model.optimizer for part in held):
            raise ConfigError(
                f"the model has a second optimizer, {name!r}. Only the one that compile() was given reduces its gradients "
                "over the ranks, so the ranks would go different ways."
            )
