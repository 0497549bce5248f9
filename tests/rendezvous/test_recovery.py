"""The rules by which ranks are started again."""

from __future__ import annotations

import pytest

from allreduce_spark.rendezvous.group import Failure, Station
from allreduce_spark.rendezvous.protocol import Phase
from allreduce_spark.rendezvous.recovery import Restarts, place_of


def death(
    step: int | None = 7, cause: str = "the rank process was killed by SIGKILL", error: str = "RankDied"
) -> Failure:
    return Failure(error, cause, rank=1, host="here", phase="train", epoch=0 if step is not None else None, step=step)


def test_a_fit_may_lose_ranks_for_ever_as_long_as_it_comes_further_each_time():
    restarts = Restarts(1)
    assert all(restarts.refusal([death(step)], (0, step)) is None for step in range(50))


def test_without_progress_there_are_so_many_restarts_and_no_more():
    restarts = Restarts(3)
    assert [restarts.refusal([death()], (0, 7)) for _ in range(3)] == [None] * 3
    assert "3 times" in restarts.refusal([death()], (0, 7))


def test_coming_further_once_gives_the_whole_budget_back():
    restarts = Restarts(2)
    places = [(0, 7), (0, 7), (0, 8), (0, 8), (0, 3)]
    assert [restarts.refusal([death()], place) for place in places[:4]] == [None] * 4
    assert restarts.refusal([death()], places[4]) is not None


def test_where_a_rank_failed_counts_though_no_heartbeat_has_told_of_it():
    restarts = Restarts(1)
    assert all(restarts.refusal([death(step)], (0, 0)) is None for step in range(1, 50))


def test_machines_may_be_lost_twice_at_the_same_step():
    lost = Failure("AgentLost", "the agent is gone", rank=1, phase="train", epoch=0, step=7, stage_lost=True)
    restarts = Restarts(2)
    assert [restarts.refusal([lost], (0, 7)) for _ in range(2)] == [None] * 2
    assert "2 times" in restarts.refusal([lost], (0, 7))


@pytest.mark.parametrize(
    "error", ["ConfigError", "DataError", "MissingDependencyError", "CancelledError", "Interrupted"]
)
def test_what_will_come_again_or_was_wished_ends_the_fit_without_a_word_of_restarts(error):
    assert Restarts(3).refusal([death(error=error)], (0, 7)) == ""


def test_an_exception_before_the_first_step_comes_again_but_a_death_there_need_not():
    assert Restarts(3).refusal([death(None, "no such layer", "ValueError")], (-1, -1)) == ""
    assert Restarts(3).refusal([death(None)], (-1, -1)) is None


def test_an_error_of_the_driver_is_not_mended_by_other_ranks():
    assert Restarts(3).refusal([Failure("ZeroDivisionError", "on the driver")], (0, 7)) == ""


def test_the_loss_of_a_stage_may_pass_even_if_nobody_knows_the_rank():
    assert Restarts(3).refusal([Failure("StageEnded", "ended", stage_lost=True)], (0, 7)) is None


def test_no_restarts_at_all_need_no_explanation():
    assert Restarts(0).refusal([death()], (0, 7)) == ""


def test_the_first_cause_decides_not_its_consequences():
    lost = Failure("CollectiveError", "lost the others", rank=0, phase="train", epoch=0, step=7, consequence=True)
    assert Restarts(3).refusal([lost, death(error="DataError")], (0, 7)) == ""


def test_the_same_error_at_the_same_step_is_a_mistake_and_at_another_step_it_may_not_be():
    wrong = [death(step, "ValueError: a label of 11\ntraceback", "ValueError") for step in (3, 4, 4)]
    restarts = Restarts(9)
    assert restarts.refusal([wrong[0]], (0, 3)) is None
    assert restarts.refusal([wrong[1]], (0, 4)) is None
    assert "the same error" in restarts.refusal([wrong[2]], (0, 4))


def test_the_furthest_place_is_that_of_any_rank_in_the_midst_of_steps():
    stations = [Station(rank, "h", 0.0, 0.0, Phase.TRAIN, epoch, step) for rank, epoch, step in ((0, 1, 2), (1, 1, 3))]
    assert place_of([*stations, Station(2, "h", 0.0, 0.0, Phase.IMPORT, 9, 9)]) == (1, 3)
    assert place_of([Station(2, "h", 0.0, 0.0, Phase.JOIN)]) == (-1, -1)
