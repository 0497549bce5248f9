"""One column of an Arrow record batch -> its values in one line, and the shape that they have in a row. No loop over rows.

A column may hold numbers, bool, strings, (nested) lists of one of them, Spark's vectors, dense and sparse, and raw bytes
where the form says of which shape they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as types

from allreduce_spark.data.forms import ArrayForm
from allreduce_spark.data.spec import STRING
from allreduce_spark.errors import DataError

__all__ = [
    "RowError",
    "Values",
    "described",
    "flat_column",
    "is_bytes",
    "is_list",
    "is_string",
    "is_vector",
    "null_rows",
    "value_type",
]

_VECTOR = ("type", "size", "indices", "values")
_SPARSE = 0
_DTYPE_OF_BYTES = {1: "uint8", 4: "float32", 8: "float64"}


class RowError(DataError):
    """A row of a batch is not what it must be.

    Attributes:
        row: Its index in the batch.
    """

    def __init__(self, message: str, row: int) -> None:
        super().__init__(message)
        self.row = row


@dataclass(frozen=True)
class Values:
    """The values of one array form in all rows of a batch.

    Attributes:
        flat: All of them in one line: a numpy array, or an Arrow array of strings.
        shape: The shape in one row.
    """

    flat: Any
    shape: tuple[int, ...]

    @property
    def dtype(self) -> str:
        return self.flat.dtype.name if isinstance(self.flat, np.ndarray) else STRING

    def array(self, rows: int) -> np.ndarray:
        """Shape (rows, *shape); strings as objects."""
        flat = self.flat if isinstance(self.flat, np.ndarray) else self.flat.to_numpy(zero_copy_only=False)
        return flat.reshape(rows, *self.shape)

    def arrow(self) -> pa.Array:
        """The flat values; bool as uint8, strings with 64-bit offsets."""
        if not isinstance(self.flat, np.ndarray):
            return self.flat.cast(pa.large_string())
        return pa.array(self.flat.view(np.uint8) if self.flat.dtype == bool else self.flat)


def flat_column(array: pa.Array, name: str, form: ArrayForm, known: dict[str, Values]) -> Values:
    """The values of a column without their lists; all lists of one depth must be of one length."""
    if is_bytes(array.type):
        values = _from_bytes(array, name, form, known[name].dtype if name in known else None)
        known.setdefault(name, Values(values.flat[:0], values.shape))
        return values
    expected = known[name].shape if name in known else None
    shape: tuple[int, ...] = ()
    while True:
        if types.is_dictionary(array.type):
            array = array.dictionary_decode()
        per_row = max(1, int(np.prod(shape, dtype=np.int64)))
        if array.null_count:
            row = int(np.argmax(array.is_null().to_numpy(zero_copy_only=False))) // per_row
            within = " inside a list" if shape else ""
            raise RowError(f"column {name!r} has a null{within}; drop such rows or fill in a value first", row)
        if is_vector(array.type):
            values = _from_vectors(array, name, expected)
            break
        if not is_list(array.type):
            values = Values(_plain(array), shape)
            break
        lengths = pc.list_value_length(array).to_numpy()
        usual = expected[len(shape)] if expected is not None else int(lengths[0]) if len(lengths) else 0
        _check_lengths(lengths, usual, name, "list", per_row)
        shape += (usual,)
        array = array.flatten()
    known.setdefault(name, Values(values.flat[:0], values.shape))
    return values


def _check_lengths(lengths: np.ndarray, usual: int, name: str, what: str, per_row: int = 1) -> None:
    wrong = np.flatnonzero(lengths != usual)
    if len(wrong):
        raise RowError(
            f"column {name!r} has a {what} of length {lengths[wrong[0]]}, but of length {usual} in row 0; "
            "all rows need the same length: pad or cut them first",
            int(wrong[0]) // per_row,
        )


def _from_vectors(array: pa.Array, name: str, expected: tuple[int, ...] | None) -> Values:
    """Spark's vectors, which travel as structs (type, size, indices, values), sparse ones among them filled with zeros."""
    kinds, sizes, indices, values = (array.field(field) for field in _VECTOR)
    sparse = kinds.to_numpy() == _SPARSE
    counts = pc.list_value_length(values).to_numpy()
    flat = values.flatten().to_numpy()
    lengths = counts
    if sparse.any():
        lengths = np.where(sparse, sizes.fill_null(0).to_numpy(), counts)
    usual = expected[0] if expected is not None else int(lengths[0]) if len(lengths) else 0
    _check_lengths(lengths, usual, name, "vector")
    if not sparse.any():
        return Values(flat, (usual,))
    dense = np.zeros((len(array), usual), flat.dtype)
    of_sparse = np.repeat(sparse, counts)
    dense[np.repeat(np.flatnonzero(sparse), counts[sparse]), indices.filter(pa.array(sparse)).flatten().to_numpy()] = (
        flat[of_sparse]
    )
    dense[~sparse] = flat[~of_sparse].reshape(-1, usual)
    return Values(dense.reshape(-1), (usual,))


def _from_bytes(array: pa.Array, name: str, form: ArrayForm, expected: str | None) -> Values:
    """Raw values in C order. How many bytes one has tells its dtype: 1 is uint8, 4 is float32, 8 is float64."""
    shape = form.fixed_shape
    assert shape is not None  # check_columns has seen to it
    if array.null_count:
        row = int(np.argmax(array.is_null().to_numpy(zero_copy_only=False)))
        raise RowError(f"column {name!r} has a null; drop such rows or fill in a value first", row)
    count = max(1, int(np.prod(shape, dtype=np.int64)))
    lengths = pc.binary_length(array).to_numpy()
    dtype = np.dtype(expected or _DTYPE_OF_BYTES.get(int(lengths[0]) // count, "uint8"))
    wrong = np.flatnonzero(lengths != count * dtype.itemsize)
    if len(wrong):
        raise RowError(
            f"column {name!r} has {lengths[wrong[0]]} bytes, but {form.owner} takes {described(shape)}: expected {count} "
            f"bytes (uint8), {4 * count} (float32) or {8 * count} (float64), the same in all rows",
            int(wrong[0]),
        )
    return Values(_joined_bytes(array, int(lengths.sum()), dtype), shape)


def _joined_bytes(array: pa.Array, size: int, dtype: np.dtype) -> np.ndarray:
    """The bytes of all rows, which follow one another in the buffer of an Arrow array; not copied."""
    wide = array.cast(pa.large_binary())
    _, offsets, data = wide.buffers()
    start = int(np.frombuffer(offsets, np.int64, 1, wide.offset * 8)[0])
    return np.frombuffer(data, dtype, size // dtype.itemsize, start)


def null_rows(array: pa.Array) -> np.ndarray:
    """Which rows are null or hold a null, at any depth; shape (rows,), bool."""
    own = np.asarray(array.is_null().to_numpy(zero_copy_only=False))
    if not is_list(array.type) or len(array) == 0:
        return own
    within = null_rows(array.flatten())  # skips what null lists hold
    if within.any():
        lengths = pc.list_value_length(array).fill_null(0).to_numpy()
        own = own.copy()
        own[np.repeat(np.arange(len(array)), lengths)[within]] = True
    return own


def is_list(kind: pa.DataType) -> bool:
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def is_string(kind: pa.DataType) -> bool:
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def is_bytes(kind: pa.DataType) -> bool:
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind)


def is_vector(kind: pa.DataType) -> bool:
    return types.is_struct(kind) and tuple(field.name for field in kind) == _VECTOR


def value_type(kind: pa.DataType) -> pa.DataType:
    """The type of the values inside all lists; a dictionary of plain values counts as its values."""
    while is_list(kind):
        kind = kind.value_type
    return kind.value_type if types.is_dictionary(kind) and not is_list(kind.value_type) else kind


def _plain(array: pa.Array) -> Any:
    """Numbers as numpy, without a copy but for bool, which Arrow packs into bits; strings as they are."""
    if is_string(array.type):
        return array
    return array.to_numpy(zero_copy_only=not types.is_boolean(array.type))


def described(shape: tuple[int | None, ...]) -> str:
    if shape == ():
        return "a single number"
    return f"vectors of length {shape[0]}" if len(shape) == 1 else f"arrays of shape {shape}"
