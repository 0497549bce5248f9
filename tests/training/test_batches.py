"""Every rank has the same number of steps, every row is used exactly once an epoch, in an order that can be repeated."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from allreduce_spark.config import FitConfig
from allreduce_spark.errors import DataError
from allreduce_spark.training.batches import BatchPlan, ShardBatches, data_sets, validation_rows_of
from allreduce_spark.world import Membership, worlds_of

ROWS = st.lists(st.integers(0, 60), min_size=1, max_size=6).map(tuple).filter(any)


@given(ROWS, st.integers(1, 20))
def test_the_steps_of_a_plan_hold_every_row_once(rows, batch_size):
    plan = BatchPlan(rows, batch_size, len(rows))
    for rank, count in enumerate(rows):
        assert sum(plan.rows_of(rank, step) for step in range(plan.steps)) == count
    assert sum(plan.total(step) for step in range(plan.steps)) == sum(rows)
    assert all(plan.total(step) > 0 for step in range(plan.steps))


@given(ROWS, st.floats(0, 0.99))
def test_all_ranks_together_hold_out_what_keras_would(rows, share):
    held_out = validation_rows_of(rows, share)
    assert sum(held_out) == sum(rows) - int(sum(rows) * (1 - share))
    assert all(0 <= held <= count for held, count in zip(held_out, rows, strict=True))


@pytest.fixture
def shard_of(write_shard):
    def shard(count):
        return write_shard((np.arange(count, dtype="float64"), np.arange(count)))

    return shard


def rows_in(batches):
    return [y.tolist() for y in (batches[step][1] for step in range(len(batches)))]


def test_without_a_seed_the_rows_keep_their_order(shard_of):
    assert rows_in(ShardBatches({0: shard_of(5)}, BatchPlan((5,), 2, 1))) == [[0, 1], [2, 3], [4]]


def test_each_epoch_has_an_order_of_its_own_that_comes_again(shard_of):
    batches = ShardBatches({1: shard_of(40)}, BatchPlan((40, 40), 8, 2), seed=3)
    first = rows_in(batches)
    batches.epoch = 1
    second = rows_in(batches)
    batches.epoch = 0
    assert rows_in(batches) == first != second
    assert sorted(row for rows in second for row in rows) == list(range(40))
    other_rank = ShardBatches({0: shard_of(40)}, BatchPlan((40, 40), 8, 2), seed=3)
    assert rows_in(other_rank) != first


def test_a_step_without_rows_still_has_a_batch_of_the_right_form(shard_of, write_shard):
    late = ShardBatches({0: shard_of(3)}, BatchPlan((3, 9), 2, 2))
    assert rows_in(late) == [[0, 1], [2], [0], [0], [0]]
    spec = shard_of(1).spec
    empty = ShardBatches({0: write_shard(None, spec)}, BatchPlan((0, 2), 2, 2))
    x, y = empty[0]
    assert (x.shape, x.dtype, y.shape, y.dtype) == ((1,), np.float32, (1,), np.int64)


def test_floats_become_keras_own_and_integers_stay(shard_of):
    x, y = ShardBatches({0: shard_of(4)}, BatchPlan((4,), 4, 1))[0]
    assert (x.dtype, y.dtype) == (np.float32, np.int64)


def test_the_last_rows_of_each_shard_validate(shard_of, write_shard):
    world = worlds_of(["a", "b"])[1]
    membership = Membership(world, 0, "names", rows=(10, 6), validation_rows=(0, 0))
    config = FitConfig(batch_size=4, validation_split=0.25, shuffle=False)
    train, validation = data_sets(config, membership, {1: (shard_of(6), write_shard(None))})
    assert rows_in(train) == [[0, 1, 2, 3], [0]]
    assert rows_in(validation) == [[4, 5]]
    assert train.plan.rows == (8, 4)


def test_a_data_set_of_no_known_form_is_refused(write_shard):
    with pytest.raises(DataError, match="no rank has rows"):
        ShardBatches({0: write_shard(None)}, BatchPlan((0,), 2, 1))
