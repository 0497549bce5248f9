"""What goes into a model and what comes out: names, shapes, dtypes; and the forms that a table's columns need for it."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from allreduce_spark.data.forms import ArrayForm
from allreduce_spark.errors import ConfigError

__all__ = [
    "Slot",
    "check_is_model",
    "feature_forms",
    "inputs_of",
    "layer_model",
    "layer_of",
    "matched",
    "names_of_list",
    "outputs_in_order",
    "outputs_of",
    "sub_model",
]


@dataclass(frozen=True)
class Slot:
    """One input or output of a model.

    Attributes:
        name: As the model calls it; "" for the only one.
        shape: Of one row; None for a size that may be any.
        dtype: "float32", "string" and the like.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: str


def check_is_model(model: object) -> keras.Model:
    """Return the model.

    Raises:
        ConfigError: It is no Keras model.
    """
    if not isinstance(model, keras.Model):
        raise ConfigError(f"model must be a keras.Model, got {type(model).__module__}.{type(model).__qualname__}.")
    return model


def inputs_of(model: keras.Model) -> tuple[Slot, ...] | None:
    """The inputs in the order of the model; of a dict of inputs, in the order of its keys. None where they are not known.

    They are known of functional and Sequential models, and of others that were built for one array.
    """
    if getattr(model, "inputs", None):
        return _slots(tensors_of(model, "input"))
    shape = _build_shape(model)
    return None if shape is None else (Slot("", shape, keras.config.floatx()),)


def outputs_of(model: keras.Model) -> tuple[Slot, ...] | None:
    """The outputs in the order in which `outputs_in_order` puts them. None where they are not known before the model runs."""
    if getattr(model, "outputs", None):
        return _slots(tensors_of(model, "output"))
    shape = _build_shape(model)
    if shape is None:
        return None
    result = model(np.zeros((1, *(size or 1 for size in shape)), keras.config.floatx()))
    names = _names_in(result)
    return _slots(dict(zip(names, outputs_in_order(result, names), strict=True)))


def tensors_of(model: keras.Model, kind: str) -> dict[str, Any]:
    """The symbolic tensors of a functional or Sequential model by their names.

    Args:
        kind: "input" or "output".
    """
    # A Sequential model has no `input`, unless it was called on a symbolic one.
    structure = None if isinstance(model, keras.Sequential) else getattr(model, kind)
    if isinstance(structure, dict):
        return dict(structure)
    if kind == "input":
        return {tensor.name: tensor for tensor in model.inputs}
    names = [""] if len(model.outputs) == 1 else model.output_names
    return dict(zip(names, model.outputs, strict=True))


def sub_model(model: keras.Model, layer: str, *, with_outputs: bool) -> keras.Model:
    """A model with the same weights that returns a list: the outputs of `model` if wanted, and that of a layer, the last.

    Its inputs are a list in the order of `inputs_of`.

    Raises:
        ConfigError: See `layer_of`.
    """
    wanted = layer_of(model, layer)
    outputs = list(tensors_of(model, "output").values()) if with_outputs else []
    return keras.Model(list(tensors_of(model, "input").values()), [*outputs, wanted])


def layer_model(model: keras.Model, layer: str) -> keras.Model:
    """A model with the same weights and the same inputs whose output is that of a layer.

    Raises:
        ConfigError: See `layer_of`.
    """
    wanted = layer_of(model, layer)
    return keras.Model(model.inputs if isinstance(model, keras.Sequential) else model.input, wanted)


def outputs_in_order(result: Any, names: Iterable[str]) -> list[Any]:
    """The arrays that a model returned, in the order of the names of `outputs_of`."""
    if isinstance(result, dict):
        return [result[name] for name in names]
    return list(result) if isinstance(result, (list, tuple)) else [result]


def feature_forms(model: keras.Model, columns: Sequence[str], scalar: Container[str]) -> tuple[ArrayForm, ...]:
    """Which columns make which input, and what they must be.

    Of a model with one input, all columns together make one vector, unless it is one column. With several inputs, each
    takes one column: the one with its name if all names are equal, else the one at its place. Where the inputs are not
    known, columns of numbers make one vector, and others a dict by their names.

    Args:
        scalar: The columns that hold plain numbers.

    Raises:
        ConfigError: The numbers of columns and inputs differ.
    """
    inputs = inputs_of(model)
    if inputs is None:
        if len(columns) > 1 and not all(name in scalar for name in columns):
            return tuple(ArrayForm(name, (name,)) for name in columns)
        return (ArrayForm("", tuple(columns)),)
    if len(inputs) == 1:
        return (_form_of(inputs[0], tuple(columns)),)
    names = [slot.name for slot in inputs]
    if len(columns) != len(inputs):
        raise ConfigError(
            f"the model has {len(inputs)} inputs {names}, but the features are in {len(columns)} column"
            f"{'s' * (len(columns) != 1)} {list(columns)}: name one column per input in featuresCols."
        )
    ordered = matched(columns, names)
    return tuple(_form_of(slot, (column,)) for slot, column in zip(inputs, ordered, strict=True))


def matched(columns: Sequence[str], names: Sequence[str]) -> Sequence[str]:
    """The column of each input or output, as many as there are: that of its name if all names are equal, else by place."""
    return names if set(columns) == set(names) else columns


def layer_of(model: keras.Model, name: str) -> Any:
    """The output tensor of a named layer.

    Raises:
        ConfigError: There is no such layer, the model is no functional or Sequential one, or the layer has several
            outputs in it.
    """
    if not getattr(model, "inputs", None):
        raise ConfigError(
            f"the output of the layer {name!r} can be had of functional and Sequential models only, whose layers Keras knows "
            f"the connections of; {type(model).__name__} is neither, or is not built."
        )
    layers = {layer.name: layer for layer in model.layers}
    if name not in layers:
        raise ConfigError(f"the model has no layer {name!r}; its layers are {list(layers)}.")
    # Not `layer.output`: a layer may have been used in other models before this one.
    graph = model._functional if isinstance(model, keras.Sequential) else model
    nodes = [node for nodes in graph._nodes_by_depth.values() for node in nodes]
    outputs = [tensor for node in nodes if node.operation is layers[name] for tensor in node.output_tensors]
    if len(outputs) != 1:
        raise ConfigError(
            f"the layer {name!r} has {len(outputs)} outputs in this model: it is used several times, or returns several "
            "tensors. Name a layer with one."
        )
    return outputs[0]


def _form_of(slot: Slot, columns: tuple[str, ...]) -> ArrayForm:
    owner = f"the model's input {slot.name!r}" if slot.name else "the model"
    numeric = slot.dtype != "string"
    return ArrayForm(slot.name, columns, slot.shape, _numpy_name(slot.dtype) if numeric else None, owner=owner)


def _numpy_name(dtype: str) -> str:
    """The dtype in which values for this dtype can be sent: numpy has no bfloat16."""
    return "float32" if dtype in ("bfloat16", "float16") else dtype


def _slots(tensors: Mapping[str, Any]) -> tuple[Slot, ...]:
    return tuple(
        Slot(name if len(tensors) > 1 else "", tuple(tensor.shape[1:]), keras.backend.standardize_dtype(tensor.dtype))
        for name, tensor in tensors.items()
    )


def _names_in(result: Any) -> list[str]:
    if isinstance(result, dict):
        return list(result)
    return names_of_list(len(result)) if isinstance(result, (list, tuple)) else [""]


def names_of_list(count: int) -> list[str]:
    """What the outputs of a model are called that returns a list and gives them no names."""
    return [f"output_{index}" for index in range(count)]


def _build_shape(model: keras.Model) -> tuple[int | None, ...] | None:
    shape = (model.get_build_config() or {}).get("input_shape") if model.built else None
    is_one = isinstance(shape, (tuple, list)) and all(size is None or isinstance(size, int) for size in shape)
    return tuple(shape[1:]) if shape is not None and is_one else None
