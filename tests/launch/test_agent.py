"""Agents and their ranks as real processes: whatever happens, the driver hears the cause, and nothing is left."""

from __future__ import annotations

import logging
import os
import re
import signal
import time
from pathlib import Path

import pytest

from allreduce_spark.config import Timeouts
from allreduce_spark.rendezvous import controller
from allreduce_spark.rendezvous.group import Failure
from allreduce_spark.rendezvous.recovery import Restarts

# Killing takes milliseconds; the rest is for a machine that is busy with other things.
SOON_S = 10.0


def wait_until(is_so, what: str, timeout_s: float = 60.0) -> float:
    started = time.monotonic()
    while not is_so():
        assert time.monotonic() - started < timeout_s, f"not within {timeout_s} s: {what}"
        time.sleep(0.01)
    return time.monotonic() - started


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# Success


def test_a_fit_brings_the_result_of_the_root_to_the_driver_and_leaves_nothing(clean_fit):
    clean_fit.start("finishes", "finishes")
    assert clean_fit.end() is None
    assert clean_fit.result == b"the result of the root"
    assert {"epoch": 0, "steps_done": 1} in clean_fit.progress
    assert clean_fit.agent_errors() == ["", ""]
    assert [agent.returncode for agent in clean_fit.agents] == [0, 0]


def test_a_rank_without_rows_takes_part(clean_fit):
    rows = []
    clean_fit.start(
        "finishes",
        "finishes",
        rows=["none", "three"],
        approve=lambda joins: {"spec": rows.append([join.shards[0].rows for join in joins])},
    )
    assert clean_fit.end() is None
    assert rows == [[0, 3]]


def test_a_result_that_takes_longer_than_silence_and_teardown_arrives(clean_fit):
    clean_fit.start(
        "has_a_large_result 40",
        on_result=lambda rank, piece: (clean_fit._keep(rank, piece), time.sleep(0.1)),
        timeouts=Timeouts(heartbeat_s=0.05, silence_s=3, teardown_s=3),
    )
    assert clean_fit.end() is None
    assert len(clean_fit.result) == 40 << 20
    assert clean_fit.agent_errors() == [""]


def test_a_rank_that_does_not_exit_after_its_work_is_killed_after_teardown_s(clean_fit):
    clean_fit.start("hangs_at_the_end", timeouts=Timeouts(heartbeat_s=0.1, teardown_s=0.5, silence_s=30))
    assert clean_fit.end() is None
    assert clean_fit.result == b"the result of the root"


def test_a_rank_that_crashes_after_its_work_has_succeeded(clean_fit):
    clean_fit.start("is_killed_at_the_end", "finishes")
    assert clean_fit.end() is None
    assert clean_fit.result == b"the result of the root"


def test_what_a_rank_prints_while_it_is_imported_is_read_in_the_end(clean_fit):
    clean_fit.start("prints_before_it_is_started", rows=["slow"])
    assert clean_fit.end() is None


def test_temporary_files_of_a_rank_are_gone_with_its_folder(clean_fit):
    clean_fit.start("writes_a_temporary_file")
    assert clean_fit.end() is None
    path = Path(next(fields["path"] for fields in clean_fit.progress if "path" in fields))
    assert path.is_relative_to(clean_fit.disk)
    assert not path.exists()


# A rank fails


def test_a_rank_that_is_killed_takes_the_others_with_it(clean_fit):
    clean_fit.start("trains_and_ignores_signals", "dies", "trains")
    failure = clean_fit.end()
    assert (failure.error, failure.rank, failure.phase, failure.step) == ("RankDied", 1, "train", 7)
    assert "SIGKILL" in failure.cause
    assert failure.host == os.uname().nodename
    assert failure.log_tail == (*(f"line {number}" for number in range(11, 60)), "last words without an end")
    assert clean_fit.agent_errors() == ["", "", ""], "the driver knows: nothing for Spark to report"


def test_all_ranks_are_dead_soon_after_one_was_killed_from_outside(clean_fit):
    clean_fit.start("trains", "trains")
    clean_fit.wait_for_training()
    victim, _ = clean_fit.ranks()
    os.kill(victim, signal.SIGKILL)
    assert wait_until(lambda: not clean_fit.ranks(), "all ranks are dead") < SOON_S
    assert clean_fit.end().error == "RankDied"


def test_a_rank_that_exits_with_a_code_is_a_failure_that_names_it(clean_fit):
    clean_fit.start("trains", "exits 3")
    failure = clean_fit.end()
    assert (failure.rank, failure.step) == (1, 7)
    assert failure.cause == "the rank process ended with exit code 3 before its work was done"
    assert failure.log_tail == ("about to exit",)


def test_an_exit_in_peace_without_a_result_is_a_failure(clean_fit):
    clean_fit.start("exits 0")
    assert "exit code 0 before its work was done" in clean_fit.end().cause


def test_an_exception_in_a_rank_reaches_the_driver_with_its_traceback(clean_fit):
    clean_fit.start("raises", "trains")
    failure = clean_fit.end()
    assert (failure.error, failure.rank, failure.phase, failure.step) == ("ValueError", 0, "train", 7)
    assert "a label of 11, but there are 10 classes ✗" in failure.cause
    assert "in raises" in failure.cause
    assert failure.log_tail[0] == "before the error"
    assert "ValueError" in failure.log_tail[-1]


def test_the_death_of_a_rank_is_shown_and_not_what_it_did_to_another(clean_fit, monkeypatch):
    monkeypatch.setattr(controller, "GRACE_S", 30.0)  # the second rank may have started much later than the first
    clean_fit.start("loses_the_others", "dies_a_little_later")
    failure = clean_fit.end()
    assert (failure.rank, failure.error) == (1, "RankDied")


def test_a_rank_that_cannot_import_tensorflow_says_what_to_install(clean_fit):
    clean_fit.start("cannot_be_imported")
    failure = clean_fit.end()
    assert (failure.error, failure.phase, failure.step) == ("ModuleNotFoundError", "import", None)
    assert "allreduce-spark[tensorflow]" in failure.cause


def test_a_rank_that_dies_before_it_is_let_go_does_not_wait_for_the_end_of_the_rows(clean_fit):
    clean_fit.start("exits_before_the_start", "finishes", rows=["endless", "endless"])
    failure = clean_fit.end()
    assert (failure.rank, failure.phase, failure.step) == (0, "import", None)
    assert failure.log_tail == ("no TensorFlow here",)


def test_a_rank_that_dies_just_when_it_is_let_go_is_reported_as_such(clean_fit):
    clean_fit.start("exits_before_the_start", "finishes", rows=["slow", "three"])
    failure = clean_fit.end()
    assert (failure.rank, failure.error) == (0, "RankDied")
    assert "exit code 9" in failure.cause
    assert clean_fit.agent_errors() == ["", ""]


def test_a_rank_whose_child_keeps_its_output_open_is_not_waited_for(fit):
    fit.start("leaves_a_child_behind")
    assert "exit code 4" in fit.end().cause


def test_garbage_from_a_rank_is_its_failure(clean_fit):
    clean_fit.start("babbles_into_its_channel", "trains")
    failure = clean_fit.end()
    assert (failure.rank, failure.error) == (0, "ProtocolError")


# MPI


def test_a_rank_killed_between_its_mpi_steps_leaves_no_shared_memory(clean_fit):
    clean_fit.start(f"speaks_mpi {clean_fit.segment}", f"speaks_mpi {clean_fit.segment}")
    failure = clean_fit.end()
    assert (failure.rank, failure.error) == (0, "RankDied")
    assert failure.log_tail[-1].startswith("met"), "both ranks had found each other"


def test_a_rank_that_aborts_mpi_is_reported_with_its_log(clean_fit):
    clean_fit.start("aborts_mpi", "trains")
    failure = clean_fit.end()
    assert (failure.rank, failure.error) == (0, "MPIAbort")
    assert "exit code 15" in failure.cause
    assert failure.log_tail == ("Fatal error in internal_Init",)


# What it prints


def test_a_rank_that_prints_without_end_is_neither_blocked_nor_does_it_flood_the_driver(clean_fit, caplog):
    caplog.set_level(logging.INFO, "allreduce_spark.rank")
    clean_fit.start("prints_many_lines")
    assert clean_fit.end() is None
    assert clean_fit.result == b"printed"
    lines = [message.rpartition("] ")[2] for message in caplog.messages if "line" in message]
    assert "line 0" in lines
    left_out = [int(found[1]) for line in lines if (found := re.search(r"\((\d+) lines are left out here\)", line))]
    numbers = [int(line.split()[1]) for line in lines if line.startswith("line ")]
    assert numbers == sorted(numbers)
    assert len(numbers) < 50_000
    assert len(numbers) + sum(left_out) == 200_000


def test_a_line_without_end_costs_no_memory_and_reaches_the_log_in_pieces(clean_fit, caplog):
    caplog.set_level(logging.INFO, "allreduce_spark.rank")
    clean_fit.start("prints_a_line_without_end")
    assert clean_fit.end() is None
    assert max(map(len, caplog.messages)) < 2200


def test_output_that_is_no_text_is_shown_as_far_as_possible(clean_fit):
    clean_fit.start("prints_bytes")
    assert clean_fit.end().log_tail == ("caf� ��\x00", "next")


def test_a_rank_that_closes_its_output_does_not_keep_its_agent_busy(fit):
    fit.start("closes_its_output")
    fit.wait_for_training()
    (agent,) = fit.agents
    time.sleep(0.3)
    before = cpu_seconds(agent.pid)
    time.sleep(1)
    assert cpu_seconds(agent.pid) - before < 0.4
    fit.rendezvous.fail(Failure("Interrupted", "enough"))
    fit.end()


# The rows


def test_a_bad_row_is_reported_and_no_rank_is_let_go(clean_fit):
    clean_fit.start("trains", "trains", rows=["three", "bad"])
    failure = clean_fit.end()
    assert (failure.error, failure.rank, failure.phase, failure.step) == ("DataError", 1, "spool", None)
    assert "partition 1, row 1" in failure.cause
    assert "Traceback" not in failure.cause
    assert "train" not in {fields.get("phase") for fields in clean_fit.progress}


def test_a_full_disk_is_reported_as_what_it_is(clean_fit):
    clean_fit.start("trains", "trains", rows=["broken", "three"])
    failure = clean_fit.end()
    assert (failure.error, failure.rank, failure.phase) == ("OSError", 0, "spool")
    assert "No space left on device" in failure.cause
    assert clean_fit.agent_errors() == ["", ""]


def test_an_agent_without_a_place_for_its_folder_says_so(fit):
    fit.disk.rmdir()
    fit.start("trains")
    failure = fit.end()
    assert failure.error == "FileNotFoundError"
    assert str(fit.disk) in failure.cause


def test_an_abort_while_rows_are_spooled_is_heard(clean_fit):
    clean_fit.start("trains", "trains", rows=["endless", "endless"])
    wait_until(lambda: len(clean_fit.ranks()) == 2, "both ranks have been started")
    clean_fit.rendezvous.fail(Failure("Interrupted", "Ctrl-C on the driver"))
    started = time.monotonic()
    assert clean_fit.end().error == "Interrupted"
    assert time.monotonic() - started < SOON_S


def test_the_driver_is_heard_again_after_a_long_silence_of_the_stage_above(clean_fit):
    clean_fit.start(
        "finishes", "finishes", rows=["slow", "slow"], timeouts=Timeouts(heartbeat_s=0.1, silence_s=2, teardown_s=20)
    )
    assert clean_fit.end() is None


# An agent or the driver fails


def test_an_agent_that_is_killed_takes_its_rank_with_it_and_is_named(fit):
    fit.start("trains_and_ignores_signals", "trains_and_ignores_signals")
    fit.wait_for_training()
    fit.agents[1].kill()
    assert wait_until(lambda: not fit.ranks(), "all ranks are dead") < SOON_S
    failure = fit.end()
    assert (failure.error, failure.rank, failure.phase, failure.step) == ("AgentLost", 1, "train", 7)
    assert len(fit.folders()) == 1, "nobody could remove the folder of the dead agent; the next agent does"


def test_the_end_of_a_warm_process_is_reported_as_that_of_its_rank(clean_fit):
    clean_fit.start("trains_and_ignores_signals", "trains")
    clean_fit.wait_for_training()
    os.kill(clean_fit.warm_processes()[0], signal.SIGKILL)
    failure = clean_fit.end()
    assert (failure.error, failure.phase, failure.step) == ("RankDied", "train", 7)
    assert "the warm process, from which the rank was forked, was killed by SIGKILL" in failure.cause


def test_the_next_agent_on_the_machine_clears_up_after_a_dead_one(fit):
    fit.start("trains")
    fit.wait_for_training()
    fit.agents[0].kill()
    fit.end()
    fit.rendezvous.close()
    fit.agents.clear()
    fit.start("finishes")
    assert fit.end() is None
    assert not fit.folders()


@pytest.mark.parametrize("way", [signal.SIGKILL, signal.SIGTERM])
def test_agents_kill_their_ranks_and_raise_when_the_driver_dies(clean_fit, way):
    driver = clean_fit.start_with_driver("trains_and_ignores_signals", "trains_and_ignores_signals")
    wait_until(lambda: len(clean_fit.ranks()) == 2, "both ranks have been started")
    driver.send_signal(way)
    driver.communicate()
    assert wait_until(lambda: not clean_fit.ranks(), "all ranks are dead") < SOON_S
    for error in clean_fit.agent_errors():
        assert "RendezvousError: the driver is gone" in error


def test_a_stopped_agent_is_named_after_silence_s_and_leaves_once_it_goes_on(clean_fit):
    clean_fit.start("trains", "trains", timeouts=Timeouts(heartbeat_s=0.1, silence_s=4, teardown_s=20))
    clean_fit.wait_for_training()
    clean_fit.agents[0].send_signal(signal.SIGSTOP)
    assert clean_fit.rendezvous.wait(60)
    clean_fit.agents[0].send_signal(signal.SIGCONT)
    failure = clean_fit.end()
    assert (failure.error, failure.rank) == ("RendezvousTimeoutError", 0)
    assert clean_fit.agent_errors() == ["", ""]


def test_a_second_attempt_of_the_stage_ends_at_once_and_disturbs_nobody(clean_fit):
    clean_fit.start("trains", "trains")
    clean_fit.wait_for_training()
    clean_fit.start_agent(clean_fit.rendezvous.address, 0, 2, "trains", rows="endless")
    second = clean_fit.agents.pop()
    assert second.communicate(timeout=60)[1] == ""
    assert len(clean_fit.ranks()) == 2
    clean_fit.rendezvous.fail(Failure("Interrupted", "enough"))
    clean_fit.end()


def test_a_result_that_nobody_can_keep_any_more_is_not_sent_to_its_end(clean_fit):
    def full_disk(rank: int, piece: bytes) -> None:
        raise OSError(28, "No space left on device")

    clean_fit.start("has_a_large_result 200", on_result=full_disk)
    failure = clean_fit.end()
    assert (failure.error, failure.rank) == ("OSError", None)


# Other generations


def test_after_the_death_of_a_rank_all_are_started_again_and_the_fit_succeeds(clean_fit, caplog):
    caplog.set_level(logging.INFO)
    causes = []
    clean_fit.start("survives 2", "survives 2", restarts=Restarts(1), on_restart=causes.append)
    assert clean_fit.end() is None
    assert clean_fit.result == b"the result of the root"
    assert [(cause.error, cause.rank, cause.epoch, cause.step) for cause in causes] == [
        ("RankDied", 1, 2, 8),
        ("RankDied", 1, 2, 9),
    ]
    assert clean_fit.agent_errors() == ["", ""]
    for generation in range(3):
        assert f"[rank 1 on {causes[0].host}] generation {generation}" in caplog.messages


def test_ranks_that_come_no_further_are_not_started_for_ever(clean_fit):
    clean_fit.start("dies", "trains", restarts=Restarts(2))
    failure = clean_fit.end()
    assert (failure.error, failure.rank) == ("RankDied", 0)
    assert "started again 2 times and came no further (max_restarts=2)" in failure.cause


def test_an_error_that_comes_again_at_the_same_step_is_the_users(clean_fit):
    clean_fit.start("always_fails", "trains", restarts=Restarts(5))
    failure = clean_fit.end()
    assert failure.error == "ValueError"
    assert "a label of 11" in failure.cause
    assert "the same error came at the same step again" in failure.cause


def test_the_loss_of_an_agent_ends_the_stage_whatever_restarts_are_allowed(fit):
    fit.start("trains", "trains", restarts=Restarts(5))
    fit.wait_for_training()
    fit.agents[1].kill()
    failure = fit.end()
    assert (failure.error, failure.rank) == ("AgentLost", 1)
    assert fit.rendezvous.stage_is_lost


def test_a_rank_that_dies_while_another_agent_still_reads_rows_is_started_again(clean_fit):
    clean_fit.start("exits_at_first", "finishes", rows=["three", "slow"], restarts=Restarts(1))
    assert clean_fit.end() is None
    assert clean_fit.result == b"the result of the root"
