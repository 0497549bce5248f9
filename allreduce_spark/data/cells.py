"""Arrays of a model's outputs -> columns of an Arrow record batch: numbers, Spark's vectors, or (nested) lists."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

__all__ = ["canonical_vectors", "lists", "numbers", "vectors"]

_DENSE = 1


def numbers(values: np.ndarray) -> pa.Array:
    """Shape (rows,) as doubles."""
    return pa.array(np.ascontiguousarray(values, np.float64))


def vectors(values: np.ndarray) -> pa.Array:
    """Shape (rows, ...) as Spark's dense vectors, each row in one line: structs (type, size, indices, values)."""
    rows = len(values)
    parts = [
        pa.array(np.full(rows, _DENSE, np.int8)),
        pa.nulls(rows, pa.int32()),
        pa.nulls(rows, pa.list_(pa.int32())),
        lists(values.reshape(rows, -1)),
    ]
    return pa.StructArray.from_arrays(parts, names=["type", "size", "indices", "values"])


def canonical_vectors(column: pa.StructArray) -> pa.StructArray:
    """The same vectors with null for the indices of dense ones, as Spark writes them: it compares vectors by their bytes."""
    parts = {field.name: column.field(field.name) for field in column.type}
    of_sparse = pc.not_equal(parts["type"], _DENSE)
    parts["indices"] = pc.if_else(of_sparse, parts["indices"], pa.scalar(None, parts["indices"].type))
    return pa.StructArray.from_arrays(list(parts.values()), names=list(parts), mask=column.is_null())


def lists(values: np.ndarray) -> pa.Array:
    """Shape (rows, n, m, ...) as lists of lists of doubles, one level per axis after the first."""
    column = numbers(values.reshape(-1))
    for axis in range(values.ndim - 1, 0, -1):
        length = values.shape[axis]
        count = int(np.prod(values.shape[:axis], dtype=np.int64))
        column = pa.ListArray.from_arrays(pa.array(np.arange(count + 1, dtype=np.int32) * length), column)
    return column
