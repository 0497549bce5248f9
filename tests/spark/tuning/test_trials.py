"""The loop that runs trials: how many at once, when it stops, what it keeps. What a trial does is played by plain functions."""

from __future__ import annotations

import threading

import pytest

from allreduce_spark.errors import RankFailedError, SearchError
from allreduce_spark.spark.tuning.display import SearchDisplay
from allreduce_spark.spark.tuning.study import Study
from allreduce_spark.spark.tuning.trials import EndSearch, Outcome, SearchLimits, run_trials

WAIT_S = 30.0


def new_study(sampler="random", pruner=None, space=None, epochs=None):
    space = {"x": (0.0, 1.0)} if space is None else space
    return Study(space, direction="minimize", sampler=sampler, pruner=pruner, epochs=epochs, seed=0)


def run(work, study=None, display=None, **limits):
    """Run trials whose work is `work(trial)`."""
    return run_trials(
        study or new_study(),
        lambda number, params: work,
        SearchLimits(**limits),
        objective="loss",
        direction="minimize",
        display=display or SearchDisplay(0, 1, "loss"),
    )


def until_stopped(trial):
    while True:
        trial.check()
        threading.Event().wait(0.01)


@pytest.fixture(autouse=True)
def no_trial_is_left():
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("allreduce-spark-trial")]


def test_as_many_trials_run_at_once_as_are_allowed():
    together = threading.Barrier(3)
    running = threading.Semaphore(3)

    def work(trial):
        assert running.acquire(blocking=False), "a fourth one"
        together.wait(WAIT_S)
        running.release()
        return Outcome(value=trial.params["x"])

    result = run(work, max_trials=6, max_parallel=3)
    assert {trial.state for trial in result.trials} == {"complete"}
    assert result.best_value == min(trial.params["x"] for trial in result.trials)


def test_only_the_best_models_are_packed_and_kept():
    packed = []

    def work(trial):
        return Outcome(
            value=[3.0, 1.0, 2.0, 5.0, 4.0][trial.number], keep=lambda: packed.append(trial.number) or trial.number
        )

    result = run(work, max_trials=5, keep_models=2)
    assert packed == [0, 1, 2]
    assert set(result.models) == {1, 2}


def test_when_the_time_is_over_running_trials_are_stopped_and_no_other_begins():
    def work(trial):
        if trial.number == 0:
            return Outcome(value=1.0)
        trial.report(1, 0.5, {"loss": 0.5})
        return until_stopped(trial)

    result = run(work, max_trials=9, max_parallel=2, timeout_s=1.0)
    assert [trial.state for trial in result.trials] == ["complete", "stopped", "stopped"]
    assert result.trials[1].history == {"loss": [0.5]}
    assert result.best_trial.number == 0
    with pytest.raises(SearchError, match=r"of 2, 0 pruned, 2 stopped, 0 failed \(timeout_s=1.5\)"):
        run(until_stopped, max_trials=9, max_parallel=2, timeout_s=1.5)


class Interrupted(SearchDisplay):
    """Ctrl-C as soon as two trials run."""

    def draw(self, running):
        if running == 2:
            raise KeyboardInterrupt


def test_ctrl_c_ends_all_trials():
    with pytest.raises(KeyboardInterrupt):
        run(until_stopped, display=Interrupted(0, 1, "loss"), max_trials=9, max_parallel=2)


def test_the_first_failure_ends_the_search_where_that_is_asked_for():
    def work(trial):
        if trial.number == 1:
            raise RankFailedError("out of memory", rank=0)
        return until_stopped(trial)

    with pytest.raises(RankFailedError, match="out of memory"):
        run(work, max_trials=9, max_parallel=3, on_failure="raise")


def test_what_would_fail_in_every_trial_ends_the_search_with_its_cause():
    def work(trial):
        raise EndSearch from RankFailedError("no network")

    with pytest.raises(RankFailedError, match="no network"):
        run(work, max_trials=9)


def test_an_objective_that_is_no_number_stops_the_trial_and_counts_as_its_failure():
    def work(trial):
        if trial.number == 0:
            return Outcome(value=float("nan"), epochs=2)
        if trial.number == 1:
            trial.report(1, float("inf"), {"loss": float("inf")})
            return until_stopped(trial)
        return Outcome(value=1.0)

    result = run(work, max_trials=3)
    assert [trial.state for trial in result.trials] == ["failed", "failed", "complete"]
    assert "nan after 2 epochs" in str(result.trials[0].error)
    assert "inf after 1 epochs" in str(result.trials[1].error)


def test_successive_halving_gives_up_those_that_are_worse_after_as_many_epochs():
    def work(trial):
        for epoch in range(1, 10):
            trial.report(epoch, float(trial.number), {"loss": float(trial.number)})
        if trial.number > 0:
            return until_stopped(trial)
        return Outcome(value=0.0, epochs=9)

    result = run(work, new_study(pruner="asha", epochs=9), max_trials=4)
    assert [trial.state for trial in result.trials] == ["complete", "pruned", "pruned", "pruned"]


def test_the_search_ends_where_the_sampler_has_nothing_left():
    import optuna

    sampler = optuna.samplers.GridSampler({"x": [0.0, 0.5, 1.0]}, seed=0)
    result = run(lambda trial: Outcome(value=trial.params["x"]), new_study(sampler=sampler), max_trials=99)
    assert sorted(trial.params["x"] for trial in result.trials) == [0.0, 0.5, 1.0]


def test_one_after_the_other_the_same_seed_gives_the_same_settings():
    def settings():
        result = run(lambda trial: Outcome(value=trial.params["x"]), new_study(sampler="tpe"), max_trials=15)
        return [trial.params for trial in result.trials]

    assert settings() == settings()


def test_choices_come_back_as_the_objects_they_are():
    sizes = [(8,), (4, 4), {"units": 3}]
    study = new_study(space={"size": sizes, "rate": (1e-4, 1e-1, "log"), "units": (1, 9)})
    for _ in range(20):
        _, params = study.ask()
        assert any(params["size"] is size for size in sizes)
        assert 1e-4 <= params["rate"] <= 1e-1
        assert isinstance(params["units"], int)
        assert 1 <= params["units"] <= 9


def test_errors_that_are_recorded_do_not_hold_on_to_what_the_trial_has_used():
    def work(trial):
        if trial.number == 0:
            raise ValueError("bad") from KeyError("why")
        return Outcome(value=1.0)

    error = run(work, max_trials=2).trials[0].error
    assert isinstance(error, ValueError)
    assert error.__traceback__ is None
    assert error.__cause__ is None
