"""Columns of an Arrow record batch -> numpy arrays of the form that is asked for, or an error that names what is not."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.types as types

from allreduce_spark.data.flat import (
    RowError,
    Values,
    described,
    flat_column,
    is_bytes,
    is_string,
    is_vector,
    null_rows,
    value_type,
)
from allreduce_spark.data.forms import ArrayForm, TableForm
from allreduce_spark.data.spec import STRING
from allreduce_spark.errors import DataError

__all__ = ["check_columns", "read_columns"]


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


def _without(batch: pa.RecordBatch, unwanted: np.ndarray) -> pa.RecordBatch:
    return batch.filter(pa.array(~unwanted)) if unwanted.any() else batch


def _nan_rows(values: Values, rows: int) -> np.ndarray:
    if isinstance(values.flat, np.ndarray) and values.flat.dtype.kind == "f":
        return np.asarray(np.isnan(values.flat).reshape(rows, -1).any(axis=1))
    return np.zeros(rows, bool)


def _first_with_nan(row: pa.RecordBatch, form: ArrayForm, known: dict[str, Values]) -> str:
    """Which of the columns of a form it is."""
    found = (name for name in form.columns if _nan_rows(flat_column(row.column(name), name, form, known), 1)[0])
    return next(found)


def _read(batch: pa.RecordBatch, form: ArrayForm, known: dict[str, Values]) -> Values:
    """The values of the columns of one form, as they are."""
    parts = [flat_column(batch.column(name), name, form, known) for name in form.columns]
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


def _misfit(form: ArrayForm, shape: tuple[int, ...]) -> str:
    assert form.shape is not None
    found = f"column {form.columns[0]!r} has {described(shape)}"
    if len(form.columns) > 1:
        found = f"the columns {', '.join(map(repr, form.columns))} together make {described(shape)}"
    return f"{found}, but {form.owner} takes {described(form.shape)}"


def _check_type(kind: pa.DataType, name: str, form: ArrayForm, *, allow_strings: bool) -> None:
    value = value_type(kind)
    if types.is_boolean(value) or types.is_integer(value) or types.is_floating(value) or is_vector(kind):
        return
    if is_bytes(kind) and form.fixed_shape is not None and len(form.columns) == 1:
        return
    if is_string(value):
        if allow_strings and form.dtype is None:
            return
        needs = f"{form.owner} takes numbers" if allow_strings else "labels and weights must be numbers"
        raise DataError(f"column {name!r} is a string; {needs}: encode them first, e.g. with StringIndexer")
    raise DataError(f"column {name!r} is of type {kind}, which cannot be trained on; {_hint(value)}")


def _check_count(schema: pa.Schema, form: ArrayForm) -> None:
    """How many values columns of plain numbers make is known without their rows."""
    if form.fixed_shape is None or any(schema.field(name).type.num_fields for name in form.columns):
        return
    if len(form.columns) != int(np.prod(form.fixed_shape)) and not is_bytes(schema.field(form.columns[0]).type):
        raise DataError(_misfit(form, () if len(form.columns) == 1 else (len(form.columns),)))


def _hint(kind: pa.DataType) -> str:
    if is_bytes(kind):
        return "decode the bytes (an image, for example) into an array of numbers first"
    if types.is_struct(kind):
        return "if it holds numbers, name its fields as columns of their own, or make an array of them first"
    if types.is_decimal(kind):
        return "cast it to double first"
    if types.is_temporal(kind):
        return "turn dates and times into numbers first, for example with unix_timestamp"
    return "expected numbers, bool, strings, or (nested) arrays of one of them"
