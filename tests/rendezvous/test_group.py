"""What the rendezvous decides: pure functions, so a table of situations and what follows from each."""

from __future__ import annotations

import dataclasses

import pytest

from allreduce_spark.config import Timeouts
from allreduce_spark.rendezvous.group import (
    Failure,
    Join,
    ShardReport,
    Station,
    add_failure,
    first_cause,
    form_group,
    nodes_of,
    overdue,
    stalled_for_long,
    stragglers,
)
from allreduce_spark.rendezvous.protocol import Phase

NOW = 10_000.0
TIMEOUTS = Timeouts(
    start_s=10,
    spool_s=20,
    import_s=30,
    init_s=40,
    step_s=50,
    checkpoint_s=55,
    result_s=60,
    teardown_s=70,
    heartbeat_s=1,
    silence_s=5,
)


def station(rank: int, phase: Phase, *, since: float = 0.0, epoch: int = 0, step: int = 0, **fields) -> Station:
    """A rank that has been in this place for `since` seconds, and is well."""
    return Station(rank, f"host{rank}", NOW, NOW - since, phase, epoch, step, **fields)


def late(*stations: Station, num_ranks: int | None = None, started: float = 0.0) -> Failure | None:
    return overdue(stations, num_ranks or len(stations), NOW - started, NOW, TIMEOUTS)


# The group


def test_every_rank_learns_its_place_and_the_rows_of_all():
    joins = [
        Join(0, "a", "A", (ShardReport(0, 5, 1),)),
        Join(1, "b", "B", (ShardReport(1, 6),)),
        Join(2, "a", "A", (ShardReport(2, 7),)),
    ]
    group = form_group(joins, generation=3, key_space="name")
    assert [(m.world.rank, m.world.node_rank, m.world.local_rank, m.world.local_size) for m in group] == [
        (0, 0, 0, 2),
        (1, 1, 0, 1),
        (2, 0, 1, 2),
    ]
    assert {(m.generation, m.key_space, m.rows, m.validation_rows) for m in group} == {
        (3, "name", (5, 6, 7), (1, 0, 0))
    }


def test_ranks_share_a_node_by_shared_memory_and_not_by_the_name_of_the_host():
    same_name = [Join(0, "worker", "container-1", ()), Join(1, "worker", "container-2", ())]
    other_name = [Join(0, "one", "machine", ()), Join(1, "two", "machine", ())]
    assert nodes_of(same_name) == [0, 1]
    assert nodes_of(other_name) == [0, 0]


# The first cause


def test_the_first_failure_that_is_no_consequence_is_the_cause():
    lost = Failure("CollectiveError", "lost the others", rank=0, consequence=True)
    death = Failure("RankDied", "killed by SIGKILL", rank=1)
    later = Failure("ValueError", "also broken", rank=2)
    assert first_cause([lost, death, later]) is death


def test_without_any_cause_the_first_consequence_is_shown():
    failures = [Failure("CollectiveError", str(rank), rank=rank, consequence=True) for rank in (2, 0)]
    assert first_cause(failures) is failures[0]


def test_what_a_rank_reports_after_its_failure_belongs_to_that_failure():
    abort = Failure("MPIAbort", "called MPI_Abort", rank=0, consequence=True)
    end = Failure("RankDied", "exit code 15", rank=0, log_tail=("last words",))
    (one,) = add_failure([abort], end)
    assert one == dataclasses.replace(abort, cause="called MPI_Abort; then exit code 15", log_tail=("last words",))
    assert one.consequence, "or the end of a rank that MPI gave up would be taken for the cause"


def test_failures_of_different_ranks_and_of_the_driver_stay_apart():
    failures: list[Failure] = []
    for rank in (None, 1, None, 2):
        failures = add_failure(failures, Failure("Error", "cause", rank=rank))
    assert [failure.rank for failure in failures] == [None, 1, None, 2]


# Overdue


def test_nobody_is_overdue_in_a_healthy_fit():
    assert late(station(0, Phase.TRAIN, since=49, step=3), station(1, Phase.TRAIN, since=1, step=3)) is None
    assert late() is None


def test_missing_agents_are_named_with_the_setting_once_start_s_is_over():
    connected = [station(1, Phase.SPOOL, since=9)]
    assert late(*connected, num_ranks=4, started=9) is None
    failure = late(*connected, num_ranks=4, started=11)
    assert failure is not None
    assert "ranks [0, 2, 3]" in failure.cause
    assert "Timeouts.start_s" in failure.cause
    assert (failure.error, failure.rank, failure.phase) == ("RendezvousTimeoutError", None, "start")


@pytest.mark.parametrize(
    ("phase", "setting"),
    [
        (Phase.SPOOL, "spool_s"),
        (Phase.IMPORT, "import_s"),
        (Phase.INIT, "init_s"),
        (Phase.FIRST_STEP, "step_s"),
        (Phase.TRAIN, "step_s"),
        (Phase.VALIDATE, "step_s"),
        (Phase.RESULT, "result_s"),
        (Phase.TEARDOWN, "teardown_s"),
    ],
)
def test_a_rank_that_does_not_go_on_is_named_with_phase_and_setting(phase, setting):
    limit = getattr(TIMEOUTS, setting)
    assert late(station(0, phase, since=limit - 1)) is None
    failure = late(station(0, phase, since=limit + 1, step=7))
    assert failure is not None
    assert f"Timeouts.{setting}" in failure.cause
    assert f"'{phase.value}'" in failure.cause
    assert (failure.rank, failure.host, failure.phase) == (0, "host0", phase.value)
    assert failure.step == (7 if phase.has_step else None)


def test_a_rank_that_waits_for_a_checkpoint_has_time_to_give_it_up_by_itself():
    assert late(station(0, Phase.CHECKPOINT, since=55 + 4, step=7)) is None
    failure = late(station(0, Phase.CHECKPOINT, since=55 + 6, step=7))
    assert failure is not None
    assert "Timeouts.checkpoint_s" in failure.cause
    assert (failure.phase, failure.step) == ("checkpoint", 7)


def test_every_setting_that_an_error_names_exists():
    names = {field.name for field in dataclasses.fields(Timeouts)}
    for phase in set(Phase) - {Phase.START, Phase.JOIN}:
        failure = late(station(0, phase, since=10**6))
        assert failure is not None
        assert failure.cause.rpartition("Timeouts.")[2] in names


def test_an_agent_that_waits_for_the_others_to_join_is_never_to_blame():
    assert late(station(0, Phase.JOIN, since=10**6), station(1, Phase.SPOOL, since=1)) is None
    failure = late(station(0, Phase.JOIN, since=10**6), station(1, Phase.SPOOL, since=21))
    assert failure is not None
    assert failure.rank == 1


@pytest.mark.parametrize(
    ("behind", "ahead"),
    [
        (station(1, Phase.IMPORT, since=29), station(0, Phase.INIT, since=1000)),
        (station(1, Phase.TRAIN, since=49, epoch=1, step=5), station(0, Phase.TRAIN, since=1000, epoch=1, step=6)),
        (station(1, Phase.TRAIN, since=49, epoch=1, step=9), station(0, Phase.TRAIN, since=1000, epoch=2, step=0)),
        (station(1, Phase.TRAIN, since=49, epoch=1, step=9), station(0, Phase.VALIDATE, since=1000, epoch=1, step=10)),
        (station(1, Phase.TRAIN, since=49, epoch=4, step=9), station(0, Phase.RESULT, since=1000)),
        (station(1, Phase.RESULT, since=59), station(0, Phase.TEARDOWN, since=1000)),
    ],
)
def test_whoever_is_furthest_behind_is_to_blame_and_whoever_waits_for_it_is_not(behind, ahead):
    assert late(ahead, behind) is None, "the one ahead has waited long, but the one behind is within its time"
    behind = dataclasses.replace(behind, changed_at=NOW - 1000)
    failure = late(ahead, behind)
    assert failure is not None
    assert failure.rank == 1
    assert "the others wait for it" in failure.cause


def test_ranks_at_one_place_wait_for_each_other_only_since_the_last_has_come():
    early, last = station(0, Phase.INIT, since=1000), station(1, Phase.INIT, since=1)
    assert late(early, last) is None
    failure = late(early, dataclasses.replace(last, changed_at=NOW - 41))
    assert failure is not None
    assert failure.rank == 1
    assert "so have ranks [0]" in failure.cause


def test_a_rank_that_is_done_is_not_waited_for():
    assert late(station(0, Phase.TEARDOWN, since=10**6, done=True), station(1, Phase.RESULT, since=1)) is None


def test_an_agent_that_fell_silent_is_named_before_the_rank_that_does_not_go_on():
    stuck, silent = station(0, Phase.TRAIN, since=1000, step=1), station(1, Phase.TRAIN, since=1, step=2)
    silent.heard_at = NOW - 6
    failure = late(stuck, silent)
    assert failure is not None
    assert (failure.rank, failure.step) == (1, 2)
    assert "Timeouts.silence_s" in failure.cause


# Where a rank is


def test_a_station_notes_when_its_rank_moved_on_and_not_that_it_stayed():
    here = station(0, Phase.TRAIN, since=10, step=1)
    here.move_to(Phase.TRAIN, 0, 1, NOW)
    assert here.changed_at == NOW - 10
    here.move_to(Phase.TRAIN, 0, 2, NOW)
    assert here.changed_at == NOW


@pytest.mark.parametrize("overtaken", [Phase.SPOOL, Phase.JOIN])
def test_a_heartbeat_that_left_before_the_group_was_formed_does_not_move_a_rank_back(overtaken):
    here = station(0, Phase.IMPORT, since=10)
    here.move_to(overtaken, 0, 0, NOW)
    assert (here.phase, here.changed_at) == (Phase.IMPORT, NOW - 10)


def test_a_rank_may_go_from_validation_back_to_training():
    here = station(0, Phase.VALIDATE, epoch=0, step=12)
    here.move_to(Phase.TRAIN, 1, 0, NOW)
    assert (here.phase, here.epoch, here.step) == (Phase.TRAIN, 1, 0)


# Who keeps the others waiting


def test_of_ranks_in_the_same_step_those_that_wait_for_others_are_not_to_blame():
    stuck = station(1, Phase.TRAIN, since=51, step=3)
    waiting = [station(rank, Phase.TRAIN, since=50.5, step=3, is_waiting=True) for rank in (0, 2)]
    failure = late(waiting[0], stuck, waiting[1])
    assert failure.rank == 1
    assert "also" not in failure.cause
    assert "ranks [" not in failure.cause


def test_a_stalled_rank_brings_what_it_was_doing():
    failure = late(station(0, Phase.TRAIN, since=51, step=3, stack=("File callback.py, line 7",)))
    assert failure.log_tail == ("File callback.py, line 7",)


def test_a_rank_that_takes_long_for_a_step_is_named_until_it_goes_on():
    timeouts = dataclasses.replace(TIMEOUTS, stall_warning_s=10)
    slow, waiting = (
        station(1, Phase.TRAIN, since=11, step=3),
        station(0, Phase.TRAIN, since=11, step=3, is_waiting=True),
    )
    assert stalled_for_long([slow, waiting], NOW, timeouts) == [slow]
    slow.warned = True
    assert stalled_for_long([slow, waiting], NOW, timeouts) == []
    slow.move_to(Phase.TRAIN, 0, 4, NOW)
    assert not slow.warned
    assert stalled_for_long([station(0, Phase.IMPORT, since=11)], NOW, timeouts) == []


def working(rank: int, step_s: float, waited_s: float, phase: Phase = Phase.TRAIN) -> Station:
    """A rank of which two heartbeats tell how long it works for a step, and how long it waits then."""
    one = station(rank, phase)
    one.note_waiting(False, 0.0, 0, 100, NOW)
    one.note_waiting(True, 20 * waited_s, 0, 120, NOW + 20 * (step_s + waited_s))
    return one


def test_a_rank_that_works_longer_for_its_steps_than_the_others_is_named_once():
    stations = [working(0, 0.1, 0.2), working(1, 0.3, 0.0), working(2, 0.11, 0.19)]
    (text,) = stragglers(stations)
    assert "rank 1 on host1 works 300 ms for a step, the ranks in the middle 110 ms" in text
    assert stragglers(stations) == []


def test_ranks_that_are_about_as_fast_are_not_named():
    assert stragglers([working(0, 0.1, 0.0), working(1, 0.12, 0.0)]) == []
    assert stragglers([working(0, 0.001, 0.01), working(1, 0.009, 0.0)]) == []
    assert stragglers([working(0, 0.5, 0.0)]) == []


def test_ranks_in_a_function_of_the_users_own_may_differ_and_take_their_time():
    stations = [working(rank, step_s, 0.0, Phase.FUNCTION) for rank, step_s in enumerate((0.1, 0.3, 0.1))]
    assert stragglers(stations) == []
    assert stalled_for_long(stations, NOW + 1e6, TIMEOUTS) == []


def test_time_is_measured_anew_in_every_epoch():
    one = station(0, Phase.TRAIN)
    one.note_waiting(False, 0.0, 0, 90, NOW)
    one.note_waiting(False, 0.0, 1, 5, NOW + 60)
    assert one.step_s is None
    one.note_waiting(False, 1.0, 1, 25, NOW + 63)
    assert one.step_s == pytest.approx(0.1)
