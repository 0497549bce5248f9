"""What the outputs of a model mean: probabilities of classes, or values. A pure rule, and the arithmetic that follows from it.

The rule of task="auto", output by output: what was compiled with one of Keras's cross-entropies (binary, categorical, sparse
categorical, and the focal ones) is a classification; with another loss of Keras it is a regression. Where the loss is the
user's own, or the model is not compiled, the last layer decides: softmax and sigmoid make a classification. Classes exclude
each other where the last layer is a softmax, even under a binary cross-entropy.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from allreduce_spark.data.forms import ArrayForm
from allreduce_spark.errors import ConfigError
from allreduce_spark.training.models.layout import Slot, matched, names_of_list, outputs_of, tensors_of

__all__ = ["Head", "heads_of", "label_forms", "takes_indices"]

_BINARY = ("BinaryCrossentropy", "BinaryFocalCrossentropy")
_ONE_HOT = ("CategoricalCrossentropy", "CategoricalFocalCrossentropy")
_SPARSE = ("SparseCategoricalCrossentropy",)
_OF_ONE_SHAPE = (
    "MeanSquaredError", "MeanAbsoluteError", "MeanAbsolutePercentageError", "MeanSquaredLogarithmicError", "Huber", "LogCosh",
    "Poisson", "KLDivergence", "CosineSimilarity",
)  # fmt: skip


@dataclass(frozen=True)
class Head:
    """One output, and what it says.

    Attributes:
        name: Of the output; "" for the only one.
        shape: Of one row.
        kind: "value"; "unit" for one probability, of class 1; "classes" for the probabilities of classes that exclude each
            other, along the last axis; "labels" for independent ones.
        from_logits: Whether softmax or sigmoid are still to be applied.
        loss: The name of Keras's loss class, or "" where it is none of Keras's.
    """

    name: str
    shape: tuple[int | None, ...]
    kind: str
    from_logits: bool = False
    loss: str = ""

    @property
    def is_class(self) -> bool:
        return self.kind != "value"

    @property
    def takes_indices(self) -> bool:
        """Whether the loss takes class indices for labels."""
        return self.loss in _SPARSE

    @property
    def takes_one_hot(self) -> bool:
        """Whether the loss takes one-hot vectors for labels."""
        return self.loss in _ONE_HOT

    def probability(self, output: np.ndarray) -> np.ndarray:
        """The probabilities of all classes, (rows, classes): of a unit those of both, [1 - p, p]. Other shapes stay."""
        if self.kind == "classes":
            return _softmax(output) if self.from_logits else output
        probability = _sigmoid(output) if self.from_logits else output
        if self.kind == "unit":
            flat = probability.reshape(-1)
            return np.stack([1 - flat, flat], axis=1)
        return probability

    def raw(self, output: np.ndarray) -> np.ndarray:
        """What the probabilities are made of, in their shape: logits, where the loss takes logits; else they themselves."""
        if not self.from_logits:
            return self.probability(output)
        if self.kind == "unit":
            flat = output.reshape(-1)
            return np.stack([-flat, flat], axis=1)
        return output

    def prediction(self, output: np.ndarray) -> np.ndarray:
        """The class, or the classes, or the value, per row: (rows,) where it is one number."""
        if self.kind == "classes":
            return output.argmax(axis=-1)
        if self.kind == "value":
            return output.reshape(-1) if self.is_number else output
        chosen = output > (0 if self.from_logits else 0.5)
        return chosen.reshape(-1) if self.kind == "unit" else chosen

    @property
    def is_number(self) -> bool:
        """Whether `prediction` is one number per row."""
        return self.kind == "unit" or (len(self.shape) == 1 and self.kind == "classes") or self.shape in ((), (1,))


def takes_indices(loss: Any) -> bool:
    """Whether what a model was compiled with takes class indices for labels, and every label for a class."""
    return _known_loss(loss)[0] in _SPARSE and getattr(loss, "ignore_class", None) is None


def heads_of(model: keras.Model, task: str) -> tuple[Head, ...]:
    """What each output means.

    Args:
        task: "auto", "classification" or "regression".

    Raises:
        ConfigError: The outputs of the model are not known before it runs.
    """
    outputs = outputs_of(model)
    if outputs is None:
        raise ConfigError(
            f"the model {model.name!r} is no functional or Sequential model and was not built for one array, so its outputs "
            "are not known before it runs: make it with keras.Model(inputs, outputs)."
        )
    losses = _losses(model, outputs)
    activations = _last_activations(model, len(outputs))
    return tuple(
        _head(slot, loss, activation, task) for slot, loss, activation in zip(outputs, losses, activations, strict=True)
    )


def label_forms(heads: Sequence[Head], columns: Sequence[str], scalar: Container[str]) -> tuple[ArrayForm, ...]:
    """What the labels in these columns must be.

    Args:
        heads: Of the compiled model.
        columns: One per output: the one with its name if all names are equal, else the one at its place.
        scalar: The columns that hold plain numbers.

    Raises:
        ConfigError: The numbers of columns and outputs differ.
    """
    names = [head.name for head in heads]
    if len(columns) != len(heads):
        raise ConfigError(
            f"the model has {len(heads)} outputs {names}, but the labels are in {len(columns)} column"
            f"{'s' * (len(columns) != 1)} {list(columns)}: name one column per output in labelCols."
        )
    ordered = matched(columns, names)
    return tuple(_label_form(head, name, name in scalar) for head, name in zip(heads, ordered, strict=True))


def _label_form(head: Head, column: str, scalar: bool) -> ArrayForm:
    owner = f"the model's output {head.name!r}" if head.name else "the model"
    classes = head.shape[-1] if head.shape else None
    limits = (0.0, classes - 1.0) if classes else None
    form = ArrayForm(head.name, (column,), owner=owner)
    if head.loss in _SPARSE:
        shape = head.shape[:-1] if not scalar else ()
        owner = f"{owner}, which has {classes} classes,"
        # An array of one class index per row is as good as the index.
        return ArrayForm(head.name, (column,), shape, limits=limits, whole=True, owner=owner)
    if head.loss in _ONE_HOT and scalar and len(head.shape) == 1 and classes:
        owner = f"{owner}, which has {classes} classes,"
        return ArrayForm(head.name, (column,), (), limits=limits, whole=True, one_hot=classes, owner=owner)
    if head.loss in _BINARY or head.loss in _ONE_HOT:
        return ArrayForm(head.name, (column,), head.shape, limits=(0.0, 1.0), owner=owner)
    if head.loss in _OF_ONE_SHAPE:
        return ArrayForm(head.name, (column,), head.shape, owner=owner)
    return form


def _losses(model: keras.Model, outputs: tuple[Slot, ...]) -> list[Any]:
    """What the user compiled for each output."""
    compiled = getattr(model, "loss", None) if model.compiled else None
    if isinstance(compiled, dict):
        return [compiled.get(slot.name) for slot in outputs] if outputs[0].name else list(compiled.values())
    if isinstance(compiled, (list, tuple)):
        by_name = dict(zip(_in_keras_order(model, [slot.name for slot in outputs]), compiled, strict=True))
        return [by_name[slot.name] for slot in outputs]
    return [compiled] * len(outputs)


def _in_keras_order(model: keras.Model, names: list[str]) -> list[str]:
    """The outputs as a list of losses numbers them: of a dict, Keras sorts the keys."""
    if getattr(model, "outputs", None):
        is_dict = not isinstance(model, keras.Sequential) and isinstance(model.output, dict)
    else:
        is_dict = names != names_of_list(len(names))
    return sorted(names) if is_dict else names


def _head(slot: Slot, loss: Any, activation: str, task: str) -> Head:
    name, from_logits = _known_loss(loss)
    if task == "regression" or (task == "auto" and not _classifies(name, activation)):
        kind = "value"
    elif slot.shape in ((), (1,)):
        kind = "unit"
    elif activation != "softmax" and (name in _BINARY or (not name and activation == "sigmoid")):
        kind = "labels"
    else:
        kind = "classes"
    if getattr(loss, "ignore_class", None) is not None:
        name = ""  # one of the labels is no class: let them be
    return Head(slot.name, slot.shape, kind, from_logits and kind != "value", name)


def _classifies(loss: str, activation: str) -> bool:
    return loss in (*_BINARY, *_ONE_HOT, *_SPARSE) if loss else activation in ("softmax", "sigmoid")


def _known_loss(loss: Any) -> tuple[str, bool]:
    """(name of the class in Keras, whether the outputs are logits); ("", False) where it is none of Keras's."""
    if isinstance(loss, str):
        loss = keras.losses.get(loss)
    for name in (*_BINARY, *_ONE_HOT, *_SPARSE, *_OF_ONE_SHAPE):
        kind = getattr(keras.losses, name)
        if isinstance(loss, kind):
            return name, bool(getattr(loss, "from_logits", False))
        if loss is getattr(kind(), "fn", None):
            return name, False
    is_keras = getattr(loss, "__module__", type(loss).__module__).split(".")[0] == "keras" and loss is not None
    return (getattr(loss, "__name__", type(loss).__name__) if is_keras else ""), False


def _last_activations(model: keras.Model, count: int) -> list[str]:
    """Per output the name of the activation that makes it, or "" where it cannot be seen."""
    tensors = list(tensors_of(model, "output").values()) if getattr(model, "outputs", None) else [None] * count
    return [_activation_of(getattr(getattr(tensor, "_keras_history", None), "operation", None)) for tensor in tensors]


def _activation_of(operation: Any) -> str:
    if isinstance(operation, keras.layers.Softmax):
        return "softmax"
    return getattr(getattr(operation, "activation", None), "__name__", "")


def _softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * logits))  # without overflow, unlike 1 / (1 + exp(-x))
