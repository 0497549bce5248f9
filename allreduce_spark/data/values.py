"""What may be trained on: one value of a user becomes a numpy array, or a `DataError` says why it cannot.

Allowed are bool, int8 to int64, uint8 to uint64, float16, float32, float64, and strings in x. Everything numpy would
turn into an object array (None, ragged lists, decimals), and all Keras cannot take (complex, dates, bytes), is refused.

Where two dtypes meet in one place of the rows, they follow the rule of NumPy 2 (NEP 50): numbers of Python are weak and
take the dtype of their neighbours, arrays are strong. And nothing is lost in silence: a cast that would change an
integer or make a float infinite is refused.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from allreduce_spark.data.spec import STRING, LeafSpec
from allreduce_spark.errors import DataError

__all__ = ["as_array", "cast", "check_label", "leaf_of", "to_arrow", "to_numpy"]

NUMERIC = frozenset(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)) | {
    "bool",
    "float16",
    "float32",
    "float64",
}

_HINTS = {
    "S": "decode bytes to str, or to an array of numbers, first",
    "c": "give the real and the imaginary part as two arrays",
    "M": "turn dates into numbers first, for example seconds since a fixed day",
    "m": "turn time differences into numbers first, for example seconds",
    "V": "convert it to one of the plain numpy dtypes first, for example float32",
    "f": "convert it to float64 first",
}


def as_array(value: Any, name: str) -> np.ndarray:
    """One value of a user as an array of an allowed dtype; strings as an object array of str.

    Args:
        value: A number, a string, a (nested) list of them, an array, a tensor, or a Spark vector (it has `toArray`).
        name: What to call it in messages.

    Raises:
        DataError: The value is None or holds one, is ragged, or is of a dtype that cannot be trained on.
    """
    if type(value) is np.ndarray:
        array = value
    elif isinstance(value, str):
        array = np.array(value, dtype=object)  # not through numpy's "U": it drops trailing NUL characters
    elif value is None:
        raise DataError(f"{name} is None (null); drop such rows or fill in a value before training")
    elif isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        raise DataError(f"{name} has masked elements; drop such rows or fill in a value before training")
    else:
        array = _converted(value, name)
    kind = array.dtype.kind
    if kind in "UTO":
        return _strings(array, value, name)
    if array.dtype.name not in NUMERIC:
        raise DataError(
            f"{name} has the dtype {array.dtype}, which cannot be trained on; {_HINTS.get(kind, _HINTS['V'])}"
        )
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def leaf_of(array: np.ndarray, name: str, shape: tuple[int, ...]) -> LeafSpec:
    """The spec of one array that came out of `as_array`; `shape` is its shape in one row."""
    return LeafSpec(name, STRING if array.dtype.kind == "O" else array.dtype.name, shape)


def check_label(leaf: LeafSpec) -> None:
    """Refuse strings anywhere but in x.

    Raises:
        DataError: The leaf is a string in y or sample_weight.
    """
    if leaf.dtype == STRING and not leaf.name.startswith("x"):
        raise DataError(
            f"{leaf.name} is a string; labels and weights must be numbers. Encode them first, e.g. with StringIndexer "
            "(then sparse_categorical_crossentropy) or as one-hot vectors"
        )


def cast(array: np.ndarray, dtype: np.dtype, name: str, *, weak: bool = False) -> np.ndarray:
    """Give an array the dtype of its neighbours, if nothing is lost by it.

    Args:
        array: Numeric, from `as_array`.
        dtype: The numeric dtype wanted.
        name: What to call it in messages.
        weak: Whether the value was made of Python numbers, which take the precision of any float or integer dtype.

    Raises:
        DataError: The dtypes do not mix, an integer would change, or a float would become infinite.
    """
    if array.dtype == dtype:
        return array
    same_kind = dtype.kind == "f" or (dtype.kind in "iu" and array.dtype.kind in "iub")
    if not (np.can_cast(array.dtype, dtype, "safe") or (weak and same_kind)):
        raise DataError(
            f"{name} is {array.dtype}, but {dtype} in the rows before it; "
            f"give all rows the same dtype, for example with numpy.asarray(value, dtype={array.dtype.name!r})"
        )
    with np.errstate(all="ignore"):
        result = array.astype(dtype)
        if array.dtype.kind == "f":
            changed = np.isinf(result) & ~np.isinf(array)
        else:
            changed = result.astype(array.dtype) != array
    if np.any(changed):
        raise DataError(
            f"{name} holds {array[changed].flat[0]}, which {dtype}, the dtype of the other rows, cannot hold; "
            f"give all rows a wider dtype"
        )
    return result


def to_arrow(values: np.ndarray, leaf: LeafSpec) -> pa.Array:
    """A column of shape (rows, *leaf.shape) as Arrow: a plain array for scalars, else lists of a fixed size.

    Numbers are not copied if they are contiguous. Bool travels as uint8, because Arrow's own packs eight into a byte
    and could not be mapped. Offsets of strings have 64 bits: 2 GiB of text in one chunk is no limit.
    """
    rows = len(values)
    flat = np.ascontiguousarray(values).reshape(-1)
    if leaf.dtype == STRING:
        child = pa.array(flat, pa.large_string())
    else:
        child = pa.array(flat.view(np.uint8) if leaf.dtype == "bool" else flat)
    return fixed_size_lists(child, rows, leaf)


def fixed_size_lists(child: pa.Array, rows: int, leaf: LeafSpec) -> pa.Array:
    """Fold the flat values of a column into its rows."""
    if leaf.shape == ():
        return child
    # from_buffers and not from_arrays: the latter cannot tell how many rows of zero values there are
    return pa.Array.from_buffers(pa.list_(child.type, leaf.values_per_row), rows, [None], children=[child])


def to_numpy(column: pa.Array, leaf: LeafSpec) -> np.ndarray:
    """The inverse of `to_arrow` for numbers: a read-only view of shape (rows, *leaf.shape), never a copy."""
    child = column if leaf.shape == () else column.flatten()
    values = child.to_numpy(zero_copy_only=True)
    return (values.view(np.bool_) if leaf.dtype == "bool" else values).reshape(len(column), *leaf.shape)


def _converted(value: Any, name: str) -> np.ndarray:
    try:
        return np.asarray(value.toArray() if hasattr(value, "toArray") else value)
    except Exception as error:  # the value's own __array__ may raise anything
        if isinstance(value, (list, tuple)):
            raise DataError(f"{name} is ragged: {_lengths(value)}; pad the lists to one length first") from error
        raise DataError(f"{name}, a {type(value).__name__}, cannot become a numpy array: {error}") from error


def _strings(array: np.ndarray, value: Any, name: str) -> np.ndarray:
    """Accept strings and nothing else that numpy calls an object, or would turn into text."""
    # numpy turns [1, "a"] into ["1", "a"] and drops trailing NULs: look at what the user gave
    array = np.array(value, dtype=object) if isinstance(value, (list, tuple)) else array.astype(object)
    strange = [item for item in array.flat if not isinstance(item, str)]
    if any(item is None for item in strange):
        raise DataError(f"{name} holds a None (null); drop such rows or fill in a value before training")
    if any(isinstance(item, (list, tuple, np.ndarray)) for item in strange):
        raise DataError(f"{name} is ragged: {_lengths(array.flat)}; pad the lists to one length first")
    if strange:
        raise DataError(
            f"{name} holds {repr(strange[0])[:100]} of type {type(strange[0]).__name__}; all of it must be numbers "
            "that fit a numpy dtype, or all of it strings: convert it first, for example with float()"
        )
    try:
        "".join(array.flat).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{name} holds a string that is not valid Unicode: {error}") from error
    return array


def _lengths(value: Any) -> str:
    """The first two elements of different shape, in words."""
    shapes = [_shape(item) for item in value]
    other = next((index for index, shape in enumerate(shapes) if shape != shapes[0]), None)
    if other is None:
        return "its nested lists differ in length"
    return f"element 0 has {shapes[0]}, but element {other} has {shapes[other]}"


def _shape(item: Any) -> str:
    try:
        return f"shape {np.shape(item)}"
    except ValueError:
        return "lists of different lengths"
