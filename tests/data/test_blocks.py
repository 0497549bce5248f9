"""Rows, arrays and tables become blocks: every row in exactly one, dealt out evenly, and a bad row is named."""

from __future__ import annotations

import datetime
import decimal
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from allreduce_spark.data import (
    Block,
    ErrorBlock,
    RowSpec,
    TableForm,
    arrays_to_blocks,
    check_columns,
    common_spec,
    decode_block,
    difference,
    rows_to_blocks,
    table_to_blocks,
)
from allreduce_spark.data.rows import spec_of_row
from allreduce_spark.data.spec import LeafSpec
from allreduce_spark.data.values import to_numpy
from allreduce_spark.errors import DataError


def from_rows(rows, *, partition=0, num_shards=1, **kwargs):
    pairs = rows_to_blocks(iter(rows), partition=partition, role="train", num_shards=num_shards, **kwargs)
    return [(shard, decode_block(data)) for shard, data in pairs]


def from_table(batches, features=("f",), label=("l",), weight=None, *, partition=0, num_shards=1, **kwargs):
    form = TableForm.of_columns(features, label, weight)
    pairs = table_to_blocks(iter(batches), form, partition=partition, role="train", num_shards=num_shards, **kwargs)
    return [(shard, decode_block(data)) for shard, data in pairs]


def column(block: Block, index: int) -> np.ndarray:
    return to_numpy(block.batch.column(index), block.spec.leaves[index])


def error_of(blocks) -> ErrorBlock:
    """The error block that must be the last and only one of its kind."""
    assert [isinstance(block, ErrorBlock) for _, block in blocks] == [False] * (len(blocks) - 1) + [True]
    return blocks[-1][1]


def leaves_of(row) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(leaf.name, leaf.dtype, leaf.shape) for leaf in spec_of_row(row).leaves]


class Vector:
    """Like pyspark.ml.linalg.SparseVector: has toArray, is no array."""

    def toArray(self):
        return np.array([0.0, 2.0])


# ---- what a row looks like


@pytest.mark.parametrize(
    ("row", "leaves"),
    [
        ((1.5, 1), [("x", "float64", ()), ("y", "int64", ())]),
        (([1, 2.5], True), [("x", "float64", (2,)), ("y", "bool", ())]),
        (((1, 2), np.float32(0)), [("x", "int64", (2,)), ("y", "float32", ())]),
        (([[1, 2], [3, 4]], 0, 0.5), [("x", "int64", (2, 2)), ("y", "int64", ()), ("sample_weight", "float64", ())]),
        ([np.zeros((2, 3), np.uint8), 0], [("x", "uint8", (2, 3)), ("y", "int64", ())]),
        (
            ((np.zeros(3), np.float32(2)), 0),
            [("x[0]", "float64", (3,)), ("x[1]", "float32", ()), ("y", "int64", ())],
        ),
        (
            ({"b": 1, "a": [1.0, 2.0]}, 0),
            [("x['a']", "float64", (2,)), ("x['b']", "int64", ()), ("y", "int64", ())],
        ),
        (
            ({"a": [np.zeros(1), np.zeros(2)]}, 0),
            [("x['a'][0]", "float64", (1,)), ("x['a'][1]", "float64", (2,)), ("y", "int64", ())],
        ),
        (("a b", 0), [("x", "string", ()), ("y", "int64", ())]),
        ((["a", "bc"], 0), [("x", "string", (2,)), ("y", "int64", ())]),
        ((np.array(["a", "bc"]), 0), [("x", "string", (2,)), ("y", "int64", ())]),
        ((np.zeros(2, ">f4"), np.int16(1)), [("x", "float32", (2,)), ("y", "int16", ())]),
        ((Vector(), 0), [("x", "float64", (2,)), ("y", "int64", ())]),
        (([Vector(), Vector()], 0), [("x[0]", "float64", (2,)), ("x[1]", "float64", (2,)), ("y", "int64", ())]),
    ],
)
def test_a_row_is_understood_as_documented(row, leaves):
    assert leaves_of(row) == leaves
    assert RowSpec.from_json(spec_of_row(row).to_json()) == spec_of_row(row)


@pytest.mark.parametrize(
    ("first", "second", "sentence"),
    [
        (([1.0], 0), ([1.0, 2.0], 0), "x is float64 of shape (1,) in A, but float64 of shape (2,) in B"),
        (([1.0], 0), ([1.0], 0, 1.0), "sample_weight is missing in A, but float64 of shape () in B"),
        (({"a": 1}, 0), ({"b": 1}, 0), "x is a dict with the keys ['a'] in A, but a dict with the keys ['b'] in B"),
        (({"a": 1}, 0), (1, 0), "x is a dict with the keys ['a'] in A, but int64 of shape () in B"),
        (
            ({"a": 1, "b": np.zeros(2)}, 0),
            ({"a": 1, "b": np.zeros(2, np.float32)}, 0),
            "x['b'] is float64 of shape (2,) in A, but float32 of shape (2,) in B",
        ),
        ((1, (np.zeros(1), 1)), (1, [np.zeros(1), 1]), "y is a tuple of 2 in A, but a list of 2 in B"),
    ],
)
def test_the_first_difference_of_two_specs_is_said_in_one_sentence(first, second, sentence):
    assert difference(spec_of_row(first), spec_of_row(second), ("A", "B")) == sentence
    assert difference(spec_of_row(first), spec_of_row(first)) is None


def test_specs_that_differ_in_whole_and_broken_python_numbers_have_a_common_one():
    whole, broken = spec_of_row(([1, 2], 0)), spec_of_row(([0.5, 2], 0))
    assert common_spec(whole, broken) == common_spec(broken, whole) == broken
    with pytest.raises(DataError, match=r"x is int64 .* in A, but float32 .* in B"):
        common_spec(whole, spec_of_row((np.zeros(2, np.float32), 0)), ("A", "B"))


@pytest.mark.parametrize("text", ["", "{}", "null", "[1]", '{"x": null, "y": null, "sample_weight": null}', '{"x": 1}'])
def test_what_is_no_spec_is_refused(text):
    with pytest.raises(DataError, match="RowSpec"):
        RowSpec.from_json(text)


def test_zeros_have_the_structure_shapes_and_dtypes_of_the_rows():
    x, y, weight = spec_of_row(({"a": np.zeros((2, 3), np.float32), "t": "text"}, True, 1.0)).zeros(4)
    assert (x["a"].shape, x["a"].dtype) == ((4, 2, 3), np.float32)
    assert not x["a"].any()
    assert x["t"].tolist() == [""] * 4
    assert (y.shape, y.dtype) == ((4,), bool)
    assert weight.tolist() == [0.0] * 4


# ---- rows


@pytest.mark.parametrize("num_shards", [1, 2, 3, 7])
@pytest.mark.parametrize("rows", [0, 1, 2, 6, 7, 100])
@pytest.mark.parametrize("block_bytes", [1, 40, 1 << 20])
def test_each_shard_gets_its_fair_share_of_every_partition(num_shards, rows, block_bytes):
    totals = Counter(dict.fromkeys(range(num_shards), 0))
    for partition in range(num_shards):
        blocks = from_rows(
            [(i, 0) for i in range(rows)], partition=partition, num_shards=num_shards, block_bytes=block_bytes
        )
        seen = np.concatenate([np.zeros(0, int), *(column(block, 0) for _, block in blocks)])
        assert sorted(seen.tolist()) == list(range(rows))
        share = Counter({shard: sum(len(b) for to, b in blocks if to == shard) for shard in range(num_shards)})
        assert set(share.values()) <= {rows // num_shards, rows // num_shards + 1}
        totals.update(share)
    assert set(totals.values()) == {rows}, "who gets one more rotates with the partition"


def test_blocks_are_as_large_as_asked_for_and_rows_are_read_as_blocks_are_taken():
    read = 0

    def rows():
        nonlocal read
        for _ in range(1000):
            read += 1
            yield np.zeros(128, np.float32), 0

    pairs = rows_to_blocks(rows(), partition=0, role="train", num_shards=2, block_bytes=10_000)
    assert read == 0
    _, data = next(pairs)
    assert read == 20_000 // (128 * 4 + 8)
    assert 9_000 < len(data) < 12_000


def test_a_block_of_a_few_small_rows_is_small():
    ((_, data),) = rows_to_blocks([([1.0, 2.0, 3.0], 1)] * 10, partition=0, role="train", num_shards=1)
    assert len(data) < 2_000


def test_long_strings_fill_a_block_too():
    blocks = from_rows([("x" * 1000, 0)] * 100, block_bytes=10_000)
    assert [len(block) for _, block in blocks] == [10] * 10


def test_the_sequence_counts_the_blocks_of_a_partition():
    blocks = from_rows([(i, 0) for i in range(6)], partition=5, block_bytes=32)
    assert [(b.role, b.partition, b.sequence, len(b)) for _, b in blocks] == [("train", 5, i, 2) for i in range(3)]


def test_an_integer_row_before_a_float_row_is_not_an_excuse_to_cut_off_the_fraction():
    blocks = from_rows([([1, 2], 0), ([0.5, 2], 1), ([3, 4], 1)])
    assert column(blocks[0][1], 0).tolist() == [[1.0, 2.0], [0.5, 2.0], [3.0, 4.0]]
    early, late = from_rows([(1, 0), (0.5, 0), (2, 0)], block_bytes=16)[:2]
    assert (early[1].spec.leaves[0].dtype, late[1].spec.leaves[0].dtype) == ("int64", "float64")


@pytest.mark.parametrize(
    ("first", "later", "dtype"),
    [
        (np.float32(0.5), 2, "float32"),
        (np.float32(0.5), 0.25, "float32"),
        (np.float16(0.5), True, "float16"),
        (np.int32(5), 7, "int32"),
        (0.5, np.float32(2), "float64"),
        (0.5, np.int64(2), "float64"),
        (1, np.float32(0.5), "float64"),
        (1, np.float64(0.5), "float64"),
        (1, np.int8(3), "int64"),
        (1, True, "int64"),
    ],
)
def test_numbers_that_fit_take_the_dtype_of_the_rows_before_them(first, later, dtype):
    ((_, block),) = from_rows([(first, 0), (later, 0)])
    assert block.spec.leaves[0].dtype == dtype
    assert column(block, 0).tolist() == [first, later]


FIRST = (np.zeros((2, 3), np.float32), 0)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([FIRST, (np.zeros((2, 2), np.float32), 0)], r"row 1, x has shape \(2, 2\), but shape \(2, 3\) in the"),
        ([FIRST, FIRST, (FIRST[0], [1, 2])], r"row 2, y has shape \(2,\), but shape \(\) in the first row"),
        ([FIRST, (FIRST[0], None)], r"row 1, y is None \(null\)"),
        ([(None, 0)], r"row 0, x is None"),
        ([([1.0, None], 0)], r"row 0, x holds a None"),
        ([([1.0, float("nan")], 0), ([1.0, None], 0)], r"row 1, x holds a None"),
        ([(["a", None], 0)], r"row 0, x holds a None"),
        ([([[1, 2], [3]], 0)], r"row 0, x is ragged: element 0 has shape \(2,\), but element 1 has shape \(1,\)"),
        ([(np.array([[1, 2], [3]], object), 0)], r"row 0, x is ragged: element 0 has shape \(2,\)"),
        ([(np.array([object()]), 0)], r"row 0, x holds <object .* of type object"),
        ([([1, "a"], 0)], r"row 0, x holds 1 of type int; all of it must be numbers .* or all of it strings"),
        ([(decimal.Decimal("1.5"), 0)], r"row 0, x holds Decimal\('1.5'\) of type Decimal"),
        ([(2**70, 0)], r"row 0, x holds 1180591620717411303424 of type int"),
        ([(np.ma.masked_array([1, 2], [0, 1]), 0)], r"row 0, x has masked elements"),
        ([(1.0, "cat")], r"row 0, y is a string; .*StringIndexer"),
        ([({"a": 1.0}, {"out": "cat"})], r"row 0, y\['out'\] is a string"),
        ([(1.0, 0, "heavy")], r"row 0, sample_weight is a string"),
        ([(1j, 0)], r"row 0, x has the dtype complex128"),
        ([(np.datetime64("2020-01-01"), 0)], r"row 0, x has the dtype datetime64\[D\].*seconds"),
        ([(datetime.date(2020, 1, 1), 0)], r"row 0, x holds datetime.date\(2020, 1, 1\)"),
        ([(b"bytes", 0)], r"row 0, x has the dtype \|S5.*decode"),
        ([("\ud800", 0)], r"row 0, x holds a string that is not valid Unicode"),
        ([({}, 0)], r"row 0, x is an empty dict"),
        ([({1: 2.0}, 0)], r"row 0, x has the key 1: the keys must be strings"),
        ([({"a": 1.0, "b": 2.0}, 0), ({"a": 1.0, "c": 2.0}, 0)], r"row 1, x is a dict with the keys \['a', 'c'\], but"),
        ([({"a": 1.0}, 0), (1.0, 0)], r"row 1, x is of type float, but a dict with the keys \['a'\] in the first row"),
        ([(1.0, 0), ({"a": 1.0}, 0)], r"row 1, x is a dict, but float64 of shape \(\) in the first row"),
        ([((np.zeros(1), 1), 0), ((np.zeros(1),), 0)], r"row 1, x is a tuple of 1, but a tuple of 2"),
        ([(1.0, 0), ("a", 0)], r"row 1, x is a string, but float64"),
        ([("a", 0), (1.0, 0)], r"row 1, x is float64, but string"),
        ([(1.0, 0), (1.0, 0, 2.0)], r"row 1, the row has 3 parts, but the first row has 2"),
        ([(1.0, 0, 2.0), (1.0, 0)], r"row 1, the row has 2 parts, but the first row has 3"),
        ([()], r"row 0, the row is a tuple of length 0; expected a tuple \(x, y\)"),
        ([1.0], r"row 0, the row is a float; expected"),
        ([(np.int32(1), 0), (0.5, 0)], r"row 1, x is float64, but int32 in the rows before it"),
        ([(True, 0), (2, 0)], r"row 1, x is int64, but bool"),
        ([(np.float32(1), 0), (np.float64(1), 0)], r"row 1, x is float64, but float32"),
        ([(np.float32(1), 0), (2**24 + 1, 0)], r"row 1, x holds 16777217, which float32"),
        ([(np.float32(1), 0), (1e300, 0)], r"row 1, x holds 1e\+300, which float32"),
        ([(2**53 + 1, 0), (0.5, 0)], r"row 1, x holds 9007199254740993, which float64"),
        ([(2**63 - 1, 0), (0.5, 0)], r"row 1, x holds 9223372036854775807, which float64"),
        ([(np.int8(1), 0), (300, 0)], r"row 1, x holds 300, which int8"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_trained_on_becomes_an_error_block(rows, message):
    error = error_of(from_rows(rows, partition=3, num_shards=4))
    assert (error.partition, error.role, error.row) == (3, "train", len(rows) - 1)
    with pytest.raises(DataError, match=rf"The train rows cannot be trained on: in partition 3, {message}"):
        raise error.error


def test_no_row_is_read_after_a_bad_one():
    rows = iter([(1.0, 0), (None, 0), (2.0, 0)])
    list(rows_to_blocks(rows, partition=0, role="train", num_shards=1))
    assert list(rows) == [(2.0, 0)]


def test_what_the_users_own_map_function_raises_is_not_swallowed():
    def rows():
        yield 1.0, 0
        raise ZeroDivisionError("the user's own")

    with pytest.raises(ZeroDivisionError, match="the user's own"):
        from_rows(rows())


def test_trailing_nul_characters_of_strings_survive():
    ((_, block),) = from_rows([(["a\0", "b"], 0), (["", "\0"], 0)])
    assert block.batch.column(0).to_pylist() == [["a\0", "b"], ["", "\0"]]
    ((_, block),) = from_rows([("a\0", 0), (np.array("b\0c"), 0)])
    assert block.batch.column(0).to_pylist() == ["a\0", "b\0c"]


# ---- the bytes


@pytest.mark.parametrize("keep", [0, 1, 8, 100, -100, -9])
def test_a_block_that_was_cut_off_is_refused(keep):
    ((_, data),) = rows_to_blocks([(np.zeros(100), 1)] * 10, partition=0, role="train", num_shards=1)
    with pytest.raises(DataError, match="no block of rows"):
        decode_block(data[:keep])


def test_foreign_bytes_are_no_block():
    sink = pa.BufferOutputStream()
    batch = pa.record_batch({"x": [1, 2]})
    with pa.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    for data in (b"\x00" * 100, b"not a block", sink.getvalue()):
        with pytest.raises(DataError, match="no block of rows"):
            decode_block(data)


def test_decoding_copies_no_values():
    ((_, data),) = rows_to_blocks([(np.arange(8.0), 1)], partition=0, role="train", num_shards=1)
    assert np.shares_memory(column(decode_block(data), 0), np.frombuffer(data, np.uint8))


def test_offsets_of_strings_and_lists_cannot_overflow_at_two_gib():
    ((_, block),) = from_rows([(["a", "b"], 0)])
    assert block.batch.schema.field(0).type == pa.list_(pa.large_string(), 2)  # fixed size: no offsets at all


# ---- arrays


def test_the_first_rows_of_all_shards_together_are_the_first_rows_of_the_arrays():
    x, y = np.arange(22).reshape(11, 2), np.arange(11)
    blocks = [(s, decode_block(b)) for s, b in arrays_to_blocks(x, y, role="train", num_shards=3, block_bytes=48)]
    assert [[n for s, b in blocks if s == shard for n in column(b, 1).tolist()] for shard in range(3)] == [
        [0, 3, 6, 9],
        [1, 4, 7, 10],
        [2, 5, 8],
    ]
    assert all(np.array_equal(column(b, 0)[:, 0], 2 * column(b, 1)) for _, b in blocks)


def test_arrays_may_be_structures_lists_and_strings_and_need_no_labels():
    x = {"image": np.zeros((4, 2, 2), np.uint8)[:, ::-1], "text": np.array(["a", "b", "c", "dd"])}
    ((_, data),) = arrays_to_blocks(x, role="validation", num_shards=1)
    block = decode_block(data)
    assert [(leaf.name, leaf.dtype, leaf.shape) for leaf in block.spec.leaves] == [
        ("x['image']", "uint8", (2, 2)),
        ("x['text']", "string", ()),
    ]
    assert (block.spec.y, block.role) == (None, "validation")
    ((_, data),) = arrays_to_blocks([[1, 2], [3, 4]], [0.5, 1.5], [1, 2], role="train", num_shards=1)
    assert decode_block(data).spec.leaves[0] == LeafSpec("x", "int64", (2,))


def test_more_shards_than_rows_leaves_shards_without_blocks():
    assert [shard for shard, _ in arrays_to_blocks(np.zeros(2), np.zeros(2), role="train", num_shards=4)] == [0, 1]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ((np.zeros((3, 2)), np.zeros(2)), "x has 3 rows, but y has 2"),
        (({"a": np.zeros(3), "b": np.zeros(4)}, np.zeros(3)), r"x\['a'\] has 3 rows, but x\['b'\] has 4"),
        ((np.zeros(3), np.zeros(3), np.zeros(1)), "x has 3 rows, but sample_weight has 1"),
        ((np.zeros((0, 2)), np.zeros(0)), "0 rows"),
        ((np.array([1, None]), np.zeros(2)), "x holds a None"),
        (([[1, 2], [3]], np.zeros(2)), "x is ragged"),
        ((np.zeros(2), np.array(["a", "b"])), "y is a string"),
        ((np.float64(3), np.zeros(1)), "x is a single value"),
        ((None, np.zeros(1)), "x is None"),
        ((np.zeros(2, "M8[s]"), np.zeros(2)), "datetime64"),
    ],
)
def test_wrong_arrays_are_refused_before_the_first_block_is_asked_for(arrays, message):
    with pytest.raises(DataError, match=message):
        arrays_to_blocks(*arrays, role="train", num_shards=2)


# ---- tables

NESTED = pa.list_(pa.list_(pa.float32()))


@pytest.mark.parametrize(
    ("kind", "values", "dtype", "shape"),
    [
        (pa.int32(), [1, 2, 3], "int32", ()),
        (pa.float16(), [1.0, 2.0, 0.5], "float16", ()),
        (pa.bool_(), [True, False, True], "bool", ()),
        (pa.string(), ["a", "", "ü"], "string", ()),
        (pa.string_view(), ["a", "", "ü"], "string", ()),
        (pa.dictionary(pa.int8(), pa.string()), ["a", "b", "a"], "string", ()),
        (pa.list_(pa.float64()), [[1, 2], [3, 4], [5, 6]], "float64", (2,)),
        (pa.large_list(pa.bool_()), [[True, False], [False, False], [True, True]], "bool", (2,)),
        (pa.list_(pa.int64(), 2), [[1, 2], [3, 4], [5, 6]], "int64", (2,)),
        (NESTED, [[[1, 2, 3]], [[4, 5, 6]], [[7, 8, 9]]], "float32", (1, 3)),
        (pa.list_(pa.list_(pa.int8()), 2), [[[1], [2]], [[3], [4]], [[5], [6]]], "int8", (2, 1)),
        (pa.list_(pa.string()), [["a", "b"], ["c", "d"], ["e", "f"]], "string", (2,)),
        (pa.list_(pa.int64()), [[], [], []], "int64", (0,)),
        (NESTED, [[], [], []], "float32", (0, 0)),
    ],
)
@pytest.mark.parametrize("sliced", [False, True])
def test_columns_of_a_table_become_arrays(kind, values, dtype, shape, sliced):
    batch = pa.record_batch({"f": pa.array(values, kind), "l": pa.array([0, 1, 2])})
    batches = [batch.slice(0, 1), batch.slice(0, 0), batch.slice(1, 2)] if sliced else [batch]
    ((_, block),) = from_table(batches)
    assert block.spec.leaves == (LeafSpec("x", dtype, shape), LeafSpec("y", "int64", ()))
    if dtype == "string":
        assert block.batch.column(0).to_pylist() == values
    else:
        assert column(block, 0).tolist() == np.array(values, dtype).reshape(3, *shape).tolist()
    assert column(block, 1).tolist() == [0, 1, 2]


@pytest.mark.parametrize("num_shards", [1, 3])
def test_the_rows_of_a_table_are_dealt_out_evenly_whatever_the_size_of_its_batches(num_shards):
    table = pa.record_batch({"f": pa.array([[i, i] for i in range(100)]), "l": pa.array(range(100))})
    for step in (1, 7, 100):
        blocks = from_table(
            [table.slice(i, step) for i in range(0, 100, step)], partition=1, num_shards=num_shards, block_bytes=240
        )
        for shard in range(num_shards):
            rows = np.concatenate([column(block, 1) for to, block in blocks if to == shard])
            assert rows.tolist() == [i for i in range(100) if (i + 1) % num_shards == shard]
        assert max(len(block) for _, block in blocks) <= 20


def test_several_columns_become_a_dict_and_the_weight_a_column_of_its_own():
    batch = pa.record_batch({"b": [1.0, 2.0], "a": [[1], [2]], "l": [0, 1], "m": [2, 3], "w": [0.5, 1.5]})
    ((_, block),) = from_table([batch], ["b", "a"], ["l", "m"], "w")
    assert [leaf.name for leaf in block.spec.leaves] == ["x['a']", "x['b']", "y['l']", "y['m']", "sample_weight"]
    assert [column(block, i).tolist() for i in range(5)] == [[[1], [2]], [1.0, 2.0], [0, 1], [2, 3], [0.5, 1.5]]
    ((_, block),) = from_table([batch], ["b"], None)
    assert block.spec == RowSpec(LeafSpec("x", "float64", ()))


@pytest.mark.parametrize(
    ("kind", "values", "row", "message"),
    [
        (pa.int64(), [1, 2, None], 12, "column 'f' has a null; drop"),
        (pa.string(), ["a", None, "b"], 11, "column 'f' has a null; drop"),
        (pa.list_(pa.int64()), [[1, 2], None, [1, 2]], 11, "column 'f' has a null; drop"),
        (pa.list_(pa.int64()), [[1, 2], [3, 4], [5, None]], 12, "column 'f' has a null inside a list"),
        (pa.list_(pa.int64(), 2), [[1, 2], [3, None], [5, 6]], 11, "column 'f' has a null inside a list"),
        (pa.list_(pa.int64()), [[1, 2], [1, 2, 3], [1]], 11, "column 'f' has a list of length 3, but of length 2"),
        (NESTED, [[[1], [2]], [[3], [4]], [[5], [6, 7]]], 12, "column 'f' has a list of length 2, but of length 1"),
        (NESTED, [[[1], [2]], [[3], None], [[5], [6]]], 11, "column 'f' has a null inside a list"),
    ],
)  # fmt: skip
def test_a_bad_row_of_a_table_is_named(kind, values, row, message):
    good = pa.record_batch({"f": pa.array([values[0]] * 10, kind), "l": pa.array([0] * 10)})
    bad = pa.record_batch({"f": pa.array(values, kind), "l": pa.array([0] * 3)})
    error = error_of(from_table([good, bad], partition=4, num_shards=3))
    assert error.row == row
    assert error.message.startswith(f"The train rows cannot be trained on: in partition 4, row {row}, {message}")


def test_the_length_of_lists_must_be_the_same_in_all_batches():
    batches = [pa.record_batch({"f": [[1] * n] * 2, "l": [0, 1]}) for n in (3, 4)]
    assert "row 2, column 'f' has a list of length 4, but of length 3 in row 0" in error_of(from_table(batches)).message


@pytest.mark.parametrize(
    ("columns", "arguments", "message"),
    [
        ({"f": pa.array([b"a"])}, {}, "column 'f' is of type binary, .* decode the bytes"),
        ({"f": pa.array([{"type": 1}])}, {}, "column 'f' is of type struct.*name its fields"),
        ({"f": pa.array([decimal.Decimal("1.5")])}, {}, "column 'f' is of type decimal.* cast it to double"),
        ({"f": pa.array([datetime.date(2020, 1, 1)])}, {}, "column 'f' is of type date32.*unix_timestamp"),
        ({"f": pa.array([None])}, {}, "column 'f' is of type null"),
        ({"f": pa.array([1]), "l": pa.array(["a"])}, {}, "column 'l' is a string; .*StringIndexer"),
        ({"f": pa.array([1]), "l": pa.array([["a"]])}, {}, "column 'l' is a string"),
        ({"f": pa.array(["a"])}, {"label": ["f"]}, "column 'f' is a string; labels"),
        ({"f": pa.array([1])}, {"weight": "w"}, r"there is no column 'w'; the columns are \['f', 'l'\]"),
        ({"f": pa.array([1])}, {"features": []}, "no feature column"),
        ({"f": pa.array([1])}, {"features": ["f", "f"]}, "the column 'f' is named twice"),
    ],
)
def test_columns_of_the_wrong_type_are_refused_on_the_driver_and_in_the_task(columns, arguments, message):
    batch = pa.record_batch({"l": pa.array([0]), **columns}).select(["f", "l"])
    arguments = {"features": ["f"], "label": ["l"], "weight": None, **arguments}
    with pytest.raises(DataError, match=message):
        check_columns(batch.schema, TableForm.of_columns(**arguments))
    error = error_of(from_table([batch], **arguments, partition=2))
    assert error.row is None
    with pytest.raises(DataError, match=f"in partition 2, {message}"):
        raise error.error
