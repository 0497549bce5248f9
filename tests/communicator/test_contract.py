"""One suite for every communicator: what `communicator/base.py` promises, checked on threads and on MPI processes."""

from __future__ import annotations

import re
import time
from functools import reduce

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from allreduce_spark.communicator.base import Communicator
from allreduce_spark.communicator.local import LocalGroup
from allreduce_spark.world import worlds_of

REDUCIBLE = ["float32", "float64", "int32", "int64"]
ANY_DTYPE = ["?", "u1", "f2", "f4", "f8", "i8", "c8", "M8[s]", "S3", "U2", "V5", ">f4", "i4,f8"]
COMBINE = {"sum": np.add, "min": np.minimum, "max": np.maximum}
SHAPES = [(0,), (1,), (3,), (), (2, 3, 1), (1021,), (65_537,), (300_001,)]
ONE_LAUNCH = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="session")
def numbers(rank_process):
    """The numbers that a rank makes for itself."""
    return rank_process.random_array


def assert_same_bits(arrays):
    assert len({array.tobytes() for array in arrays}) == 1


# What a healthy group does.


def test_both_kinds_of_communicator_are_one_to_the_type_checker():
    assert isinstance(LocalGroup(1, timeout_s=1).communicators[0], Communicator)


def test_every_rank_knows_its_place_among_the_others_and_within_its_host(ranks):
    expected = [(world, world.rank, world.world_size) for world in worlds_of(ranks.nodes)]
    assert ranks.run("place") == expected


@pytest.mark.parametrize("op", COMBINE)
@pytest.mark.parametrize("dtype", REDUCIBLE)
def test_allreduce_gives_every_rank_what_numpy_computes(ranks, numbers, dtype, op):
    for shape in SHAPES:
        results = ranks.run("allreduced", dtype=dtype, shape=shape, op=op)
        expected = reduce(COMBINE[op], [numbers(dtype, shape, 0, rank) for rank in range(ranks.world_size)])
        # The order of a sum is MPI's own, so a sum of floats is only equal up to rounding.
        np.testing.assert_allclose(results[0], expected, rtol=1e-5 if dtype == "float32" else 1e-12, atol=1e-4)
        assert_same_bits(results)
        assert results[0].dtype == dtype
        assert results[0].shape == shape


@ONE_LAUNCH
@given(
    dtype=st.sampled_from(REDUCIBLE),
    op=st.sampled_from(sorted(COMBINE)),
    shape=st.lists(st.integers(0, 40), max_size=3).map(tuple),
    seed=st.integers(0, 1000),
)
def test_all_ranks_hold_the_same_bits_whatever_is_reduced(ranks, dtype, op, shape, seed):
    assert_same_bits(ranks.run("allreduced", dtype=dtype, shape=shape, op=op, seed=seed))


def test_the_same_allreduce_gives_the_same_bits_again(ranks):
    once, again = (ranks.run("allreduced", dtype="float32", shape=(9973,), op="sum") for _ in range(2))
    assert_same_bits(once + again)


@pytest.mark.parametrize("op", ["sum", "min", "max"])
def test_one_rank_with_nan_gives_nan_to_all(ranks, op):
    for nan_rank in range(ranks.world_size):
        results = ranks.run("allreduced_with_nan_on_one_rank", op=op, nan_rank=nan_rank, size=17)
        assert all(np.isnan(result).all() for result in results)


@pytest.mark.parametrize("dtype", ANY_DTYPE)
def test_broadcast_gives_every_rank_the_bytes_of_the_root(ranks, numbers, dtype):
    for root in range(ranks.world_size):
        for shape in [(5,), (), (0, 4), (3, 7)]:
            results = ranks.run("broadcasted", dtype=dtype, shape=shape, root=root)
            assert_same_bits([numbers(dtype, shape, 0, root), *results])
            assert {(result.dtype, result.shape) for result in results} == {(np.dtype(dtype), shape)}


@pytest.mark.parametrize("dtype", ANY_DTYPE)
@pytest.mark.parametrize("columns", [(), (3,), (2, 2)])
def test_allgather_joins_arrays_of_any_length(ranks, numbers, dtype, columns):
    for rows in ([2, 2, 2, 2], [0, 3, 1, 0], [5, 0, 0, 2], [0, 0, 0, 0]):
        results = ranks.run("allgathered", dtype=dtype, rows=rows, columns=columns)
        expected = [numbers(dtype, (rows[rank], *columns), 0, rank) for rank in range(ranks.world_size)]
        for gathered in results:
            assert [array.shape for array in gathered] == [array.shape for array in expected]
            assert [array.tobytes() for array in gathered] == [array.tobytes() for array in expected]
            assert {array.dtype for array in gathered} == {np.dtype(dtype)}


@ONE_LAUNCH
@given(rows=st.lists(st.integers(0, 3000), min_size=4, max_size=4))
def test_allgather_loses_no_row(ranks, rows):
    for gathered in ranks.run("allgathered", dtype="i8", rows=rows, columns=(2,)):
        assert [len(array) for array in gathered] == rows[: ranks.world_size]


def test_nobody_leaves_a_barrier_before_all_have_come(ranks):
    times = ranks.run("times_around_a_barrier")
    assert max(came for came, _ in times) <= min(left for _, left in times)


def test_other_threads_than_the_one_that_opened_it_may_call(ranks):
    assert ranks.run("sums_from_other_threads", threads=3) == [[1000.0 * ranks.world_size] * 3] * ranks.world_size


def test_collectives_of_all_kinds_follow_each_other(ranks):
    seen = ranks.run("many_kinds_in_a_row", rounds=60)
    assert all(each == seen[0] for each in seen)


def test_a_rank_that_is_late_is_waited_for(ranks):
    values = ranks.run("one_rank_is_late", late=ranks.world_size - 1, by_s=0.3)
    assert values == [float(ranks.world_size)] * ranks.world_size


@pytest.mark.parametrize(
    ("collective", "buffer", "options", "message"),
    [
        ("allreduce", np.zeros(3, np.float16), {}, "takes float32, float64, int32 or int64"),
        ("allreduce", np.zeros(3, ">f4"), {}, "native byte order"),
        ("allreduce", np.zeros(3), {"writeable": False}, "read-only"),
        ("broadcast", np.array([None]), {}, "pointers"),
        ("broadcast", np.zeros(3), {"root": 4}, "root=4"),
        ("allgather", np.zeros(()), {}, "at least one axis"),
    ],
)
def test_a_buffer_that_cannot_be_sent_is_refused_and_the_group_goes_on(ranks, collective, buffer, options, message):
    assert all(message in said for said in ranks.run("refused", collective=collective, buffer=buffer, **options))
    ranks.run("times_around_a_barrier")


def test_a_buffer_with_gaps_is_refused():
    communicator = LocalGroup(1, timeout_s=1).communicators[0]
    with pytest.raises(ValueError, match="C-contiguous"):
        communicator.allreduce(np.zeros((4, 4))[:, 1])


# What breaks a group.


def waited_s(message: str) -> float:
    return float(re.search(r"waited ([\d.]+) s", message)[1])


def test_a_silent_rank_makes_the_others_fail_instead_of_hang(doomed_ranks):
    silent = doomed_ranks.world_size - 1
    outcomes = doomed_ranks.outcomes("one_rank_is_silent", silent=silent, timeout_s=0.5)
    assert outcomes.pop(silent).error is None
    for outcome in outcomes:
        assert outcome.error == "CollectiveTimeoutError"
        assert 0.4 < outcome.took_s < 3
        for words in ("allreduce(sum) float32 [3]", "12 bytes", f"{silent}"):
            assert words in outcome.message
        assert waited_s(outcome.message) >= 0.5
        assert waited_s(outcome.message) == pytest.approx(outcome.took_s, abs=0.2)


def test_a_broken_group_stays_broken(doomed_ranks):
    messages = doomed_ranks.run("error_after_a_timeout", silent=0)
    for message in messages[1:]:
        assert 0.3 <= waited_s(message) < 3
        assert "took 0 s" in message


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (("allreduce", np.ones(3), {}), ("allreduce", np.ones(1_000_000), {}), ("[3]", "[1000000]")),
        (("allreduce", np.ones(3), {}), ("allreduce", np.ones(3, "f4"), {}), ("float64", "float32")),
        (("allreduce", np.ones(3), {}), ("broadcast", np.ones(3), {}), ("allreduce(sum)", "broadcast(root=0)")),
        (("allgather", np.ones((3, 2)), {}), ("allgather", np.ones((3, 1)), {}), ("[*,2]", "[*,1]")),
        (("broadcast", np.ones(3), {"root": 0}), ("broadcast", np.ones(3), {"root": 1}), ("root=0", "root=1")),
        (("barrier", None, {}), ("close", None, {}), ("barrier()", "close()")),
    ],
    ids=["size", "dtype", "collective", "columns", "root", "close"],
)
def test_ranks_that_disagree_all_get_an_error_with_both_values_at_once(doomed_ranks, first, second, words):
    outcomes = doomed_ranks.outcomes("each_calls", calls=[first, *[second] * (doomed_ranks.world_size - 1)])
    for outcome in outcomes:
        assert outcome.error == "CollectiveError"
        assert outcome.took_s < 5
        assert "rank 0 called" in outcome.message
        assert all(word in outcome.message for word in words)


def test_abort_breaks_waiting_ranks_at_once_and_tells_them_why(doomed_ranks):
    outcomes = doomed_ranks.outcomes("one_rank_aborts", aborts=0, after_s=0.2)
    for outcome in outcomes[1:]:
        assert outcome.error == "CollectiveError"
        assert "rank 0 aborted the group: its shard was empty" in outcome.message
        assert outcome.took_s < 3


def test_a_rank_that_comes_after_an_abort_fails_too(doomed_ranks):
    late = doomed_ranks.world_size - 1
    outcomes = doomed_ranks.outcomes("one_rank_aborts", aborts=0, after_s=0.1, rank_is_late=late)
    assert outcomes[late].error == "CollectiveError"
    assert outcomes[late].took_s < 4


def test_abort_never_waits(doomed_ranks):
    outcomes = doomed_ranks.outcomes("leave", how="abort")
    assert all(outcome.error is None and outcome.took_s < 0.5 for outcome in outcomes)


def test_another_thread_may_abort_a_rank_that_waits(doomed_ranks):
    waiting = doomed_ranks.outcomes("aborted_by_another_thread")[0]
    assert waiting.error == "CollectiveError"
    assert "stopped from outside" in waiting.message
    assert waiting.took_s < 3


def test_a_closed_communicator_refuses_to_work(doomed_ranks):
    doomed_ranks.run("leave", how="close")
    started = time.monotonic()
    outcomes = doomed_ranks.outcomes("times_around_a_barrier")
    assert all(outcome.error == "CollectiveError" and "closed" in outcome.message for outcome in outcomes)
    assert time.monotonic() - started < 3
