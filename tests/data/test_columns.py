"""Columns of a table become arrays of the form that is asked for, or a row and a value are named. Also the way back."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest

from allreduce_spark.data.cells import lists, numbers, vectors
from allreduce_spark.data.columns import check_columns, read_columns
from allreduce_spark.data.flat import RowError, null_rows
from allreduce_spark.data.forms import ArrayForm, TableForm
from allreduce_spark.errors import DataError

VECTOR = pa.struct(
    [("type", pa.int8()), ("size", pa.int32()), ("indices", pa.list_(pa.int32())), ("values", pa.list_(pa.float64()))]
)
DENSE = {"type": 1, "size": None, "indices": None, "values": [0.5, 0.0, 2.0]}
SPARSE = {"type": 0, "size": 3, "indices": [0, 2], "values": [3.0, 4.0]}
EMPTY = {"type": 0, "size": 3, "indices": [], "values": []}


def read(columns, *forms, invalid="keep", labels=(), known=None, start=0):
    """The arrays of the forms, of the rows from `start` on."""
    batch = pa.record_batch(columns).slice(start)
    form = TableForm(forms, labels, invalid=invalid)
    check_columns(batch.schema, form)
    kept, values = read_columns(batch, form, {} if known is None else known)
    return [value.array(kept.num_rows) for value in values]


def test_vectors_are_filled_with_zeros_where_they_are_sparse():
    column = pa.array([DENSE, SPARSE, EMPTY, DENSE, SPARSE], VECTOR)
    expected = [[0.5, 0, 2], [3, 0, 4], [0, 0, 0], [0.5, 0, 2], [3, 0, 4]]
    for start in range(5):  # a slice of a batch has offsets
        (array,) = read({"v": column}, ArrayForm("", ("v",)), start=start)
        np.testing.assert_array_equal(array, expected[start:])
    (array,) = read({"v": pa.array([DENSE, DENSE], VECTOR)}, ArrayForm("", ("v",), (3,), "float32"))
    assert array.dtype == np.float32
    (array,) = read({"v": pa.array([EMPTY, EMPTY], VECTOR)}, ArrayForm("", ("v",)))
    np.testing.assert_array_equal(array, np.zeros((2, 3)))


@pytest.mark.parametrize("dtype", ["uint8", "float32", "float64"])
@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_bytes_take_the_shape_of_the_input(dtype, kind):
    images = np.arange(24, dtype=dtype).reshape(4, 2, 3)
    column = pa.array([image.tobytes() for image in images], kind)
    (array,) = read({"b": column}, ArrayForm("", ("b",), (2, 3)), start=1)
    assert array.dtype == dtype
    np.testing.assert_array_equal(array, images[1:])


def test_columns_are_put_together_in_their_order_and_flat_values_take_the_shape():
    columns = {"a": pa.array([1, 2]), "b": pa.array([True, False]), "v": pa.array([DENSE, SPARSE], VECTOR)}
    (array,) = read(columns, ArrayForm("", ("v", "a", "b"), (5,), "float32"))
    np.testing.assert_array_equal(array, np.float32([[0.5, 0, 2, 1, 1], [3, 0, 4, 2, 0]]))
    nested, flat = pa.array([[[1, 2], [3, 4]]]), pa.array([[1, 2, 3, 4]])
    for column in (nested, flat):
        (array,) = read({"f": column}, ArrayForm("", ("f",), (2, 2)))
        assert array.tolist() == [[[1, 2], [3, 4]]]
    (array,) = read({"f": nested}, ArrayForm("", ("f",), (None, 2)))
    assert array.shape == (1, 2, 2)


def test_labels_become_one_hot_vectors():
    label = ArrayForm("", ("l",), (), limits=(0, 2), whole=True, one_hot=3)
    for column in (pa.array([2, 0]), pa.array([2.0, 0.0]), pa.array([[2], [0]])):
        _, array = read({"f": pa.array([1, 1]), "l": column}, ArrayForm("", ("f",)), labels=(label,))
        assert array.tolist() == [[0, 0, 1], [1, 0, 0]]


def test_narrower_values_travel_as_they_are():
    (array,) = read({"f": pa.array([[1, 2]], pa.list_(pa.uint8()))}, ArrayForm("", ("f",), (2,), "float32"))
    assert array.dtype == np.uint8


NESTED = pa.list_(pa.list_(pa.float64()))


def test_rows_with_a_null_at_any_depth_are_found():
    column = pa.array([[[1.0], []], None, [[2.0], None], [], [[None], [1.0]], [[3.0]]], NESTED)
    assert null_rows(column).tolist() == [False, True, True, False, True, False]
    assert null_rows(column.slice(2)).tolist() == [True, False, True, False]
    fixed = pa.array([[1.0, None], None, [1.0, 2.0]], pa.list_(pa.float64(), 2))
    assert null_rows(fixed).tolist() == [True, True, False]


def test_invalid_rows_are_left_out_of_all_columns_alike():
    columns = {
        "f": pa.array([[1.0, 1.0], None, [3.0, math.nan], [4.0, None], [5.0, 5.0], [6.0, 6.0]]),
        "l": pa.array([1.0, 2.0, 3.0, 4.0, None, 6.0]),
    }
    form = TableForm((ArrayForm("", ("f",)),), (ArrayForm("", ("l",)),), invalid="skip")
    kept, values = read_columns(pa.record_batch(columns), form, {})
    assert kept.to_pydict() == {"f": [[1.0, 1.0], [6.0, 6.0]], "l": [1.0, 6.0]}
    assert [value.array(2).tolist() for value in values] == [[[1, 1], [6, 6]], [1, 6]]
    kept, values = read_columns(pa.record_batch(columns).slice(1, 2), form, {})
    assert (kept.num_rows, values) == (0, [])


def label(limits=None, whole=False, shape=(), one_hot=0, owner="the model"):
    return ArrayForm("", ("c",), shape, limits=limits, whole=whole, one_hot=one_hot, owner=owner)


@pytest.mark.parametrize(
    ("values", "form", "row", "message"),
    [
        (pa.array([0, 1, 3]), label((0, 2), True), 2, "has the value 3, but the model takes whole numbers from 0 to 2"),
        (pa.array([0, -1, 3]), label((0, 2), True, one_hot=3), 1, "has the value -1"),
        (pa.array([0, 0.5, 1]), label((0, 2), True), 1, "has the value 0.5"),
        (pa.array([0, math.nan, 1]), label((0, 2), True), 1, "has the value nan"),
        (pa.array([0.2, 1.5]), label((0, 1)), 1, "has the value 1.5, but the model takes numbers from 0 to 1"),
        (pa.array([1.0, -2.0]), label((0, math.inf), owner="the loss"), 1, "the loss takes numbers of at least 0"),
        (pa.array([[0, 1], [1, 9]]), label((0, 1), True, (2,)), 1, "has the value 9"),
        (pa.array([[0, 1], [1, 9]]), label((0, 1), True), 0, "vectors of length 2, but the model takes a single number"),
        (pa.array([[1.0, 2.0]]), label(shape=(3,)), 0, "vectors of length 2, but the model takes vectors of length 3"),
        (pa.array([[[1.0, 2.0]]]), label(shape=(None, 3)), 0, r"arrays of shape \(1, 2\), .* shape \(None, 3\)"),
        (pa.array([DENSE, {**SPARSE, "size": 4}], VECTOR), label(shape=None), 1, "vector of length 4, but of length 3"),
        (pa.array([DENSE, None], VECTOR), label(shape=None), 1, "has a null"),
        (pa.array([b"12", None]), label(shape=(2,)), 1, "has a null"),
        (pa.array([b"12", b"123"]), label(shape=(2,)), 1, "has 3 bytes.* expected 2 bytes .uint8., 8 .float32. or 16"),
    ],
)  # fmt: skip
def test_a_value_that_is_not_allowed_is_named_with_its_row(values, form, row, message):
    with pytest.raises(RowError, match=f"^column 'c' .*{message}") as caught:
        read({"c": values}, form)
    assert caught.value.row == row


@pytest.mark.parametrize("column", [[0.5, math.nan], [[0.5, 0.5], [math.nan, 1.0]]])
def test_a_nan_is_refused_or_kept(column):
    form = ArrayForm("", ("c",))
    with pytest.raises(RowError, match=r"^column 'c' has a NaN") as caught:
        read({"c": pa.array(column)}, form, invalid="error")
    assert caught.value.row == 1
    assert np.isnan(read({"c": pa.array(column)}, form)[0]).sum() == 1
    with pytest.raises(RowError, match=r"^column 'c' has a NaN"):
        read({"b": pa.array([1, 2]), "c": pa.array(column)}, ArrayForm("", ("b", "c")), invalid="error")


def test_what_the_types_alone_show_is_refused_before_there_are_rows():
    def check(form, **kinds):
        check_columns(pa.schema(list(kinds.items())), TableForm((form,)))

    with pytest.raises(DataError, match="column 'n' has a single number, but the input takes vectors of length 2"):
        check(ArrayForm("", ("n",), (2,), owner="the input"), n=pa.int64())
    with pytest.raises(
        DataError, match=r"the columns 'n', 'm' together make vectors of length 2, but .* arrays of shape \(1, 3\)"
    ):
        check(ArrayForm("", ("n", "m"), (1, 3)), n=pa.int64(), m=pa.float32())
    with pytest.raises(DataError, match="column 's' is a string; the model takes numbers"):
        check(ArrayForm("", ("s",), (1,), "float32"), s=pa.string())
    with pytest.raises(DataError, match=r"column 'b' is of type binary.* decode the bytes"):
        check(ArrayForm("", ("b",), (None, 3)), b=pa.binary())
    check(ArrayForm("", ("n", "v"), (4,)), n=pa.int64(), v=VECTOR)


def test_arrays_become_cells():
    values = np.arange(12, dtype="float32").reshape(2, 3, 2)
    assert lists(values).to_pylist() == values.tolist()
    assert lists(values[:0]).to_pylist() == []
    assert lists(np.zeros((2, 0))).to_pylist() == [[], []]
    assert numbers(np.array([True, False])).to_pylist() == [1.0, 0.0]
    vector = vectors(values)
    assert vector.type == VECTOR
    assert vector.to_pylist() == [{**DENSE, "values": row.reshape(-1).tolist()} for row in values]
    np.testing.assert_array_equal(read({"v": vector}, ArrayForm("", ("v",)))[0], values.reshape(2, 6))
