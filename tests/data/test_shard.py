"""A shard gives back exactly the rows that went into its blocks, in an order that does not depend on their arrival."""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import textwrap

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from allreduce_spark.data import Shard, ShardWriter, arrays_to_blocks, decode_block, rows_to_blocks
from allreduce_spark.data.rows import spec_of_row
from allreduce_spark.errors import ConfigError, DataError

NUMERIC = ["bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
DTYPES = [np.dtype(name) for name in (*NUMERIC, "float16", "float32", "float64")]
SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)
TEXT = st.text(st.characters(codec="utf-8"), max_size=5)


def blocks_of(rows, *, partition=0, num_shards=1, shard=0, block_bytes=1 << 20):
    pairs = rows_to_blocks(rows, partition=partition, role="train", num_shards=num_shards, block_bytes=block_bytes)
    return [decode_block(data) for to, data in pairs if to == shard]


def spool(path, blocks, **kwargs):
    with ShardWriter(path, **kwargs) as writer:
        for block in blocks:
            writer.write(block)
    return path


def assert_same(actual, expected):
    """Equal in structure, dtype, shape and value, NaN included."""
    if isinstance(expected, dict):
        assert list(actual) == sorted(expected)
        for key in expected:
            assert_same(actual[key], expected[key])
    elif isinstance(expected, (tuple, list)):
        assert type(actual) is type(expected)
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_same(one, other)
    elif expected is None:
        assert actual is None
    else:
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
        np.testing.assert_array_equal(actual, expected)


def stack(values):
    """The batch that the rows' values make: the slow and simple reference."""
    first = values[0]
    if isinstance(first, dict):
        return {key: stack([value[key] for value in values]) for key in first}
    if isinstance(first, (tuple, list)):
        return type(first)(stack([value[index] for value in values]) for index in range(len(first)))
    batch = np.empty((len(values), *first.shape), first.dtype)
    for index, value in enumerate(values):
        batch[index] = value[()]
    return batch


def arrays(dtype, shape):
    if dtype == np.dtype(object):
        return hnp.arrays(object, shape, elements=TEXT)
    return hnp.arrays(dtype, shape)


def values(dtypes):
    """A strategy of strategies: the first draw gives the form of a value, the draws from it the values of the rows."""
    leaf = st.builds(arrays, st.sampled_from(dtypes), SHAPES)
    return st.recursive(
        leaf,
        lambda part: st.one_of(
            st.lists(part, min_size=1, max_size=3).map(lambda parts: st.tuples(*parts)),
            st.lists(part, min_size=1, max_size=3).map(lambda parts: st.tuples(*parts).map(list)),
            st.dictionaries(TEXT, part, min_size=1, max_size=3).map(st.fixed_dictionaries),
        ),
        max_leaves=4,
    )


@st.composite
def partitions_of_rows(draw):
    """Partitions of rows of one random form."""
    parts = [draw(values([*DTYPES, np.dtype(object)])), draw(values(DTYPES))]
    if draw(st.booleans()):
        parts.append(arrays(np.dtype(np.float32), ()))
    return draw(st.lists(st.lists(st.tuples(*parts), max_size=8), min_size=1, max_size=3))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(partitions_of_rows(), st.integers(1, 4), st.sampled_from([1, 64, 1 << 20]), st.randoms(use_true_random=False))
def test_rows_of_any_form_come_back_as_they_were(tmp_path_factory, partitions, num_shards, block_bytes, chance):
    path = tmp_path_factory.mktemp("shards")
    seen = 0
    for index in range(num_shards):
        expected = [
            row for p, rows in enumerate(partitions) for i, row in enumerate(rows) if (p + i) % num_shards == index
        ]
        blocks = [
            block
            for p, rows in enumerate(partitions)
            for block in blocks_of(rows, partition=p, num_shards=num_shards, shard=index, block_bytes=block_bytes)
        ]
        chance.shuffle(blocks)
        spool(path / str(index), blocks, chunk_bytes=block_bytes)
        with Shard.open(path / str(index)) as shard:
            assert len(shard) == len(expected)
            seen += len(shard)
            if expected:
                order = [chance.randrange(len(expected)) for _ in range(10)]
                for indices in (range(len(expected)), order, order[:1]):
                    taken = shard.take(np.array(indices))
                    rows = [expected[i] for i in indices]
                    parts = [stack([row[part] for row in rows]) for part in range(len(rows[0]))]
                    assert_same(taken, (*parts, None)[:3])
    assert seen == sum(map(len, partitions))


@settings(max_examples=50, deadline=None)
@given(hnp.arrays(st.sampled_from(DTYPES), st.tuples(st.integers(1, 20), st.integers(0, 3))), st.integers(1, 5))
def test_arrays_of_any_dtype_come_back_in_their_order(tmp_path_factory, x, num_shards):
    path = tmp_path_factory.mktemp("shards")
    parts = []
    for index in range(num_shards):
        pairs = arrays_to_blocks(x, x[:, :1], role="train", num_shards=num_shards, block_bytes=32)
        blocks = [decode_block(data) for to, data in pairs if to == index]
        with Shard.open(spool(path / str(index), blocks), spec=spec_of_row((x[0], x[0, :1]))) as shard:
            parts.append(shard.take(np.arange(len(shard))))
    for index, (rows, labels, _) in enumerate(parts):
        assert_same(rows, x[index::num_shards])
        assert_same(labels, x[index::num_shards, :1])


def test_the_order_of_the_rows_does_not_depend_on_the_order_of_arrival(tmp_path):
    blocks = [
        block
        for partition in range(20)
        for block in blocks_of([(100 * partition + i, 0) for i in range(10)], partition=partition, block_bytes=48)
    ]
    expected = [100 * partition + i for partition in range(20) for i in range(10)]
    for seed in range(5):
        random.Random(seed).shuffle(blocks)
        for chunk_bytes in (1, 200, 1 << 20):
            with Shard.open(spool(tmp_path / "shard", blocks, chunk_bytes=chunk_bytes)) as shard:
                assert shard.take(np.arange(200))[0].tolist() == expected
                assert shard.take(np.arange(200)[::-7])[0].tolist() == expected[::-7]


def test_many_small_blocks_become_few_chunks(tmp_path):
    blocks = [block for p in range(100) for block in blocks_of([(np.zeros(128), 0)] * 3, partition=p)]
    spool(tmp_path / "shard", blocks, chunk_bytes=100_000)
    with pa.memory_map(str(tmp_path / "shard")) as source:
        assert pa.ipc.open_file(source).num_record_batches == 4


def test_partitions_of_whole_and_of_broken_python_numbers_become_float_together(tmp_path):
    whole = blocks_of([([1, 2], 0), ([3, 4], 1)], partition=0, block_bytes=1)
    broken = blocks_of([([0.5, 1], 0), ([5, 6], 1)], partition=1, block_bytes=1)
    expected = [[1.0, 2.0], [3.0, 4.0], [0.5, 1.0], [5.0, 6.0]]
    for blocks in (whole + broken, broken + whole, [whole[0], broken[0], whole[1], broken[1]]):
        for chunk_bytes in (1, 1 << 20):
            with Shard.open(spool(tmp_path / "shard", blocks, chunk_bytes=chunk_bytes)) as shard:
                x, y, _ = shard.take(np.arange(4))
                assert (x.tolist(), x.dtype) == (expected, np.float64)
                assert (y.tolist(), y.dtype) == ([0, 1, 0, 1], np.int64)
    assert os.listdir(tmp_path) == ["shard"]


def test_a_shard_of_whole_numbers_follows_the_other_ranks_to_float(tmp_path):
    spool(tmp_path / "shard", blocks_of([([1, 2], 0), ([3, 4], 1)]))
    agreed = spec_of_row(([0.5, 1.5], 0))
    with Shard.open(tmp_path / "shard", spec=agreed) as shard:
        assert shard.spec == agreed
        assert_same(shard.take([1]), (np.array([[3.0, 4.0]]), np.array([1]), None))


def test_integers_that_float64_cannot_hold_are_refused_rather_than_rounded(tmp_path):
    blocks = blocks_of([(2**53 + 1, 0)]) + blocks_of([(0.5, 0)], partition=1)
    with pytest.raises(DataError, match="9007199254740993, which float64"):
        spool(tmp_path / "shard", blocks)


def test_blocks_of_other_shapes_are_refused_with_both_partitions(tmp_path):
    blocks = blocks_of([([1.0, 2.0], 0)], partition=2) + blocks_of([([1.0], 0)], partition=9)
    message = r"x is float64 of shape \(2,\) in partition 2, but float64 of shape \(1,\) in partition 9"
    with pytest.raises(DataError, match=message):
        spool(tmp_path / "shard", blocks)
    assert os.listdir(tmp_path) == []


def test_a_shard_that_does_not_fit_the_other_ranks_is_refused(tmp_path):
    spool(tmp_path / "shard", blocks_of([([1.0, 2.0], 0)]))
    for row, message in ((([1.0], 0), r"shape \(2,\) in .*shard, but .*shape \(1,\) in"), (([1, 2], 0), "int64")):
        with pytest.raises(DataError, match=message):
            Shard.open(tmp_path / "shard", spec=spec_of_row(row))


def test_an_error_block_is_raised_by_the_writer_and_leaves_no_file(tmp_path):
    blocks = blocks_of([(1.0, 0), (2.0, 0), (None, 0)], partition=4, block_bytes=1)
    with pytest.raises(DataError, match=r"in partition 4, row 2, x is None"):
        spool(tmp_path / "shard", blocks, chunk_bytes=1)
    assert os.listdir(tmp_path) == []


def test_a_block_that_comes_twice_is_refused(tmp_path):
    blocks = blocks_of([(1.0, 0)], partition=4)
    with pytest.raises(DataError, match="partition 4, sequence 0 is in the shard twice"):
        Shard.open(spool(tmp_path / "shard", blocks * 2))


def test_training_and_validation_rows_do_not_mix(tmp_path):
    other = decode_block(next(rows_to_blocks([(1.0, 0)], partition=0, role="validation", num_shards=1))[1])
    with pytest.raises(ValueError, match="'validation' block came to the shard of the 'train' rows"):
        spool(tmp_path / "shard", [*blocks_of([(1.0, 0)]), other])


def test_an_empty_shard_takes_its_spec_from_another_rank(tmp_path):
    spool(tmp_path / "shard", [])
    with Shard.open(tmp_path / "shard") as shard:
        assert (len(shard), shard.spec) == (0, None)
        with pytest.raises(DataError, match="empty"):
            shard.take([])
    spec = spec_of_row(({"a": np.zeros((2, 2), np.float32)}, 0, 1.0))
    with Shard.open(tmp_path / "shard", spec=spec) as shard:
        x, y, weight = shard.take([])
        assert (len(shard), x["a"].shape, y.shape, weight.shape) == (0, (0, 2, 2), (0,), (0,))
        with pytest.raises(IndexError, match="the shard has 0 rows"):
            shard.take([0])


@pytest.mark.parametrize("chunk_bytes", [1, 1 << 20])
def test_rows_can_be_taken_with_any_integer_dtype(tmp_path, chunk_bytes):
    rows = [([f"{i}", f"{i}b", f"{i}c"], np.full(1000, i)) for i in range(120)]
    with Shard.open(spool(tmp_path / "shard", blocks_of(rows, block_bytes=100_000), chunk_bytes=chunk_bytes)) as shard:
        for dtype in (np.int8, np.uint8, np.int32, np.uint64):
            x, y, _ = shard.take(np.array([119, 3, 3], dtype))
            assert x.tolist() == [["119", "119b", "119c"], ["3", "3b", "3c"], ["3", "3b", "3c"]]
            assert y[:, -1].tolist() == [119, 3, 3]


@pytest.mark.parametrize("indices", [[-1], [3], [0, 3], [[0]], [0.5], 1, [True]])
def test_rows_that_are_not_there_are_refused(tmp_path, indices):
    with Shard.open(spool(tmp_path / "shard", blocks_of([(1.0, 0)] * 3))) as shard, pytest.raises(IndexError):
        shard.take(indices)


@pytest.mark.parametrize("indices", [[0, 1, 2], [2, 0]])
def test_what_is_taken_belongs_to_the_caller(tmp_path, indices):
    with Shard.open(spool(tmp_path / "shard", blocks_of([(True, 0.0)] * 3))) as shard:
        x, y, _ = shard.take(indices)
        x[:], y[:] = False, 7
        assert shard.take(indices)[0].all()
    assert y.tolist() == [7.0] * len(indices)


def test_a_file_that_was_cut_off_is_refused(tmp_path):
    data = spool(tmp_path / "shard", blocks_of([(np.zeros(100), 0)] * 10)).read_bytes()
    for length in (0, 1, 7, 100, len(data) // 2, len(data) - 1):
        (tmp_path / "short").write_bytes(data[:length])
        with pytest.raises(DataError, match="no complete shard file"):
            Shard.open(tmp_path / "short")


def test_a_foreign_file_is_refused(tmp_path):
    (tmp_path / "text").write_text("not a shard" * 100)
    batch = pa.record_batch({"x": [1, 2]})
    with pa.ipc.new_file(str(tmp_path / "arrow"), batch.schema) as file:
        file.write_batch(batch)
    for name in ("text", "arrow"):
        with pytest.raises(DataError, match="no complete shard file"):
            Shard.open(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        Shard.open(tmp_path / "missing")


@pytest.mark.parametrize("chunk_bytes", [1, 1 << 20], ids=["while rows come", "at the end"])
def test_a_disk_without_room_is_named_and_nothing_stays_on_it(tmp_path, chunk_bytes):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limit[1]))
    try:
        with pytest.raises(
            ConfigError, match=rf"cannot be written to '{tmp_path}' on .*File too large.*spark\.local\.dir"
        ):
            spool(tmp_path / "shard", blocks_of([(np.zeros(5000), 1.0)]), chunk_bytes=chunk_bytes)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert os.listdir(tmp_path) == []


def test_a_shard_several_times_larger_than_memory_is_spooled_and_read(tmp_path):
    """2.2 GiB, more than 2**31 bytes too, in a process that may hold 256 MiB beyond what its imports take."""
    script = textwrap.dedent("""
        import json, resource, sys
        import numpy as np
        from allreduce_spark.data import Shard, ShardWriter, decode_block
        from allreduce_spark.data.blocks import Block, batch_of, encode_block
        from allreduce_spark.data.rows import spec_of_row

        def rows_of(sequence):
            x = np.full((1024, 4096), sequence % 256, np.uint8)
            return x, np.arange(1024) + sequence * 1024

        taken = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData")) << 10
        limit = taken + (256 << 20)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        try:
            np.ones(300 << 20, np.uint8)
            bites = False
        except MemoryError:
            bites = True
        count = 563
        path = sys.argv[1]
        spec = spec_of_row((np.zeros(4096, np.uint8), 0))
        with ShardWriter(path) as writer:
            for sequence in reversed(range(count)):
                block = Block(spec, "train", 0, sequence, batch_of(spec, rows_of(sequence)))
                writer.write(decode_block(encode_block(block)))
        wrong = 0
        with Shard.open(path) as shard:
            for _ in range(20):
                indices = np.random.default_rng(0).integers(0, len(shard), 64)
                x, y, _ = shard.take(indices)
                wrong += int((y != indices).sum() + (x != (indices // 1024 % 256)[:, None]).sum())
            for start in range(0, len(shard), 8192):
                x, y, _ = shard.take(np.arange(start, min(start + 8192, len(shard))))
                wrong += int(y[0] != start) + int(x[-1, -1] != y[-1] // 1024 % 256)
            rows = len(shard)
        print(json.dumps({"bites": bites, "rows": rows, "wrong": wrong, "limit": limit}))
    """)
    # mimalloc and jemalloc reserve address space ahead, which RLIMIT_DATA counts
    environment = {**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system", "OPENBLAS_NUM_THREADS": "1"}
    path = tmp_path / "shard"
    try:
        done = subprocess.run(
            [sys.executable, "-c", script, str(path)], capture_output=True, text=True, env=environment, timeout=200
        )
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)
        size = path.stat().st_size
    finally:
        path.unlink(missing_ok=True)
    assert result["bites"], "the limit must be one that a process can run into"
    assert (result["rows"], result["wrong"]) == (563 * 1024, 0)
    assert size > 2**31
    assert size > 4 * result["limit"]
