"""Models as dicts, and weights as bytes."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from allreduce_spark.errors import DataError
from allreduce_spark.training.models.architecture import model_from_json

if TYPE_CHECKING:
    import keras

__all__ = ["bytes_to_weights", "dict_to_model", "model_to_dict", "weights_to_bytes"]


def model_to_dict(model: keras.Model) -> dict[str, Any]:
    """The architecture as JSON text, "model", and the arrays "weights"."""
    return {"model": model.to_json(), "weights": model.get_weights()}


def dict_to_model(_dict: Mapping[str, Any], custom_objects: Mapping[str, Any] | None = None) -> keras.Model:
    """The model of which `model_to_dict` made this; it is not compiled.

    Raises:
        ConfigError: Keras cannot build the model.
    """
    model = model_from_json(_dict["model"], custom_objects)
    model.set_weights(_dict["weights"])
    return model


def weights_to_bytes(weights: Sequence[np.ndarray]) -> bytes:
    """Arrays as bytes, little-endian: their count as uint32, then for each array the number of its dimensions as uint8, its
    shape as int64, the name of its dtype with its length as uint16, and its values with their length as uint64.
    """
    parts = [struct.pack("<I", len(weights))]
    for weight in weights:
        array = np.asarray(weight)
        name, values = str(array.dtype).encode("ascii"), array.tobytes()
        parts.append(struct.pack(f"<B{array.ndim}qH", array.ndim, *array.shape, len(name)))
        parts += [name, struct.pack("<Q", len(values)), values]
    return b"".join(parts)


def bytes_to_weights(b: bytes) -> list[np.ndarray]:
    """The arrays that `weights_to_bytes` wrote, each with memory of its own.

    Raises:
        DataError: The bytes are something else, or not all of them.

    >>> bytes_to_weights(weights_to_bytes([np.array([1.5, 2.5])]))
    [array([1.5, 2.5])]
    """
    position = 0

    def take(length: int) -> bytes:
        nonlocal position
        position += length
        if position > len(b):
            raise DataError(f"the bytes end after {len(b)}, but their next part ends at {position}")
        return bytes(b[position - length : position])

    def number(form: str) -> int:
        return int(struct.unpack("<" + form, take(struct.calcsize("<" + form)))[0])

    arrays = []
    for _ in range(number("I")):
        shape = [number("q") for _ in range(number("B"))]
        name = take(number("H")).decode("ascii", "replace")
        try:
            array = np.frombuffer(take(number("Q")), np.dtype(name)).reshape(shape)
        except (TypeError, ValueError) as error:
            raise DataError(f"the bytes hold no array of dtype {name!r} and shape {shape}: {error}") from error
        arrays.append(array.copy())
    return arrays
