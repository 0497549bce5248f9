"""Plain Python values as JSON and arrays, and back: what callbacks remember, the history, random states. Nothing is code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["NotPlain", "pack", "unpack"]

_ATOMS = (type(None), bool, int, float, str)
SMALL_BYTES = (
    1024  # arrays of so many bytes are part of the JSON value, so that the larger ones are the same all the time
)


class NotPlain(TypeError):
    """A value that is neither a number, a string, a numpy array, nor a list, tuple or dict of such values."""


def pack(value: Any, name: str, arrays: dict[str, np.ndarray]) -> Any:
    """Take a value apart; what is mutable, arrays excepted, is copied.

    Args:
        value: None, a bool, an int, a float, a str, a numpy array or scalar, or a list, tuple or dict of such.
        name: The arrays in it get names that begin with this.
        arrays: The larger arrays are added here, as they are.

    Returns:
        A JSON value that `unpack` understands.

    Raises:
        NotPlain: The value is something else. `arrays` may then hold some that are of no use.

    >>> pack((1, {"a": [None]}), "x", {})
    {'tuple': [1, {'dict': [['a', [None]]]}]}
    """
    if type(value) in _ATOMS:
        return value
    if type(value) is list:
        return [pack(item, f"{name}/{index}", arrays) for index, item in enumerate(value)]
    if type(value) is tuple:
        return {"tuple": pack(list(value), name, arrays)}
    if type(value) is dict and all(type(key) in _ATOMS for key in value):
        items = enumerate(value.items())
        return {"dict": [[key, pack(item, f"{name}/{index}", arrays)] for index, (key, item) in items]}
    if type(value) is np.ndarray or isinstance(value, np.generic):
        array = np.asarray(value)
        # The types of ml_dtypes (bfloat16, float8) are of numpy's kind "V", as are records, which have no such name.
        kind = "array" if type(value) is np.ndarray else "scalar"
        if array.dtype.kind in "biuf" and array.nbytes <= SMALL_BYTES:
            return {kind: [array.dtype.str, list(array.shape), array.tobytes().hex()]}
        if array.dtype.kind in "biuf" or (array.dtype.kind == "V" and "float" in array.dtype.name):
            arrays[name] = array
            return {kind: name}
    raise NotPlain(f"{type(value).__name__} is no plain value")


def unpack(packed: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    """The way back from `pack`; arrays are copies."""
    if isinstance(packed, list):
        return [unpack(item, arrays) for item in packed]
    if not isinstance(packed, dict):
        return packed
    ((kind, content),) = packed.items()
    match kind:
        case "tuple":
            return tuple(unpack(content, arrays))
        case "dict":
            return {key: unpack(item, arrays) for key, item in content}
        case "array":
            return np.array(_array(content, arrays))
        case _:
            return _array(content, arrays)[()]


def _array(content: Any, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    if isinstance(content, str):
        return arrays[content]
    dtype, shape, data = content
    return np.frombuffer(bytes.fromhex(data), dtype).reshape(shape)
