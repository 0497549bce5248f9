"""The status page, shared by two processes."""

from __future__ import annotations

import subprocess
import sys

import pytest

from allreduce_spark.rendezvous.protocol import Phase
from allreduce_spark.rendezvous.status import StatusPage


@pytest.mark.parametrize("phase", Phase)
def test_what_is_written_is_read(tmp_path, phase):
    page = StatusPage(tmp_path / "status")
    page.write(phase, 3, 2**40)
    assert page.read() == (phase, 3, 2**40)
    page.close()


def test_a_new_page_says_that_nothing_has_begun(tmp_path):
    assert StatusPage(tmp_path / "status").read() == (next(iter(Phase)), 0, 0)


def test_opening_a_page_again_keeps_what_it_says(tmp_path):
    StatusPage(tmp_path / "status").write(Phase.TRAIN, 1, 2)
    assert StatusPage(tmp_path / "status").read() == (Phase.TRAIN, 1, 2)


def test_the_last_words_of_a_process_that_was_killed_are_still_there(tmp_path):
    agents = StatusPage(tmp_path / "status")
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from allreduce_spark.rendezvous.status import Phase, StatusPage\n"
        "StatusPage(Path(sys.argv[1])).write(Phase.TRAIN, 4, 17); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "status"], timeout=60, check=False)
    assert agents.read() == (Phase.TRAIN, 4, 17)


def test_only_its_user_may_read_the_page(tmp_path):
    StatusPage(tmp_path / "status")
    assert (tmp_path / "status").stat().st_mode & 0o077 == 0


def test_waiting_and_the_wish_to_regroup_are_told_beside_the_place(tmp_path):
    rank, agent = StatusPage(tmp_path / "status"), StatusPage(tmp_path / "status")
    rank.write(Phase.TRAIN, 1, 2)
    rank.write_waiting(True, 3.25)
    agent.ask_to_regroup()
    assert agent.read_waiting() == (True, 3.25)
    assert rank.is_to_regroup
    agent.ask_to_regroup(False)
    rank.write_waiting(False, 4.5)
    assert (agent.read_waiting(), rank.is_to_regroup, rank.read()) == ((False, 4.5), False, (Phase.TRAIN, 1, 2))
