"""Columns of an Arrow record batch -> numpy arrays of the form that is asked for. No loop over rows.

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

from allreduce_spark.data.forms import ArrayForm, TableForm
from allreduce_spark.data.spec import STRING
from allreduce_spark.errors import DataError

__all__ = ["RowError", "Values", "check_columns", "read_columns"]

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


def check_columns(schema: pa.Schema, form: TableForm) -> None:
    """Refuse columns that can be seen to be unfit from their types alone: on the driver, before any task starts.

    Raises:
        DataError: A column is missing or named twice, or its type cannot be made into what is asked for.
    """
    if not form.x:
        raise DataError("no feature column is named: name at least one")
    for part in (form.x, (*form.y, *([form.weight] if form.weight else ()))):
        for array in part:
            for name in array.columns:
                if schema.names.count(name) != 1:
                    problem = "there is no column" if name not in schema.names else "there are several columns"
                    raise DataError(f"{problem} {name!r}; the columns are {schema.names}")
                _check_type(schema.field(name).type, name, array, allow_strings=part is form.x)
    for array in form.arrays:
        _check_count(schema, array)
    for part in (form.x, form.y):
        names = [name for array in part for name in array.columns]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise DataError(f"the column {twice!r} is named twice in {names}")


def read_columns(
    batch: pa.RecordBatch, form: TableForm, known: dict[str, Values]
) -> tuple[pa.RecordBatch, list[Values]]:
    """Read what a form asks for.

    Args:
        batch: Its schema has passed `check_columns`.
        form: What to make of it.
        known: Per column, what its values are like in earlier batches; what is new is added to it.

    Returns:
        The batch without the rows that are left out, and the values of its rows per array of `form.arrays`; of no rows, none.

    Raises:
        RowError: A row is not what it must be.
    """
    if form.invalid == "skip":
        batch = _without(batch, np.logical_or.reduce([null_rows(batch.column(name)) for name in form.columns]))
    if batch.num_rows == 0:
        return batch, []
    read = [_read(batch, array, known) for array in form.arrays]
    if form.invalid != "keep":
        bad = [_nan_rows(values, batch.num_rows) for values in read]
        if form.invalid == "skip" and np.any(bad):
            return read_columns(_without(batch, np.logical_or.reduce(bad)), form, known)
        for array, rows in zip(form.arrays, bad, strict=True):
            if rows.any():
                row = int(np.argmax(rows))
                name = _first_with_nan(batch.slice(row, 1), array, known)
                raise RowError(f"column {name!r} has a NaN; drop such rows or fill in a value first", row)
    return batch, [_shaped(values, array, batch.num_rows) for values, array in zip(read, form.arrays, strict=True)]


def null_rows(array: pa.Array) -> np.ndarray:
    """Which rows are null or hold a null, at any depth; shape (rows,), bool."""
    own = np.asarray(array.is_null().to_numpy(zero_copy_only=False))
    if not _is_list(array.type) or len(array) == 0:
        return own
    within = null_rows(array.flatten())  # skips what null lists hold
    if within.any():
        lengths = pc.list_value_length(array).fill_null(0).to_numpy()
        own = own.copy()
        own[np.repeat(np.arange(len(array)), lengths)[within]] = True
    return own


def _without(batch: pa.RecordBatch, unwanted: np.ndarray) -> pa.RecordBatch:
    return batch.filter(pa.array(~unwanted)) if unwanted.any() else batch


def _nan_rows(values: Values, rows: int) -> np.ndarray:
    if isinstance(values.flat, np.ndarray) and values.flat.dtype.kind == "f":
        return np.asarray(np.isnan(values.flat).reshape(rows, -1).any(axis=1))
    return np.zeros(rows, bool)


def _first_with_nan(row: pa.RecordBatch, form: ArrayForm, known: dict[str, Values]) -> str:
    """Which of the columns of a form it is."""
    found = (name for name in form.columns if _nan_rows(_flat_column(row.column(name), name, form, known), 1)[0])
    return next(found)


def _read(batch: pa.RecordBatch, form: ArrayForm, known: dict[str, Values]) -> Values:
    """The values of the columns of one form, as they are."""
    parts = [_flat_column(batch.column(name), name, form, known) for name in form.columns]
    if len(parts) == 1:
        return parts[0]
    strings = next((name for name, part in zip(form.columns, parts, strict=True) if part.dtype == STRING), None)
    if strings is not None:
        raise DataError(f"column {strings!r} is a string, which cannot be one of several columns of one vector")
    assembled = np.concatenate([part.flat.reshape(batch.num_rows, -1) for part in parts], axis=1)
    return Values(assembled.reshape(-1), (assembled.shape[1],))


def _shaped(values: Values, form: ArrayForm, rows: int) -> Values:
    """Give values the shape and the dtype that are asked for, and look whether they are allowed."""
    shape = values.shape
    if form.shape is not None and not _fits(shape, form.shape):
        fixed = form.fixed_shape
        if fixed is None or int(np.prod(fixed)) != int(np.prod(shape)):
            raise RowError(_misfit(form, shape), 0)
        shape = fixed
    if form.limits is not None:
        _check_limits(values, form)
    if form.one_hot:
        hot = np.zeros((rows, form.one_hot), "float32")
        hot[np.arange(rows), values.flat.astype(np.int64)] = 1
        return Values(hot.reshape(-1), (form.one_hot,))
    flat = values.flat
    if form.dtype is not None and isinstance(flat, np.ndarray) and flat.itemsize > np.dtype(form.dtype).itemsize:
        flat = flat.astype(form.dtype)
    return Values(flat, shape)


def _check_limits(values: Values, form: ArrayForm) -> None:
    assert form.limits is not None
    flat = values.flat
    least, greatest = form.limits
    with np.errstate(invalid="ignore"):
        right = (flat >= least) & (flat <= greatest)
        if form.whole:
            right &= flat == np.floor(flat)
    if not right.all():
        place = int(np.argmin(right))
        kind = "whole numbers" if form.whole else "numbers"
        bounds = f"from {least:g} to {greatest:g}" if greatest < np.inf else f"of at least {least:g}"
        per_row = max(1, int(np.prod(values.shape, dtype=np.int64)))
        raise RowError(
            f"column {form.columns[0]!r} has the value {float(flat[place]):g}, but {form.owner} takes {kind} {bounds}",
            place // per_row,
        )


def _fits(shape: tuple[int, ...], expected: tuple[int | None, ...]) -> bool:
    return len(shape) == len(expected) and all(
        size in (None, given) for size, given in zip(expected, shape, strict=True)
    )


def _described(shape: tuple[int | None, ...]) -> str:
    if shape == ():
        return "a single number"
    return f"vectors of length {shape[0]}" if len(shape) == 1 else f"arrays of shape {shape}"


def _misfit(form: ArrayForm, shape: tuple[int, ...]) -> str:
    assert form.shape is not None
    found = f"column {form.columns[0]!r} has {_described(shape)}"
    if len(form.columns) > 1:
        found = f"the columns {', '.join(map(repr, form.columns))} together make {_described(shape)}"
    return f"{found}, but {form.owner} takes {_described(form.shape)}"


def _flat_column(array: pa.Array, name: str, form: ArrayForm, known: dict[str, Values]) -> Values:
    """The values of a column without their lists; all lists of one depth must be of one length."""
    if _is_bytes(array.type):
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
        if _is_vector(array.type):
            values = _from_vectors(array, name, expected)
            break
        if not _is_list(array.type):
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
            f"column {name!r} has {lengths[wrong[0]]} bytes, but {form.owner} takes {_described(shape)}: expected {count} "
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


def _is_list(kind: pa.DataType) -> bool:
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _is_string(kind: pa.DataType) -> bool:
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind)


def _is_vector(kind: pa.DataType) -> bool:
    return types.is_struct(kind) and tuple(field.name for field in kind) == _VECTOR


def _value_type(kind: pa.DataType) -> pa.DataType:
    """The type of the values inside all lists; a dictionary of plain values counts as its values."""
    while _is_list(kind):
        kind = kind.value_type
    return kind.value_type if types.is_dictionary(kind) and not _is_list(kind.value_type) else kind


def _plain(array: pa.Array) -> Any:
    """Numbers as numpy, without a copy but for bool, which Arrow packs into bits; strings as they are."""
    if _is_string(array.type):
        return array
    return array.to_numpy(zero_copy_only=not types.is_boolean(array.type))


def _check_type(kind: pa.DataType, name: str, form: ArrayForm, *, allow_strings: bool) -> None:
    value = _value_type(kind)
    if types.is_boolean(value) or types.is_integer(value) or types.is_floating(value) or _is_vector(kind):
        return
    if _is_bytes(kind) and form.fixed_shape is not None and len(form.columns) == 1:
        return
    if _is_string(value):
        if allow_strings and form.dtype is None:
            return
        needs = f"{form.owner} takes numbers" if allow_strings else "labels and weights must be numbers"
        raise DataError(f"column {name!r} is a string; {needs}: encode them first, e.g. with StringIndexer")
    raise DataError(f"column {name!r} is of type {kind}, which cannot be trained on; {_hint(value)}")


def _check_count(schema: pa.Schema, form: ArrayForm) -> None:
    """How many values columns of plain numbers make is known without their rows."""
    if form.fixed_shape is None or any(schema.field(name).type.num_fields for name in form.columns):
        return
    if len(form.columns) != int(np.prod(form.fixed_shape)) and not _is_bytes(schema.field(form.columns[0]).type):
        raise DataError(_misfit(form, () if len(form.columns) == 1 else (len(form.columns),)))


def _hint(kind: pa.DataType) -> str:
    if _is_bytes(kind):
        return "decode the bytes (an image, for example) into an array of numbers first"
    if types.is_struct(kind):
        return "if it holds numbers, name its fields as columns of their own, or make an array of them first"
    if types.is_decimal(kind):
        return "cast it to double first"
    if types.is_temporal(kind):
        return "turn dates and times into numbers first, for example with unix_timestamp"
    return "expected numbers, bool, strings, or (nested) arrays of one of them"
