"""Whatever stops, nobody waits for it longer than its setting says, and the error names it: real processes, and SIGSTOP."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from allreduce_spark.config import Timeouts

WAIT_S = 60.0
FAST = Timeouts(heartbeat_s=0.1)


def wait_until(is_so, what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < deadline, f"not within {WAIT_S} s: {what}"
        time.sleep(0.01)


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[0]


def is_stopped(pid: int) -> bool:
    return state_of(pid) == "T"


def outcome_of(driver: subprocess.Popen[str]) -> str:
    return driver.communicate(timeout=WAIT_S)[0]


# A rank


@pytest.mark.parametrize(
    ("phase", "setting"),
    [
        ("import", "import_s"),
        ("init", "init_s"),
        ("first step", "step_s"),
        ("train", "step_s"),
        ("validate", "step_s"),
        ("result", "result_s"),
        ("teardown", "teardown_s"),
    ],
)
def test_a_rank_that_is_stopped_in_a_phase_is_named_when_the_time_of_the_phase_is_over(clean_fit, phase, setting):
    timeouts = dataclasses.replace(FAST, **{setting: 1.5})
    clean_fit.start(f"stops_in {phase}", f"stops_in {phase}", timeouts=timeouts)
    failure = clean_fit.end()
    assert (failure.error, failure.rank, failure.phase) == ("RendezvousTimeoutError", 1, phase)
    assert f"this rank has been in phase '{phase}'" in failure.cause
    assert failure.cause.endswith(f"Setting: Timeouts.{setting}")


def test_a_rank_that_is_stopped_after_its_last_word_is_killed_and_the_fit_has_succeeded(clean_fit):
    clean_fit.start("stops_at_the_end", "stops_at_the_end", timeouts=dataclasses.replace(FAST, teardown_s=0.5))
    assert clean_fit.end() is None
    assert clean_fit.result == b"the result of the root"


def test_a_warm_process_that_is_stopped_before_it_forks_is_a_rank_that_does_not_come(clean_fit):
    clean_fit.start("stops_before_the_fork", "trains", timeouts=dataclasses.replace(FAST, import_s=1.5))
    failure = clean_fit.end()
    assert (failure.error, failure.phase) == ("RendezvousTimeoutError", "import")
    assert "Timeouts.import_s" in failure.cause


# An agent


def test_rows_that_never_come_are_waited_for_until_spool_s_is_over(fit):
    fit.start("trains", "trains", rows=["stuck", "stuck"], timeouts=dataclasses.replace(FAST, spool_s=6))
    assert fit.rendezvous.wait(WAIT_S)
    failure = fit.rendezvous.failure
    assert (failure.error, failure.rank, failure.phase) == ("RendezvousTimeoutError", 1, "spool")
    assert "Timeouts.spool_s" in failure.cause
    assert fit.agents[0].wait(WAIT_S) == 0, "the other one has left"


def test_a_full_pipe_holds_up_the_rank_while_its_agent_is_stopped_and_no_longer(clean_fit):
    clean_fit.start("prints_until_it_is_enough", timeouts=FAST)
    fill_pipe(clean_fit)
    (folder,) = clean_fit.folders()
    (folder / "enough").touch()
    clean_fit.agents[0].send_signal(signal.SIGCONT)
    assert clean_fit.end() is None
    assert clean_fit.result == b"printed"


def test_an_agent_that_is_stopped_while_its_rank_fills_the_pipe_is_named_and_leaves_nothing(clean_fit):
    clean_fit.start("prints_until_it_is_enough", timeouts=dataclasses.replace(FAST, silence_s=2))
    fill_pipe(clean_fit)
    assert clean_fit.rendezvous.wait(WAIT_S)
    clean_fit.agents[0].send_signal(signal.SIGCONT)
    failure = clean_fit.end()
    assert (failure.error, failure.rank, failure.phase) == ("RendezvousTimeoutError", 0, "train")
    assert "Timeouts.silence_s" in failure.cause


def fill_pipe(fit) -> None:
    """Stop the agent of a rank that prints, until the rank can print no more."""
    fit.wait_for_training()
    fit.agents[0].send_signal(signal.SIGSTOP)
    (rank,) = fit.ranks()
    wait_until(lambda: "pipe" in Path(f"/proc/{rank}/wchan").read_text(), "the rank waits for its pipe")


# The driver


def test_a_driver_that_is_stopped_for_less_than_silence_s_loses_nobody(clean_fit):
    driver = clean_fit.start_with_driver("has_a_large_result 40", "finishes", stops_itself=True)
    wait_until(lambda: is_stopped(driver.pid), "the driver has stopped in the midst of the result")
    time.sleep(3)
    driver.send_signal(signal.SIGCONT)
    assert outcome_of(driver) == f"{40 << 20} bytes, None\n"
    assert clean_fit.agent_errors() == ["", ""]


@pytest.mark.parametrize("rows", ["three", "endless"], ids=["training", "spool"])
def test_agents_leave_a_driver_that_is_stopped_for_longer_than_silence_s_and_it_learns_why(clean_fit, rows):
    timeouts = dataclasses.replace(FAST, silence_s=2)
    driver = clean_fit.start_with_driver("trains", "trains", rows=rows, timeouts=timeouts)
    wait_until(lambda: len(clean_fit.ranks()) == 2, "both ranks have been started")
    driver.send_signal(signal.SIGSTOP)
    for rank, error in enumerate(clean_fit.agent_errors()):
        assert f"RendezvousError: rank {rank} has not heard of the driver" in error
        assert "Timeouts.silence_s" in error
    assert not clean_fit.ranks()
    driver.send_signal(signal.SIGCONT)
    outcome = outcome_of(driver)
    assert "has not heard of the driver" in outcome
    assert "Timeouts.silence_s" in outcome
    assert "stage_lost=True" in outcome, "so another barrier stage may go on"


def test_an_agent_that_cannot_send_its_result_leaves_the_driver_after_silence_s(clean_fit):
    timeouts = dataclasses.replace(FAST, silence_s=2)
    driver = clean_fit.start_with_driver("has_a_large_result 40", "trains", timeouts=timeouts, stops_itself=True)
    wait_until(lambda: is_stopped(driver.pid), "the driver has stopped in the midst of the result")
    sender, other = clean_fit.agent_errors()
    assert "RendezvousError: the driver is gone: it did not take a " in sender
    assert "RendezvousError: rank 1 has not heard of the driver" in other
    assert "Timeouts.silence_s" in sender
    driver.kill()
    driver.communicate()


# The network


@pytest.fixture
def two_hosts():
    """The names of two network namespaces, with a cable between them: the first is 10.9.8.1."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root, and the command `ip`")
    hosts = [f"stalls{os.getpid()}-{number}" for number in (1, 2)]
    with contextlib.ExitStack() as stack:
        for host in hosts:
            ip("netns", "add", host)
            stack.callback(ip, "netns", "del", host)
        ip("-n", hosts[0], "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", hosts[1])
        for number, host in enumerate(hosts, 1):
            ip("-n", host, "addr", "add", f"10.9.8.{number}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", host, "link", "set", device, "up")
        yield hosts


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@pytest.mark.cluster
@pytest.mark.parametrize("behaviour", ["trains", "has_a_large_result 200"], ids=["training", "result"])
def test_a_host_that_is_cut_off_is_named_and_its_agent_ends_by_itself(clean_fit, two_hosts, behaviour):
    """Rank 1 is on the driver's own host, rank 0 on the other one: a word to it has nowhere to go, and no end either."""
    here, there = (("ip", "netns", "exec", host) for host in two_hosts)
    driver = clean_fit.start_with_driver(
        behaviour,
        "trains",
        timeouts=dataclasses.replace(FAST, silence_s=2, teardown_s=1),
        host="10.9.8.1",
        prefixes=(here, there, here),
    )
    wait_until(lambda: len(clean_fit.ranks()) == 2, "both ranks have been started")
    ip("-n", two_hosts[1], "link", "set", "eth0", "down")
    cut_off, other = clean_fit.agent_errors()
    assert "Timeouts.silence_s" in cut_off
    assert other == "", "the driver has told it"
    outcome = outcome_of(driver)
    assert "the driver has not heard of this rank's agent for" in outcome
    assert "rank=0" in outcome
    assert "Timeouts.silence_s" in outcome
