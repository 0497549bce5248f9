"""A search tries settings side by side on ranks of their own, gives up bad ones, and brings the best models back."""

from __future__ import annotations

import math
import sys
import threading
from typing import Any

import cloudpickle
import keras
import numpy as np
import optuna
import pandas
import pytest
from faulty_fits import Fault, Faults, kill_agent, kill_rank
from pyspark import cloudpickle as spark_cloudpickle
from waiting import wait_until

from allreduce_spark.communicator.horovod_environment import installed
from allreduce_spark.errors import CancelledError, ConfigError, DataError, MissingDependencyError, SearchError
from allreduce_spark.spark.tuning.result import KeptModel, SearchResult, Trial
from allreduce_spark.spark.tuning.search import search

for pickler in (cloudpickle, spark_cloudpickle):
    pickler.register_pickle_by_value(sys.modules[__name__])

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(96, 4)).astype("float32")
Y = X @ np.array([1.0, -2.0, 0.5, 3.0], "float32")


def linear(params: dict[str, Any]) -> keras.Model:
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(params["rate"]), "mse", metrics=["mae"])
    return model


def layered(params: dict[str, Any]) -> keras.Model:
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(params["units"]), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(params["rate"]), "mse", metrics=[keras.metrics.RootMeanSquaredError()])
    return model


def grid(**space: list[Any]) -> dict[str, Any]:
    """Every setting of the space once, in an order that the seed gives."""
    settings = math.prod(map(len, space.values()))
    return {"space": space, "sampler": optuna.samplers.GridSampler(space, seed=0), "max_trials": settings}


@pytest.fixture
def nothing_stays(spark):
    """After the test no trial runs, and Spark keeps no rows."""
    kept = spark.sparkContext._jsc.getPersistentRDDs
    before, threads = set(kept()), set(threading.enumerate())
    yield
    assert not [thread for thread in set(threading.enumerate()) - threads if thread.name.startswith("allreduce-spark")]
    assert not set(kept()) - before
    tracker = spark.sparkContext.statusTracker()  # which hears of a job's end after the job's caller
    wait_until(lambda: not tracker.getActiveJobsIds(), "no job runs", 20)


@pytest.mark.spark
def test_the_setting_that_learns_wins_and_the_rows_are_read_once_for_all_trials(spark, nothing_stays, capsys):
    read = spark.sparkContext.accumulator(0)

    def counted(row):
        read.add(1)
        return row

    def looking_around(params):
        stored.append([(info.numCachedPartitions(), info.memSize()) for info in storage_info() if info.diskSize()])
        return layered(params)

    stored, storage_info = [], spark.sparkContext._jsc.sc().getRDDStorageInfo
    rows = spark.sparkContext.parallelize(list(zip(X[:80], Y[:80], strict=True)), 3).map(counted)
    result = search(
        looking_around,
        **grid(rate=[0.0, 0.05], units=[4, 8], batch_size=[8]),
        data=rows,
        validation_data=(X[80:], Y[80:]),
        objective="val_root_mean_squared_error",
        epochs=6,
        pruner=None,
        keep_models=2,
        seed=3,
        verbose=2,
    )

    assert read.value == 80
    assert stored == 4 * [[(1, 0)]]  # one partition, on disk and not in memory, from before the first trial on
    assert [trial.number for trial in result.trials] == list(range(4))
    assert {trial.state for trial in result.trials} == {"complete"}
    assert result.best_params["rate"] == 0.05
    values = {rate: [t.value for t in result.trials if t.params["rate"] == rate] for rate in (0.0, 0.05)}
    assert max(values[0.05]) < min(values[0.0])

    table = result.table()
    assert isinstance(table, pandas.DataFrame)
    assert list(table["value"]) == sorted(table["value"])
    assert table.iloc[0]["param_rate"] == 0.05
    assert set(table["epochs"]) == {6}
    assert len(capsys.readouterr().out.splitlines()) == 4

    best, second = result.best_models(2)
    evaluated = [model.evaluate(X[80:], Y[80:], verbose=0, return_dict=True)["loss"] ** 0.5 for model in (best, second)]
    assert evaluated == pytest.approx(sorted(trial.value for trial in result.trials)[:2], rel=1e-4)
    assert best.optimizer.iterations == 6 * 80 // 8
    expected = np.mean([model.predict(X, verbose=0) for model in (best, second)], axis=0)
    np.testing.assert_allclose(result.best_ensemble(2).predict(X, verbose=0), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="has kept those of its 2 best trials"):
        result.best_models(3)


class GiveUp(optuna.pruners.BasePruner):
    """Does not believe in settings that do not learn."""

    def prune(self, study, trial):
        return trial.params["rate"] == 0 and trial.last_step >= 2


@pytest.mark.spark
def test_a_trial_of_two_ranks_that_is_given_up_ends_long_before_its_last_epoch(spark, nothing_stays):
    epochs = 2000
    patient = keras.callbacks.EarlyStopping("val_loss", patience=3, min_delta=1e-3, restore_best_weights=True)
    result = search(
        linear,
        **grid(rate=[0.0, 0.05]),
        data=(X[:80], Y[:80]),
        validation_data=(X[80:], Y[80:]),
        epochs=epochs,
        batch_size=16,
        callbacks=lambda params: [patient] if params["rate"] else [],
        pruner=GiveUp(),
        ranks_per_trial=2,
        seed=1,
        verbose=0,
    )
    bad, good = sorted(result.trials, key=lambda trial: trial.params["rate"])
    assert (bad.state, good.state) == ("pruned", "complete")
    assert 2 <= bad.epochs < epochs // 10
    assert 4 < good.epochs < epochs
    assert len(bad.history["val_loss"]) == bad.epochs
    assert bad.value == bad.history["val_loss"][-1] > good.value
    assert result.best_trial == good
    # Its weights are those of an earlier epoch, and so is its value.
    assert good.value != good.history["val_loss"][-1]
    assert good.value == pytest.approx(result.best_model().evaluate(X[80:], Y[80:], verbose=0)[0], rel=1e-3)


class Listens(GiveUp):
    """Also notes after which epochs of which trial it was asked."""

    def __init__(self):
        self.asked = []

    def prune(self, study, trial):
        self.asked.append((trial.params["rate"], trial.last_step))
        return super().prune(study, trial)


@pytest.mark.spark
def test_a_search_whose_ranks_and_agents_are_killed_finds_what_an_undisturbed_one_does(
    spark, nothing_stays, nothing_is_left, tmp_path
):
    def once(folder, faults):
        def callbacks(params):
            place = tmp_path / folder / str(params["rate"])
            place.mkdir(parents=True)
            return [Faults(place, *faults.get(params["rate"], ()), pause_s=0.01)]

        pruner = Listens()
        result = search(
            linear,
            **grid(rate=[0.0, 0.05]),
            data=(X, Y),
            epochs=40,
            batch_size=16,
            callbacks=callbacks,
            pruner=pruner,
            ranks_per_trial=2,
            seed=1,
            verbose=0,
        )
        return sorted(result.trials, key=lambda trial: trial.params["rate"]), result.best_model(), pruner.asked

    (bad, good), model, asked = once("undisturbed", {})
    faults = {
        0.0: [Fault("train_batch_end", 1, kill_rank, 1, 1)],
        0.05: [Fault("epoch_end", 0, kill_rank, 4), Fault("train_batch_end", 1, kill_agent, 7, 0)],
    }
    (killed_bad, killed_good), same_model, asked_again = once("killed", faults)

    assert len(list(tmp_path.glob("killed/*/fault-*"))) == 3
    assert (good.state, killed_good.state) == ("complete", "complete")
    assert (killed_good.value, killed_good.epochs, killed_good.history) == (good.value, good.epochs, good.history)
    for one, other in zip(model.variables, same_model.variables, strict=True):
        np.testing.assert_array_equal(one, other)
    # How far a bad trial comes before it hears of the verdict is a matter of time.
    assert (bad.state, killed_bad.state) == ("pruned", "pruned")
    common = min(bad.epochs, killed_bad.epochs)
    assert {len(column) for column in killed_bad.history.values()} == {killed_bad.epochs}
    assert killed_bad.history["val_loss"][:common] == bad.history["val_loss"][:common]
    for each in (asked, asked_again):
        assert [step for rate, step in each if rate == 0.05] == list(range(1, 41))


def troubled(params: dict[str, Any]) -> keras.Model:
    if params["kind"] == "raises":
        raise ZeroDivisionError("no such width")
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    if params["kind"] != "uncompiled":
        model.compile(keras.optimizers.SGD(1e30 if params["kind"] == "nan" else 0.05), "mse", metrics=["mae"])
    return model


class Dies(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        raise MemoryError("the network is too large")


@pytest.mark.spark
def test_trials_that_fail_are_recorded_and_the_others_go_on(spark, nothing_stays):
    result = search(
        troubled,
        **grid(kind=["good", "nan", "raises", "uncompiled", "dies"]),
        data=(X, Y),
        epochs=60,
        callbacks=lambda params: [Dies()] if params["kind"] == "dies" else [],
        verbose=0,
    )
    trials = {trial.params["kind"]: trial for trial in result.trials}
    assert len(result.trials) == 5
    assert {kind: trial.state for kind, trial in trials.items() if trial.state != "failed"} == {"good": "complete"}
    errors = {kind: str(trial.error) for kind, trial in trials.items()}
    assert "the network is too large" in errors["dies"]
    assert "{'kind': 'raises'}: ZeroDivisionError: no such width" in errors["raises"]
    assert "{'kind': 'uncompiled'}: the model is not compiled" in errors["uncompiled"]
    assert "objective was nan" in errors["nan"] or "objective was inf" in errors["nan"]
    assert trials["nan"].epochs < 60
    assert list(result.table()["state"]) == ["complete", *4 * ["failed"]]
    assert result.best_params == {"kind": "good"}


@pytest.mark.spark
def test_where_all_trials_fail_the_first_error_is_told(spark, nothing_stays):
    with pytest.raises(SearchError, match=r"all 3 trials .* failed\. .*no such width") as raised:
        search(troubled, {"kind": ["raises"]}, (X, Y), max_trials=3, epochs=1, verbose=0)
    assert isinstance(raised.value.__cause__, ConfigError)
    with pytest.raises(ConfigError, match="no such width"):
        search(troubled, {"kind": ["raises"]}, (X, Y), max_trials=3, epochs=1, on_failure="raise", verbose=0)


@pytest.mark.spark
def test_an_objective_that_no_model_has_ends_the_search_with_the_names_there_are(spark, nothing_stays):
    with pytest.raises(ConfigError, match=r"'val_accuracy' is not .*\['loss', 'mae', 'val_loss', 'val_mae'\]"):
        search(linear, {"rate": [0.1]}, (X, Y), max_trials=9, epochs=9, objective="val_accuracy", verbose=0)


@pytest.mark.spark
def test_rows_that_cannot_be_trained_on_end_the_search(spark, nothing_stays):
    rows = spark.sparkContext.parallelize([(X[0], Y[0]), (X[1, :3], Y[1])], 1)
    with pytest.raises(DataError, match=r"partition 0, row 1|row 1"):
        search(linear, {"rate": [0.1]}, rows, max_trials=9, epochs=1, verbose=0)


@pytest.mark.spark
def test_an_error_in_the_users_own_map_function_is_shown(spark, nothing_stays):
    rows = spark.sparkContext.parallelize(range(8), 2).map(lambda number: 1 // 0)
    with pytest.raises(Exception, match="ZeroDivisionError"):
        search(linear, {"rate": [0.1]}, rows, max_trials=9, epochs=1, verbose=0)


@pytest.mark.spark
def test_the_same_seed_gives_the_same_trial_by_each_backend(spark):
    def once(backend):
        space = {"rate": (1e-3, 1e-1, "log"), "units": (1, 99)}
        return search(layered, space, (X, Y), max_trials=1, epochs=1, seed=7, backend=backend, verbose=0).best_trial

    one, other = once("mpi"), once("horovod" if installed() else "mpi")
    assert one.params == other.params
    assert one.value == other.value


class Tells(keras.callbacks.Callback):
    """Lets the driver know that a trial trains, and goes on and on."""

    def __init__(self, started):
        super().__init__()
        self.path = str(started)

    def on_epoch_end(self, epoch, logs=None):
        with open(self.path, "w"):
            pass


@pytest.mark.spark
def test_cancelling_the_job_group_ends_all_trials(spark, nothing_stays, tmp_path):
    started, over = tmp_path / "started", threading.Event()

    def cancel():
        while not started.exists() and not over.wait(0.05):
            pass
        spark.sparkContext.cancelJobGroup("search")

    canceller = threading.Thread(target=cancel)
    canceller.start()
    spark.sparkContext.setJobGroup("search", "a search")
    try:
        with pytest.raises(CancelledError):
            search(
                linear,
                {"rate": [0.01]},
                (X, Y),
                max_trials=9,
                epochs=10**6,
                callbacks=[Tells(started)],
                verbose=0,
            )
    finally:
        over.set()
        canceller.join()
        for name in ("spark.jobGroup.id", "spark.job.description"):
            spark.sparkContext.setLocalProperty(name, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": {}}, "dict from names to what values"),
        ({"space": {"rate": []}}, r"'rate': \[\]; expected a list of choices, a range"),
        ({"space": {"rate": (1, 2, 3)}}, r"\(1, 2, 3\); expected"),
        ({"space": {"rate": (0.0, 1.0, "log")}}, "which optuna refuses"),
        ({"space": {"rate": (2, 1)}}, "which optuna refuses"),
        ({"space": {"rate": 0.1}}, "'rate': 0.1; expected"),
        ({"build_model": None}, "build_model must be a function"),
        ({"build_model": lambda units, rate: None}, r"def build_model\(params\)"),
        ({"max_trials": 0}, "max_trials must be an integer of at least 1, got 0"),
        ({"max_parallel": 0}, "max_parallel must be"),
        ({"keep_models": -1}, "keep_models must be"),
        ({"timeout_s": 0}, "timeout_s must be"),
        ({"on_failure": "ignore"}, "on_failure must be"),
        ({"epochs": None}, "epochs is missing"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"sync_every": 0}, "sync_every must be at least 1"),
        ({"backend": "gloo"}, "backend must be one of"),
        ({"resources": "gpu"}, "resources must be a pyspark.resource.ResourceProfile"),
        ({"ranks_per_gpu": 0}, "ranks_per_gpu must be at least 1"),
        ({"objective": "val_happiness"}, "say direction"),
        ({"direction": "up"}, "direction must be"),
        ({"objective": None}, "must be the name of a metric"),
        ({"validation_split": 0.0}, "needs rows to validate on"),
        ({"validation_split": 0.1, "validation_data": (X, Y)}, "choose one"),
        ({"sampler": "grid"}, "sampler must be"),
        ({"pruner": "median"}, "pruner must be"),
    ],
)
def test_arguments_that_cannot_work_are_refused(changes, message):
    arguments = {"build_model": linear, "space": {"rate": [0.1]}, "data": (X, Y), "max_trials": 1, "epochs": 1}
    with pytest.raises(ConfigError, match=message):
        search(**{**arguments, **changes})


@pytest.mark.spark
def test_more_ranks_for_a_trial_than_there_are_slots_are_refused(spark):
    with pytest.raises(ConfigError, match=r"ranks_per_trial: .*needs 3 slots"):
        search(linear, {"rate": [0.1]}, (X, Y), max_trials=1, epochs=1, ranks_per_trial=3)


@pytest.mark.spark
def test_a_model_that_is_handed_out_twice_is_refused(spark, nothing_stays):
    model = linear({"rate": 0.01})
    with pytest.raises(ConfigError, match="same model twice"):
        search(lambda params: model, {"rate": [0.1]}, (X, Y), max_trials=2, epochs=1, verbose=0)


def test_a_missing_optuna_is_told_with_the_way_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingDependencyError, match=r"pip install allreduce-spark\[search\]"):
        search(linear, {"rate": [0.1]}, (X, Y), max_trials=1, epochs=1)


def test_the_table_is_best_first_and_lists_what_failed_last():
    trials = (
        Trial(0, {}, "failed", None, 0, 1.0, {}, ConfigError("no")),
        Trial(1, {}, "complete", 0.5, 3, 1.0, {}),
        Trial(2, {}, "pruned", 0.9, 1, 1.0, {}),
        Trial(3, {}, "complete", 0.8, 3, 1.0, {}),
        Trial(4, {}, "stopped", None, 0, 1.0, {}),
    )
    result = SearchResult(trials, "val_accuracy", "maximize", {})
    assert list(result.table()["number"]) == [3, 1, 2, 4, 0]
    assert result.best_value == 0.8
    assert result.table()["error"].iloc[-1] == "ConfigError: no"


def test_a_kept_model_comes_back_with_its_optimizer():
    model = linear({"rate": 0.05})
    model.fit(X, Y, verbose=0)
    kept = KeptModel.of(model, {})
    one, other = kept.load(), kept.load()
    assert one is not other
    assert one.optimizer.iterations == model.optimizer.iterations
    np.testing.assert_array_equal(one.predict(X, verbose=0), model.predict(X, verbose=0))
