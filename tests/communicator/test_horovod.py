"""What is special about ranks of Horovod: collectives within a graph, peers that die, and a Horovod that is not there."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

WITHOUT_HOROVOD = "import sys; sys.modules['horovod'] = None; import allreduce_spark.communicator.horovod"


@pytest.fixture(params=["horovod", "horovod-mpi"])
def horovod_ranks(request, start_group):
    """Two new ranks. Collectives within a graph wait for 4 s, as those of numpy buffers do where nothing else is said."""
    with start_group(request.param, 2, timeout_s=4.0) as group:
        yield group


def test_a_sum_within_a_graph_is_that_of_numpy_with_the_same_bits_on_all_ranks(horovod_ranks):
    (first, expected), (second, _) = horovod_ranks.run("summed_in_a_graph", steps=3)
    assert first.tobytes() == second.tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    "horovod_ranks", ["horovod-mpi"], indirect=True
)  # Gloo's controller does not look at the clock
def test_a_rank_that_does_not_come_to_a_collective_within_a_graph_makes_the_others_fail(horovod_ranks):
    horovod_ranks.run("summed_in_a_graph", steps=2)  # known tensors take a shorter way through Horovod than new ones
    failed = horovod_ranks.outcomes("summed_in_a_graph", steps=1, silent=1)[0]
    assert failed.error == "UnknownError"
    assert "Horovod has been shut down" in failed.message


def test_a_rank_that_is_killed_makes_the_others_fail(horovod_ranks):
    horovod_ranks.processes[1].send_signal(signal.SIGKILL)
    survivor, killed = horovod_ranks.outcomes("one_rank_is_silent", silent=1, timeout_s=2.0)
    assert survivor is None or survivor.error in ("CollectiveError", "CollectiveTimeoutError")
    assert killed is None


def test_more_than_horovod_can_count_is_gathered_in_pieces(horovod_ranks):
    for pieces, whole in horovod_ranks.run("done_in_pieces", piece_bytes=100, rows=[5, 33]):
        assert [array.shape for array in pieces] == [(101,), (5, 3), (33, 3)]
        assert [array.tobytes() for array in pieces] == [array.tobytes() for array in whole]


def test_a_machine_without_horovod_is_told_what_to_install():
    ended = subprocess.run([sys.executable, "-c", WITHOUT_HOROVOD], capture_output=True, text=True, timeout=120)
    assert "MissingDependencyError" in ended.stderr
    assert "allreduce-spark install-horovod" in ended.stderr


def test_looking_whether_horovod_is_there_does_not_load_it():
    look = "from allreduce_spark.communicator.horovod_environment import installed; installed()"
    code = f"import sys; {look}; assert not {{'horovod', 'tensorflow'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
