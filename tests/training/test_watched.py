"""The communicator that says when its rank waits."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from allreduce_spark.communicator.local import LocalGroup
from allreduce_spark.errors import CollectiveError, CollectiveTimeoutError
from allreduce_spark.rendezvous.status import StatusPage
from allreduce_spark.training.backends.tensorflow import within_steps
from allreduce_spark.training.watched import WatchedCommunicator, limited_by


def test_a_rank_is_seen_to_wait_and_the_one_that_is_waited_for_is_not(tmp_path: Path) -> None:
    seen: list[tuple[bool, bool]] = []
    late_may_come = threading.Event()

    def rank(communicator):
        status = StatusPage(tmp_path / f"status-{communicator.rank}")
        watched = WatchedCommunicator(communicator, status)
        watched.barrier()
        if watched.rank == 1:
            assert late_may_come.wait(20)
        buffer = np.ones(3, np.float32)
        watched.allreduce(buffer)
        return buffer.tolist(), status.read_waiting()

    def look() -> None:
        pages = [StatusPage(tmp_path / f"status-{rank}") for rank in (0, 1)]
        while not pages[0].read_waiting()[0] or pages[1].read_waiting()[0]:
            time.sleep(0.01)
        time.sleep(0.2)
        seen.append((pages[0].read_waiting()[0], pages[1].read_waiting()[0]))
        late_may_come.set()

    watcher = threading.Thread(target=look)
    watcher.start()
    with ThreadPoolExecutor(2) as pool:
        (sum_of_first, waited), (sum_of_second, came_late) = pool.map(rank, LocalGroup(2, timeout_s=30).communicators)
    watcher.join()
    assert seen == [(True, False)]
    assert sum_of_first == sum_of_second == [2, 2, 2]
    assert not waited[0]
    assert not came_late[0]
    assert waited[1] > came_late[1] + 0.1


def test_a_collective_that_takes_too_long_names_the_setting_that_limits_it(tmp_path: Path) -> None:
    def error_of(**deadline: float) -> str:
        watched = WatchedCommunicator(LocalGroup(2, timeout_s=0.1).communicators[0], StatusPage(tmp_path / "status"))
        with pytest.raises(CollectiveTimeoutError) as caught, limited_by("result_s") if deadline else nullcontext():
            watched.barrier(**deadline)
        return str(caught.value)

    assert error_of().endswith("rank 1 in barrier(). If the ranks are only slow, raise Timeouts.collective_s")
    assert error_of(timeout_s=0.2).endswith("rank 1 in barrier(). If the ranks are only slow, raise Timeouts.result_s")


class Looking:
    """A graph collective that looks at the rank's status page while it reduces."""

    def __init__(self, status: StatusPage) -> None:
        self.status, self.seen = status, []

    def allreduce_sum(self, tensors):
        def look(array: np.ndarray) -> np.ndarray:
            self.seen.append(self.status.read_waiting()[0])
            time.sleep(0.05)
            return 2 * array

        return [tf.numpy_function(look, [tensor], tensor.dtype) for tensor in tensors]


def test_a_rank_is_seen_to_wait_within_a_graph_too(tmp_path: Path) -> None:
    status, communicator = StatusPage(tmp_path / "status"), LocalGroup(1, timeout_s=30).communicators[0]
    communicator.graph = Looking(status)
    graph = WatchedCommunicator(communicator, status).graph
    assert graph is not None

    @tf.function
    def step(tensor):
        return graph.allreduce_sum([tensor])[0]

    assert step(tf.ones(3)).numpy().tolist() == [2, 2, 2]
    assert communicator.graph.seen == [True]
    is_waiting, waited_s = status.read_waiting()
    assert not is_waiting
    assert waited_s >= 0.05


def test_a_rank_that_is_lost_within_a_graph_is_a_collective_error_and_other_errors_stay_what_they_are() -> None:
    def step(message):
        def fail():
            raise tf.errors.UnknownError(None, None, message)

        return fail

    for message in (
        "Horovod has been shut down. This was caused by",
        "[/b/gloo/transport/tcp/pair.cc:598] Connection closed",
    ):
        with pytest.raises(CollectiveError, match=r"within a step.*Timeouts\.collective_s"), within_steps():
            step(message)()
    with pytest.raises(tf.errors.UnknownError, match="of the user's"), within_steps():
        step("an error of the user's")()
