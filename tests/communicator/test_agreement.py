"""What the ranks say before a collective: short, comparable bytes that still read as words."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from allreduce_spark.communicator.agreement import (
    CALL_BYTES,
    Call,
    allgather_call,
    allreduce_call,
    broadcast_call,
    disagreement,
    name_ranks,
)
from allreduce_spark.communicator.base import ReduceOp


def test_a_call_reads_as_words():
    assert allreduce_call(np.zeros((2, 3), np.float32), ReduceOp.MAX).words == "allreduce(max) float32 [2,3]"
    assert broadcast_call(np.zeros(4, bool), 1, rank=0, world_size=2).words == "broadcast(root=1) bool [4]"
    assert allgather_call(np.zeros((5, 2))).words == "allgather() float64 [*,2]"
    assert str(allgather_call(np.zeros((5, 2)))) == "allgather() float64 [*,2] (80 bytes)"


@given(
    words=st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=30).map(str.strip), rows=st.integers(0)
)
def test_a_call_that_fits_comes_back_from_its_bytes(words, rows):
    call = Call(words, rows % 2**60)
    assert len(call.to_bytes()) == CALL_BYTES
    assert Call.from_bytes(call.to_bytes()) == call


def test_calls_that_differ_only_in_what_is_cut_off_still_differ():
    one, other = (allreduce_call(np.zeros((1,) * 30 + (size,)), ReduceOp.SUM) for size in (1, 2))
    assert len(one.to_bytes()) == CALL_BYTES
    assert one.to_bytes() != other.to_bytes()
    assert Call.from_bytes(one.to_bytes()).words.startswith("allreduce(sum) float64 [1,1,1")


def test_rows_alone_may_differ():
    assert disagreement([allgather_call(np.zeros((rows, 2))) for rows in (0, 5)]) is None


def test_a_dtype_without_bytes_is_refused():
    with pytest.raises(ValueError, match="at least one byte"):
        allgather_call(np.zeros(3, "V0"))


def test_many_ranks_are_counted_not_listed():
    assert name_ranks(range(100)) == "rank 0, 1, 2, 3, 4, 5, 6, 7 and 92 more"
