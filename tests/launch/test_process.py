"""The rank process, seen from its agent. The real `allreduce_spark.training`, with the light rank of `light/` in it."""

from __future__ import annotations

import gc
import os
import select
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from allreduce_spark.launch.process import RankProcess
from allreduce_spark.rendezvous.protocol import Phase
from allreduce_spark.rendezvous.status import StatusPage

MEMBERSHIP = {"membership": {"world": {"rank": 1}}}


@pytest.fixture
def start(start_rank):
    """Start a rank 1 of 2 of some behaviour."""
    return partial(start_rank, rank=1, num_ranks=2)


def pid_of(rank: RankProcess) -> int:
    """Its process, once it has been forked."""
    deadline = time.monotonic() + 60
    while not rank._forked():
        assert time.monotonic() < deadline, "the rank is not forked"
        time.sleep(0.001)
    return rank._forked()[0]


def wait_for_phase(rank: RankProcess, phase: Phase) -> None:
    status = StatusPage(rank._folder / "status")
    deadline = time.monotonic() + 60
    while status.read()[0] is not phase:
        assert time.monotonic() < deadline, f"the rank does not come to {phase}"
        time.sleep(0.001)


def wait_for_line(rank: RankProcess, part: str) -> str:
    deadline = time.monotonic() + 60
    while True:
        for line in rank.read_output():
            if part in line:
                return line
        assert time.monotonic() < deadline, f"the rank does not print {part!r}"
        time.sleep(0.001)


def wait_for_end(rank: RankProcess) -> None:
    assert select.select([rank.ended], [], [], 60)[0], "the rank does not end"


def read_to_the_end(rank: RankProcess) -> list[str]:
    lines = []
    deadline = time.monotonic() + 60
    while not rank.output_ended:
        assert time.monotonic() < deadline
        lines += rank.read_output()
        time.sleep(0.001)
    return lines


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
    except OSError:
        return False
    return state not in "ZX"


def test_a_rank_reports_and_ends(start):
    rank = start("finishes")
    rank.channel.send("start", **MEMBERSHIP)
    message = rank.channel.receive(60)
    assert (message.kind, message.fields) == ("done", {})
    wait_for_end(rank)
    assert rank.has_ended()
    assert rank.how_it_ended() == "the rank process ended with exit code 0 before its work was done"


def test_the_end_of_a_rank_can_be_waited_for_even_after_somebody_asked(start):
    rank = start("exits_before_the_start")
    deadline = time.monotonic() + 60
    while not rank.has_ended():  # this reaps it
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert select.select([rank.ended], [], [], 60)[0]


def test_all_that_a_rank_printed_is_read_and_the_last_fifty_lines_are_kept(start):
    rank = start("dies")
    rank.channel.send("start", **MEMBERSHIP)
    lines = read_to_the_end(rank)
    assert lines == [*(f"line {number}" for number in range(60)), "last words without an end"]
    assert list(rank.tail) == lines[-50:]
    wait_for_end(rank)
    assert rank.has_ended()
    assert rank.how_it_ended() == "the rank process was killed by SIGKILL (was the machine out of memory?)"


def test_a_line_without_end_is_cut_and_reading_it_needs_little_memory(start):
    rank = start("prints_a_line_without_end")
    rank.channel.send("start", **MEMBERSHIP)
    lines = read_to_the_end(rank)
    assert max(map(len, lines)) <= 2000
    assert len(rank._unfinished) <= 2000
    assert set("".join(lines)) <= {"━", "�"}


def test_reading_the_output_never_blocks(start):
    rank = start("trains")
    started = time.monotonic()
    assert rank.read_output() == []
    assert time.monotonic() - started < 1
    assert not rank.output_ended


@pytest.mark.parametrize(
    ("code", "said"),
    [(-signal.SIGSEGV, "killed by SIGSEGV"), (-40, "killed by signal 40"), (3, "ended with exit code 3")],
)
def test_how_a_rank_ended_is_said_for_every_signal(start, code, said):
    rank = start("trains")
    rank.kill()
    rank._exit_code = code
    assert said in rank.how_it_ended()


def test_a_rank_that_ignores_signals_is_killed_at_once_and_closing_twice_kills_once(start):
    rank = start("trains_and_ignores_signals")
    pid = pid_of(rank)
    rank.kill()
    rank.kill()
    assert not is_alive(pid)


def test_closing_leaves_no_descriptor_open(tmp_path, start):
    start("trains").close()
    gc.collect()  # what other tests have left is not to be closed meanwhile
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        rank = start("trains")
        pid_of(rank)
        rank.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_rank_inherits_its_two_sockets_and_nothing_else(start, tmp_path):
    with open(tmp_path / "open", "w") as secret:
        os.set_inheritable(secret.fileno(), True)
        pid_of(start("trains"))  # another rank, whose descriptors are open where this one comes from
        rank = start("trains")
        rank.channel.send("start", **MEMBERSHIP)
        wait_for_phase(rank, Phase.TRAIN)
        opened = [os.readlink(path) for path in Path(f"/proc/{pid_of(rank)}/fd").iterdir()]
    assert str(tmp_path / "open") not in opened
    assert sum(name.startswith("socket:") for name in opened) == 2
    others = {name for name in opened if not name.startswith("socket:")}
    assert others == {"/dev/null", f"pipe:[{inode(rank.output)}]", str(tmp_path / "status")}


def inode(descriptor: int) -> int:
    return os.fstat(descriptor).st_ino


def test_a_rank_can_be_asked_for_its_stack_and_goes_on(start):
    rank = start("trains")
    rank.channel.send("start", **MEMBERSHIP)
    wait_for_phase(rank, Phase.TRAIN)
    rank.dump_stack()
    assert "in trains" in wait_for_line(rank, "in trains")
    assert not rank.has_ended()


def test_asking_a_rank_that_has_ended_for_its_stack_does_nothing(start):
    rank = start("exits_before_the_start")
    wait_for_end(rank)
    rank.dump_stack()
    assert rank.has_ended()


def test_a_rank_that_nobody_wants_any_more_is_killed_by_its_warm_process_too(start):
    """The agent may let go of a rank in the very moment in which it is forked, when it does not know the process yet."""
    rank = start("trains_and_ignores_signals")
    pid = pid_of(rank)
    rank._lifeline.close()
    wait_for_end(rank)
    assert not is_alive(pid)
    assert rank.has_ended()
    assert "SIGKILL" in rank.how_it_ended()
