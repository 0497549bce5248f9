"""The driver's end, over real sockets, with agents that the test plays."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
import time
from types import SimpleNamespace

import pytest

from allreduce_spark.config import Timeouts
from allreduce_spark.errors import DataError, RendezvousError
from allreduce_spark.rendezvous import controller, gate, protocol
from allreduce_spark.rendezvous.client import Connection
from allreduce_spark.rendezvous.controller import Hooks
from allreduce_spark.rendezvous.group import Failure
from allreduce_spark.rendezvous.recovery import Restarts
from allreduce_spark.rendezvous.server import Rendezvous


def eventually(is_so, what: str, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.01)


def rendezvous_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "allreduce-spark-rendezvous"]


# Meeting


def test_agents_that_have_all_joined_are_told_who_they_are(meet):
    meeting = meet(3, approve=lambda joins: {"rows": [join.shards[0].rows for join in joins]})
    agents = [meeting.agent(rank) for rank in (2, 0, 1)]
    for agent in agents:
        agent.join(host_key="ABA"[agent.rank], rows=agent.rank)
    told = {agent.rank: agent.hear().fields for agent in agents}
    assert [told[rank]["membership"]["world"]["rank"] for rank in range(3)] == [0, 1, 2]
    assert [told[rank]["membership"]["world"]["node_rank"] for rank in range(3)] == [0, 1, 0]
    assert told[0]["approved"] == told[1]["approved"] == {"rows": [0, 1, 2]}
    assert len({fields["membership"]["key_space"] for fields in told.values()}) == 1


def test_nobody_is_let_go_before_the_last_has_joined(meet):
    meeting = meet(2)
    early, late = meeting.agent(0), meeting.agent(1)
    early.join()
    with pytest.raises(RendezvousError, match="nothing was received"):
        early.hear(timeout_s=0.3)
    late.join()
    assert early.hear().kind == late.hear().kind == "member"


def test_two_fits_never_share_a_key_space(meet):
    names = set()
    for _ in range(2):
        agent = meet(1).agent(0)
        agent.join()
        names.add(agent.hear().fields["membership"]["key_space"])
    assert len(names) == 2


def test_mpi_finds_its_peers_through_the_agents(meet):
    zero, one = meet(2).gather(host_keys="AB")

    def ask(agent, line):
        agent.say("pmi", line=line)
        return agent.hear().fields["line"]

    name = ask(zero, "cmd=get_my_kvsname").rpartition("=")[2]
    assert ask(one, f"cmd=put kvsname={name} key=address value=tcp 1.2.3.4").startswith("cmd=put_result rc=0")
    assert ask(zero, f"cmd=get kvsname={name} key=PMI_process_mapping").endswith("value=(vector,(0,2,1))")
    one.say("pmi", line="cmd=barrier_in")
    assert ask(zero, "cmd=barrier_in") == one.hear().fields["line"] == "cmd=barrier_out"
    assert ask(zero, f"cmd=get kvsname={name} key=address").endswith("value=tcp 1.2.3.4")


def test_the_fit_is_over_once_every_rank_is_done(meet):
    meeting = meet(2)
    zero, one = meeting.gather()
    zero.say("done")
    assert not meeting.rendezvous.wait(0.2)
    one.say("done")
    assert zero.hear().kind == one.hear().kind == "finish"
    meeting.end()
    assert meeting.rendezvous.failure is None


def test_results_arrive_whole_and_in_order(meet):
    meeting = meet(2)
    zero, one = meeting.gather()
    pieces = [bytes([number]) * (1 << 20) for number in range(10)]
    for piece in pieces:
        zero.say("result", piece)
    one.say("result", b"that of rank 1")
    one.say("done")
    zero.say("done")
    meeting.end()
    assert meeting.results == {0: b"".join(pieces), 1: b"that of rank 1"}


def test_a_root_that_sends_its_result_is_given_result_s_and_not_teardown_s(meet):
    meeting = meet(1, Timeouts(heartbeat_s=0.05, teardown_s=0.5, result_s=60))
    (agent,) = meeting.gather()
    agent.at("teardown")
    agent.say("result", b"first piece")
    assert not meeting.rendezvous.wait(1.5)
    agent.say("done")
    meeting.end()
    assert meeting.rendezvous.failure is None


# Progress and logs


def test_progress_is_that_of_the_root_and_every_phase_is_shown_once(meet):
    meeting = meet(2)
    zero, one = meeting.gather()
    one.say("progress", epoch=5)
    for agent in (one, zero):
        agent.at("join")  # overtaken by the news that all have joined
        agent.at("import")
        agent.at("train", 0, 1)
        agent.at("train", 0, 2)
    zero.say("progress", epoch=0, logs={"loss": 0.5})
    eventually(lambda: {"epoch": 0, "logs": {"loss": 0.5}} in meeting.progress, "the progress of the root")
    phases = [fields["phase"] for fields in meeting.progress if "phase" in fields]
    assert phases == ["spool", "join", "import", "train"]
    assert {"epoch": 5} not in meeting.progress


def test_what_a_rank_prints_reaches_the_log_with_rank_and_host(meet, caplog):
    caplog.set_level(logging.INFO, "allreduce_spark.rank")
    meeting = meet(2)
    _, one = meeting.gather()
    one.say("log", "first ✓\nsecond".encode())
    eventually(lambda: "second" in caplog.text, "the log")
    assert caplog.messages[-2:] == ["[rank 1 on host1] first ✓", "[rank 1 on host1] second"]


# Failure


def test_a_failed_rank_ends_the_fit_for_all_others_at_once(meet):
    meeting = meet(3)
    agents = meeting.gather()
    started = time.monotonic()
    agents[1].say("failed", error="ValueError", cause="no", phase="train", step=7, log_tail=["one", "two"])
    for agent in agents:
        abort = agent.hear()
        assert (abort.kind, abort.fields["cause"]) == ("abort", "no")
    assert time.monotonic() - started < 10
    meeting.end()
    failure = meeting.rendezvous.failure
    assert (failure.error, failure.rank, failure.host, failure.phase) == ("ValueError", 1, "host1", "train")
    assert (failure.step, failure.log_tail) == (7, ("one", "two"))


def test_a_failure_that_does_not_say_where_is_placed_where_the_rank_was_last_seen(meet):
    meeting = meet(1)
    (agent,) = meeting.gather()
    agent.at("train", 2, 11)
    agent.say("failed", error="OSError", cause="disk full")
    meeting.end()
    assert (meeting.rendezvous.failure.phase, meeting.rendezvous.failure.step) == ("train", 11)


def test_the_death_is_the_cause_though_its_consequence_was_heard_first(meet, monkeypatch):
    monkeypatch.setattr(controller, "GRACE_S", 30.0)
    meeting = meet(2)
    zero, one = meeting.gather()
    zero.say("failed", error="CollectiveError", cause="lost the others", consequence=True)
    time.sleep(0.1)
    one.say("failed", error="RankDied", cause="killed by SIGKILL")
    assert zero.hear().fields["cause"] == one.hear().fields["cause"] == "killed by SIGKILL"
    assert meeting.rendezvous.failure.rank == 1


def test_a_consequence_whose_cause_never_comes_ends_the_fit_all_the_same(meet):
    meeting = meet(2)
    zero, one = meeting.gather()
    zero.say("failed", error="CollectiveError", cause="the first", consequence=True)
    one.say("failed", error="CollectiveError", cause="the second", consequence=True)
    assert one.hear().fields["cause"] == "the first"
    meeting.end()


def test_a_failure_that_waits_for_its_cause_is_not_taken_for_success(meet):
    meeting = meet(2)
    zero, one = meeting.gather()
    one.say("failed", error="CollectiveError", cause="lost the others", consequence=True)
    zero.say("done")
    assert zero.hear().kind == one.hear().kind == "abort"
    assert meeting.rendezvous.failure.rank == 1


def test_a_rank_that_mpi_gave_up_is_one_failure_with_its_log_and_not_the_cause_of_a_peers_death(meet):
    meeting = meet(2)
    zero, one = meeting.gather()
    zero.say("pmi", line="cmd=abort exitcode=15")
    zero.say("failed", error="RankDied", cause="exit code 15", log_tail=["Fatal error in internal_Allreduce"])
    one.say("failed", error="RankDied", cause="killed by SIGKILL")
    meeting.end()
    assert meeting.rendezvous.failure.rank == 1

    alone = meet(2)
    zero, one = alone.gather()
    zero.say("pmi", line="cmd=abort exitcode=15")
    zero.say("failed", error="RankDied", cause="exit code 15", log_tail=["Fatal error in internal_Allreduce"])
    assert one.hear().kind == "abort"
    failure = alone.rendezvous.failure
    assert failure.error == "MPIAbort"
    assert failure.cause == "called MPI_Abort with exit code 15; then exit code 15"
    assert failure.log_tail == ("Fatal error in internal_Allreduce",)


def test_a_lost_agent_is_named_with_the_place_of_its_rank(meet):
    meeting = meet(2)
    zero, one = meeting.gather()
    one.at("train", 1, 5)
    one.leave()
    assert zero.hear().kind == "abort"
    failure = meeting.rendezvous.failure
    assert (failure.error, failure.rank, failure.phase, failure.step) == ("AgentLost", 1, "train", 5)
    assert "the agent is gone" in failure.cause


def test_an_agent_that_leaves_after_it_is_done_is_not_lost(meet):
    meeting = meet(2)
    zero, one = meeting.gather()
    one.say("done")
    one.leave()
    zero.say("done")
    meeting.end()
    assert meeting.rendezvous.failure is None


def test_a_silent_agent_is_taken_for_dead_and_one_that_beats_is_not(meet):
    meeting = meet(2, Timeouts(heartbeat_s=0.05, silence_s=1.5, teardown_s=5))
    zero, _ = meeting.gather()
    zero.connection.start_heartbeats(0.05, lambda: {"phase": "train", "epoch": 0, "step": 3})
    meeting.end()
    assert meeting.rendezvous.failure.rank == 1
    assert "Timeouts.silence_s" in meeting.rendezvous.failure.cause
    assert zero.hear().kind == "abort"


def test_agents_that_never_come_are_named_after_start_s(meet):
    meeting = meet(3, Timeouts(heartbeat_s=0.05, start_s=2, teardown_s=5))
    present = meeting.agent(1)
    meeting.end()
    assert "ranks [0, 2]" in meeting.rendezvous.failure.cause
    assert "Timeouts.start_s" in meeting.rendezvous.failure.cause
    assert present.hear().kind == "abort"
    assert meeting.agent(0).hear().kind == "abort", "and one that comes too late is told so"


def test_a_rank_that_never_takes_its_first_step_is_overdue(meet):
    meeting = meet(1, Timeouts(heartbeat_s=0.05, step_s=0.3, teardown_s=5))
    (agent,) = meeting.gather()
    agent.connection.start_heartbeats(0.05, lambda: {"phase": "first step", "epoch": 0, "step": 0})
    meeting.end()
    assert "Timeouts.step_s" in meeting.rendezvous.failure.cause


def test_a_second_attempt_of_the_stage_is_told_to_abort_and_the_first_goes_on(meet):
    meeting = meet(2)
    zero, one = meeting.gather()
    second = meeting.agent(1)
    assert second.hear().fields["cause"] == "this attempt of the barrier stage comes too late"
    with contextlib.suppress(RendezvousError):  # It may not have heard yet, and goes on for a moment.
        second.join()
        second.at("join")
    second.leave()
    zero.say("done")
    one.say("done")
    meeting.end()
    assert meeting.rendezvous.failure is None


def test_an_agent_of_no_rank_is_told_to_abort(meet):
    meeting = meet(2)
    assert meeting.agent(2).hear().kind == meeting.agent(-1).hear().kind == "abort"


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("unheard of", {}),
        ("heartbeat", {"phase": "nonsense", "epoch": 0, "step": 0}),
        ("heartbeat", {"phase": "train", "epoch": None, "step": 0}),
        ("failed", {"unknown": 1}),
        ("failed", {"error": "E", "cause": "c", "log_tail": 3}),
        ("join", {"agent": 1}),
        ("pmi", {"line": "no command"}),
        ("pmi", {"line": 3}),
    ],
)
def test_a_message_that_makes_no_sense_ends_the_fit_instead_of_hanging_it(meet, kind, fields):
    meeting = meet(2)
    zero, one = meeting.gather()
    one.say(kind, **fields)
    assert zero.hear().kind == "abort"
    meeting.end()


def test_who_speaks_before_saying_hello_is_shown_the_door(meet):
    meeting = meet(1)
    connection = Connection(meeting.address, b"k" * 32)
    connection.send("done")
    with pytest.raises(EOFError):
        connection.receive(20)
    connection.close()
    (agent,) = meeting.gather()
    agent.say("done")
    meeting.end()
    assert meeting.rendezvous.failure is None


def test_the_driver_may_end_the_fit_from_any_thread(meet):
    meeting = meet(1)
    (agent,) = meeting.gather()
    meeting.rendezvous.fail(Failure("Interrupted", "Ctrl-C"))
    assert agent.hear().fields["cause"] == "Ctrl-C"
    meeting.rendezvous.fail(Failure("SparkJobFailed", "later"))
    meeting.end()
    assert meeting.rendezvous.failure.error == "Interrupted"
    meeting.close()
    meeting.rendezvous.fail(Failure("SparkJobFailed", "after the end"))
    assert meeting.rendezvous.failure.error == "Interrupted"


# What the maker of the rendezvous raises


def raiser(error: BaseException):
    def raise_it(*arguments):
        raise error

    return raise_it


def test_data_that_is_not_approved_ends_the_fit_before_any_rank_starts(meet):
    meeting = meet(2, approve=raiser(DataError("rank 1 has strings")))
    agents = [meeting.agent(0), meeting.agent(1)]
    for agent in agents:
        agent.join()
    assert [agent.hear().kind for agent in agents] == ["abort", "abort"]
    failure = meeting.rendezvous.failure
    assert (failure.error, failure.cause, failure.phase) == ("DataError", "rank 1 has strings", "join")


@pytest.mark.parametrize("error", [ValueError("a bug"), TypeError("a bug"), KeyError("a bug"), SystemExit("a bug")])
@pytest.mark.parametrize("callback", ["approve", "on_progress", "on_result"])
def test_a_callback_that_raises_ends_the_fit_and_no_agent_is_blamed(meet, callback, error):
    meeting = meet(1, **{callback: raiser(error)})
    agent = meeting.agent(0)
    agent.join()
    agent.say("result", b"piece")
    agent.say("result", b"piece")
    meeting.end()
    failure = meeting.rendezvous.failure
    assert (failure.error, failure.rank) == (type(error).__name__, None)
    assert "on the driver" in failure.cause
    assert "raise_it" in failure.cause, "the traceback"
    while (kind := agent.hear().kind) != "abort":
        assert kind == "member"


def test_an_answer_of_approve_that_is_no_json_ends_the_fit(meet):
    meeting = meet(1, approve=lambda joins: {"spec": object()})
    meeting.agent(0).join()
    meeting.end()
    assert "not JSON serializable" in meeting.rendezvous.failure.cause


def test_a_watch_that_breaks_ends_the_fit(meet):
    meeting = meet(1, SimpleNamespace(heartbeat_s=0.05, teardown_s=5))  # without start_s, which the watch needs
    meeting.end()
    assert meeting.rendezvous.failure.error == "AttributeError"


# Strangers


def test_strangers_neither_get_in_nor_disturb_the_fit(meet, caplog):
    meeting = meet(2)
    strangers = [socket.create_connection(meeting.address) for _ in range(2)]
    strangers[1].sendall(b"GET / HTTP/1.1\r\nHost: driver\r\n\r\n" + b"x" * 200)
    zero, one = meeting.gather()
    zero.say("done")
    one.say("done")
    meeting.end()
    assert meeting.rendezvous.failure is None
    eventually(lambda: "refused a connection from" in caplog.text, "a warning")

    # The silent one is still there: the end of the fit does not wait for it.
    for agent in (zero, one):
        agent.leave()
    started = time.monotonic()
    assert meeting.rendezvous.wait_for_departure(5)
    meeting.rendezvous.close()
    assert time.monotonic() - started < 5
    for stranger in strangers:
        stranger.close()


def test_frames_injected_into_a_connection_end_the_fit(meet):
    meeting = meet(2)
    zero, one = meeting.gather()
    forged = json.dumps({"kind": "done"}).encode()
    one.connection._socket.sendall(len(forged).to_bytes(4, "big") + bytes(4) + forged + bytes(protocol.TAG_BYTES))
    assert zero.hear().kind == "abort"
    meeting.end()
    assert "authentication tag is wrong" in meeting.rendezvous.failure.cause


# Opening and closing


def test_closing_leaves_no_thread_and_nobody_listens_any_more(meet):
    meeting = meet(1)
    meeting.gather()
    meeting.close()
    meeting.close()
    assert not rendezvous_threads()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(meeting.address)


def test_a_rendezvous_that_was_never_started_can_be_closed():
    rendezvous = Rendezvous(1, b"k" * 32, Timeouts(), Hooks(lambda joins: {}))
    rendezvous.fail(Failure("Interrupted", "before the start"))
    rendezvous.close()
    assert not rendezvous_threads()


def test_closing_waits_for_agents_no_longer_than_teardown_s(meet):
    meeting = meet(1, Timeouts(heartbeat_s=0.05, teardown_s=0.3))
    (agent,) = meeting.gather()
    started = time.monotonic()
    meeting.rendezvous.close()
    assert 0.3 <= time.monotonic() - started < 10
    with pytest.raises(EOFError):
        agent.hear()


@pytest.mark.parametrize("host", ["203.0.113.7", "no.such.host.invalid", "." * 100])
def test_a_host_on_which_nobody_can_listen_is_an_error_that_names_it(host):
    rendezvous = Rendezvous(1, b"k" * 32, Timeouts(), Hooks(lambda joins: {}))
    with pytest.raises(RendezvousError, match=r"cannot listen on .*spark.driver.bindAddress"):
        rendezvous.start(host)
    assert not rendezvous_threads()


def test_an_agent_that_reads_nothing_holds_up_nobody(meet):
    meeting = meet(2, Timeouts(heartbeat_s=0.01, silence_s=30, teardown_s=5))
    zero, one = meeting.gather()
    for number in range(2000):  # what rank 1 would get for its MPI, if it read
        zero.say("heartbeat", phase="train", epoch=0, step=number)
    zero.say("done")
    one.say("done")
    assert zero.hear().kind == one.hear().kind == "finish"


def test_an_agent_for_which_too_much_lies_unread_is_named_and_the_driver_is_not_held_up(meet, monkeypatch):
    monkeypatch.setattr(gate, "MAX_UNSENT_BYTES", 1 << 20)
    meeting = meet(2)
    zero, one = meeting.gather()
    zero.say("pmi", line="cmd=get_my_kvsname")
    name = zero.hear().fields["line"].rpartition("=")[2]
    zero.say("pmi", line=f"cmd=put kvsname={name} key=k value={'x' * 900}")
    assert "rc=0" in zero.hear().fields["line"]
    with contextlib.suppress(RendezvousError):
        while not meeting.rendezvous.wait(0):
            one.say("pmi", line=f"cmd=get kvsname={name} key=k")  # and does not read the answers
    assert zero.hear().kind == "abort"
    failure = meeting.rendezvous.failure
    assert (failure.error, failure.rank) == ("AgentLost", 1)
    assert "bytes from the driver unread" in failure.cause


# Other generations


def test_after_a_restart_the_ranks_form_another_group_and_old_words_are_not_heard(meet):
    meeting = meet(2, restarts=Restarts(1), resume=lambda joins: {"id": "-".join(joins[0].saved)})
    zero, one = meeting.gather()
    one.at("train", 0, 5)
    one.say("failed", error="RankDied", cause="killed by SIGKILL", phase="train", epoch=0, step=5, generation=0)
    for agent in (zero, one):
        message = agent.hear()
        assert (message.kind, message.fields["generation"]) == ("restart", 1)
    zero.say("done", generation=0)
    zero.say("failed", error="CollectiveError", cause="lost the others", consequence=True, generation=0)
    for agent in (zero, one):
        agent.say("join", host_key="a", shards=[{"shard": agent.rank, "rows": 10}], saved=["7"], generation=1)
    told = [agent.hear() for agent in (zero, one)]
    assert [message.kind for message in told] == ["member", "member"]
    assert [message.fields["membership"]["generation"] for message in told] == [1, 1]
    assert [message.fields["resume"] for message in told] == [{"id": "7"}] * 2
    for agent in (zero, one):
        agent.say("done", generation=1)
    meeting.end()
    assert meeting.rendezvous.failure is None


def test_an_agent_that_still_reads_rows_during_a_restart_has_the_time_that_reading_has(meet):
    timeouts = Timeouts(heartbeat_s=0.05, init_s=0.3, spool_s=60, teardown_s=5)
    meeting = meet(2, timeouts, restarts=Restarts(1))
    zero, one = meeting.agent(0), meeting.agent(1)
    zero.join()
    zero.say("failed", error="RankDied", cause="killed by SIGKILL", generation=0)
    assert zero.hear().kind == "restart"
    zero.say("join", host_key="a", shards=[{"shard": 0, "rows": 10}], saved=[], generation=1)
    assert not meeting.rendezvous.wait(1.0)
    assert one.hear().kind == "restart"
    one.say("join", host_key="a", shards=[{"shard": 1, "rows": 10}], saved=[], generation=1)
    assert zero.hear().kind == one.hear().kind == "member"


def test_ranks_wait_for_a_driver_that_is_not_ready_and_only_the_last_generation_starts(meet):
    ready = threading.Event()
    meeting = meet(1, restarts=Restarts(1), is_ready=ready.is_set)
    agent = meeting.agent(0)
    agent.join()
    agent.say("failed", error="RankDied", cause="killed by SIGKILL", generation=0)
    assert agent.hear().kind == "restart"
    agent.say("join", host_key="a", shards=[{"shard": 0, "rows": 10}], saved=[], generation=1)
    with pytest.raises(RendezvousError, match="nothing was received"):
        agent.hear(timeout_s=0.3)
    ready.set()
    message = agent.hear()
    assert (message.kind, message.fields["membership"]["generation"]) == ("member", 1)
    with pytest.raises(RendezvousError, match="nothing was received"):
        agent.hear(timeout_s=0.3)


def test_ranks_that_end_because_more_of_them_can_go_on_say_so(meet):
    meeting = meet(1)
    (agent,) = meeting.gather()
    meeting.rendezvous.regroup()
    assert agent.hear().kind == "regroup"
    agent.say("done", regroups=True)
    meeting.end()
    assert meeting.rendezvous.regroups
