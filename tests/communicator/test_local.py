"""What is special about ranks that are threads: they reduce in rank order, and are told together."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from allreduce_spark.communicator.agreement import Call
from allreduce_spark.communicator.base import ReduceOp
from allreduce_spark.communicator.local import LocalGroup
from allreduce_spark.errors import CollectiveError


def in_threads(communicators, work):
    results = [None] * len(communicators)

    def run(rank):
        results[rank] = work(communicators[rank])

    threads = [threading.Thread(target=run, args=[rank]) for rank in range(len(communicators))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results


def test_a_sum_is_taken_in_rank_order():
    values = np.float32([1e8, 1.0, -1e8])  # another order gives another sum

    def work(communicator):
        buffer = values[communicator.rank : communicator.rank + 1].copy()
        communicator.allreduce(buffer)
        return buffer[0]

    assert in_threads(LocalGroup(3, timeout_s=10).communicators, work) == [(values[0] + values[1]) + values[2]] * 3


def test_one_rank_alone_is_a_group():
    (alone,) = LocalGroup(1, timeout_s=1).communicators
    buffer = np.arange(3.0)
    for op in ReduceOp:
        alone.allreduce(buffer, op)
    alone.broadcast(buffer)
    (gathered,) = alone.allgather(buffer)
    alone.barrier()
    alone.close()
    assert buffer.tolist() == gathered.tolist() == [0.0, 1.0, 2.0]
    assert gathered is not buffer


def test_two_threads_of_one_rank_at_once_are_an_error():
    group = LocalGroup(2, timeout_s=10)
    first = group.communicators[0]

    def work(communicator):
        with pytest.raises(CollectiveError, match="two threads of rank 0"):
            communicator.barrier()
        return True

    assert in_threads([first, first], work) == [True, True]


def test_a_failing_reduction_breaks_the_group_for_all():
    group = LocalGroup(2, timeout_s=10)

    def fail(_):
        raise MemoryError("too large")

    def work(communicator):
        with pytest.raises((CollectiveError, MemoryError), match="too large"):
            group.meet(communicator.rank, first_call, np.zeros(1), fail)
        return True

    first_call = Call("allreduce(sum) float64 [1]")
    assert in_threads(group.communicators, work) == [True, True]


def test_a_group_without_ranks_is_refused():
    with pytest.raises(ValueError, match="world_size=0"):
        LocalGroup(0, timeout_s=1)
