"""The warm process: what its ranks share with it, and what is left when any one of the three processes is killed."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from allreduce_spark.launch.process import RankProcess
from allreduce_spark.launch.warm import WarmProcess
from allreduce_spark.rendezvous.status import StatusPage

LIGHT = Path(__file__).parent / "light"
MEMBERSHIP = {"membership": {"world": {"rank": 0}}}


def wait_until(is_so, what: str, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.005)


def wait_for_end(rank: RankProcess) -> None:
    wait_until(rank.has_ended, "the rank ends")


def pid_of(rank: RankProcess) -> int:
    wait_until(rank._forked, "the rank has been forked")
    return rank._forked()[0]


def is_there(pid: int) -> bool:
    """Whether there is such a process, be it only as a zombie."""
    return Path(f"/proc/{pid}").exists()


@pytest.fixture
def start(start_rank):
    """Start a rank 0 of 1 of some behaviour."""
    return partial(start_rank, rank=0, num_ranks=1)


@pytest.fixture
def with_tensorflow(tmp_path, environment_with):
    """Start a warm process whose `import tensorflow` runs the given code, and ask it for a rank; (warm process, rank)."""
    with contextlib.ExitStack() as stack:

        def make(code: str) -> tuple[WarmProcess, RankProcess]:
            (tmp_path / "modules").mkdir()
            (tmp_path / "modules" / "tensorflow.py").write_text(code)
            warm = stack.enter_context(
                contextlib.closing(WarmProcess(tmp_path, 1, environment_with(tmp_path / "modules")))
            )
            return warm, stack.enter_context(contextlib.closing(warm.start_rank(0, 1)))

        yield make


# One after the other


def test_ranks_are_forked_one_after_the_other_each_with_a_place_of_its_own(warm, tmp_path):
    (tmp_path / "behaviour").write_text("says_who_it_is")
    for number, size in ((0, 3), (2, 3), (1, 2)):
        with contextlib.closing(warm.start_rank(number, size)) as rank:
            said = rank.channel.receive(60).fields
            assert (said["rank"], said["size"]) == (number, str(size))
            assert said["parent"] == warm._process.pid
            wait_for_end(rank)
            assert rank.read_output() == [f"I am {number}"], "and nothing that another rank has printed"
            assert rank.output_ended


def test_ranks_do_not_draw_the_same_random_numbers(start):
    first, second = (start("draws_a_number").channel.receive(60).fields["number"] for _ in range(2))
    assert first != second


def test_a_rank_that_was_killed_is_no_zombie_and_the_next_one_starts(start):
    for _ in range(3):
        rank = start("trains_and_ignores_signals")
        pid = pid_of(rank)
        rank.kill()
        assert not is_there(pid)


def test_a_rank_that_is_killed_from_outside_is_reported_with_its_signal_and_no_zombie(start):
    rank = start("trains")
    pid = pid_of(rank)
    os.kill(pid, signal.SIGTERM)
    wait_for_end(rank)
    assert rank.how_it_ended() == "the rank process was killed by SIGTERM"
    assert not is_there(pid)


# The import


def test_a_failed_import_is_reported_by_the_rank_with_what_to_install(with_tensorflow):
    warm, rank = with_tensorflow("raise ImportError('libtensorflow_cc.so.2: no such file')")
    for again in (rank, warm.start_rank(0, 1)):
        with contextlib.closing(again):
            message = again.channel.receive(60)
            assert (message.kind, message.fields["error"]) == ("failed", "ImportError")
            assert "libtensorflow_cc.so.2: no such file" in message.fields["cause"]
            assert "allreduce-spark[tensorflow]" in message.fields["cause"]
            wait_for_end(again)
            assert again.read_output()[-1] == "ImportError: libtensorflow_cc.so.2: no such file"
            assert "exit code 1" in again.how_it_ended()


def test_death_during_the_import_is_that_of_the_rank_and_its_last_words_are_read(with_tensorflow):
    code = "import os, sys; print('compiled to use AVX2', file=sys.stderr, flush=True); os.kill(os.getpid(), 4)"
    _, rank = with_tensorflow(code)
    wait_for_end(rank)
    assert rank.how_it_ended() == "the rank process was killed by SIGILL"
    assert "compiled to use AVX2" in rank.read_output()


def test_an_exit_during_the_import_is_that_of_the_rank(with_tensorflow):
    _, rank = with_tensorflow("import os; os._exit(9)")
    wait_for_end(rank)
    assert rank.how_it_ended() == "the rank process ended with exit code 9 before its work was done"


HANGS = "import time\nprint('importing', flush=True)\ntime.sleep(600)"


def test_a_rank_that_waits_for_the_import_has_not_ended_and_can_be_killed_at_once(with_tensorflow):
    _, rank = with_tensorflow(HANGS)
    wait_until(lambda: "importing" in rank.read_output(), "the import has begun")
    assert not rank.has_ended()
    rank.note_shared_memory()
    rank.kill()
    assert rank.has_ended()


def test_a_stalled_import_shows_where_it_is(with_tensorflow):
    _, rank = with_tensorflow(HANGS)
    wait_until(lambda: "importing" in rank.read_output(), "the import has begun")
    rank.dump_stack()
    wait_until(lambda: any("tensorflow.py" in line for line in rank.read_output()), "the stack is printed")
    assert not rank.has_ended()


def test_asking_for_a_stack_before_python_is_up_kills_nobody(start):
    rank = start("says_who_it_is")
    rank.dump_stack()
    assert rank.channel.receive(60).kind == "me"


def test_a_rank_that_was_given_up_during_the_import_is_never_forked(with_tensorflow, tmp_path):
    gate = tmp_path / "gate"
    code = f"import os, time\nwhile not os.path.exists({str(gate)!r}): time.sleep(0.001)\nraise ImportError('at last')"
    warm, unwanted = with_tensorflow(code)
    unwanted.kill()
    wanted = warm.start_rank(0, 1)
    gate.touch()
    with contextlib.closing(wanted):
        assert wanted.channel.receive(60).kind == "failed"
        assert unwanted._forked() is None
        assert unwanted.read_output() == []


def test_a_fork_that_fails_is_that_of_the_rank_and_its_reason_is_read(with_tensorflow):
    code = """
import os
def fork():
    raise BlockingIOError(11, "Resource temporarily unavailable")
os.fork = fork
"""
    _, rank = with_tensorflow(code)
    wait_for_end(rank)
    assert "the rank process ended with exit code 1" in rank.how_it_ended()
    assert rank.read_output()[-1] == "BlockingIOError: [Errno 11] Resource temporarily unavailable"


# Death


def test_ranks_die_with_their_warm_process_and_the_next_one_gets_a_new_one(start, warm):
    rank = start("trains_and_ignores_signals")
    pid, before = pid_of(rank), warm._process.pid
    os.kill(before, signal.SIGKILL)
    wait_for_end(rank)
    assert "warm process" in rank.how_it_ended()
    assert "SIGKILL (was the machine out of memory?)" in rank.how_it_ended()
    rank.kill()
    wait_until(lambda: not is_there(pid), "the rank is gone")
    assert pid_of(start("trains")) != pid
    assert warm._process.pid != before


def test_closing_a_warm_process_ends_its_ranks_and_leaves_no_descriptor_open(tmp_path, environment_with):
    gc.collect()  # what other tests have left is not to be closed meanwhile
    before = len(os.listdir("/proc/self/fd"))
    (tmp_path / "behaviour").write_text("trains_and_ignores_signals")
    warm = WarmProcess(tmp_path, 1, environment_with(LIGHT))
    rank = warm.start_rank(0, 1)
    pid = pid_of(rank)
    warm.close()
    rank.close()
    wait_until(lambda: not is_there(pid), "the rank is gone")
    assert len(os.listdir("/proc/self/fd")) == before
    assert not is_there(warm._process.pid)


def test_a_warm_process_without_a_rank_leaves_no_descriptor_open(tmp_path, environment_with):
    gc.collect()  # what other tests have left is not to be closed meanwhile
    before = len(os.listdir("/proc/self/fd"))
    WarmProcess(tmp_path, 1, environment_with(LIGHT)).close()
    assert len(os.listdir("/proc/self/fd")) == before


AGENT = """
import os, sys, time
from pathlib import Path
from allreduce_spark.launch.warm import WarmProcess
warm = WarmProcess(Path(sys.argv[1]), 1, os.environ)
rank = warm.start_rank(0, 1)
while sys.argv[2] == "forked" and not rank._forked():
    time.sleep(0.001)
print(warm._process.pid, *(rank._forked() or ())[:1], flush=True)
time.sleep(0 if sys.argv[2] == "forked" else float(sys.argv[2]))
os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("moment", ["0", "0.05", "0.1", "0.5", "forked"])
def test_warm_process_and_rank_die_with_the_agent_however_early_that_dies(tmp_path, moment, environment_with):
    """Also in the moment before they have asked the kernel for it."""
    (tmp_path / "behaviour").write_text("writes_its_pid")
    StatusPage(tmp_path / "status")
    answer = subprocess.run(
        [sys.executable, "-c", AGENT, tmp_path, moment],
        stdout=subprocess.PIPE,
        timeout=60,
        env=environment_with(LIGHT),
        check=False,
    )
    pids = [int(pid) for pid in answer.stdout.split()]
    assert len(pids) == 1 + (moment == "forked")
    wait_until(lambda: not any(map(is_there, pids)), "warm process and rank are gone")
    if (written := tmp_path / "pid").exists():
        wait_until(lambda: not is_there(int(written.read_text())), "the rank is gone")
