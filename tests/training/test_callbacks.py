"""The user's callbacks see the same logs on every rank and so decide the same; those that write files run once."""

from __future__ import annotations

import csv
import time

import keras
import numpy as np
import pytest

from allreduce_spark.config import FitConfig
from allreduce_spark.errors import ConfigError
from allreduce_spark.training.callbacks import acts_on_batches, callbacks_of_rank
from allreduce_spark.training.checks import check_callbacks


def regression(optimizer="sgd"):
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(optimizer, "mse")
    return model


def parts(*sizes, seed=0):
    chance = np.random.default_rng(seed)
    return [(x, x.sum(axis=1, keepdims=True)) for x in (chance.normal(size=(n, 2)).astype("f4") for n in sizes)]


def test_early_stopping_stops_all_ranks_after_the_same_epoch(fit_ranks, fit_reference):
    def callbacks():
        return [keras.callbacks.EarlyStopping("val_loss", patience=1, min_delta=0.5, restore_best_weights=True)]

    config = FitConfig(epochs=20, batch_size=8, validation_split=0.25)
    ranks = fit_ranks(regression(), parts(40, 24), config, callbacks)
    reference = fit_reference(regression(), parts(40, 24), config, callbacks)
    assert 1 < len(reference.history["loss"]) < 20
    assert [len(rank.history["loss"]) for rank in ranks] == [len(reference.history["loss"])] * 2
    for ours, theirs in zip(ranks[0].weights, reference.weights, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_learning_rates_that_follow_the_logs_are_equal_on_all_ranks(fit_ranks, fit_reference):
    def callbacks():
        return [
            keras.callbacks.ReduceLROnPlateau("loss", factor=0.5, patience=0, min_delta=1.0, verbose=0),
            keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.9),
        ]

    config = FitConfig(epochs=4, batch_size=8)
    ranks = fit_ranks(regression(), parts(30, 10, 20), config, callbacks)
    reference = fit_reference(regression(), parts(30, 10, 20), config, callbacks)
    rates = ranks[0].history["learning_rate"]
    np.testing.assert_allclose(rates, reference.history["learning_rate"], rtol=1e-6)
    assert rates[-1] < 0.5 * rates[0]
    assert ranks[0].digests == ranks[1].digests == ranks[2].digests


def test_a_nan_on_one_rank_stops_all_of_them_at_that_step(fit_ranks):
    data = parts(32, 32)
    data[1][1][20] = np.nan
    config = FitConfig(epochs=3, batch_size=8, shuffle=False)
    ranks = fit_ranks(regression(), data, config, lambda: [keras.callbacks.TerminateOnNaN()])
    assert [len(rank.history["loss"]) for rank in ranks] == [1, 1]
    assert np.isnan(ranks[0].history["loss"][0])
    assert [int(rank.model.optimizer.iterations.numpy()) for rank in ranks] == [3, 3]  # row 20 is in the third batch


class StopOnOneRank(keras.callbacks.Callback):
    """Stops by the clock, say: something that the ranks do not have in common."""

    count = 0

    def __init__(self):
        super().__init__()
        StopOnOneRank.count += 1
        self.stops = StopOnOneRank.count % 2 == 0

    def on_epoch_end(self, epoch, logs=None):
        if self.stops and epoch == 1:
            self.model.stop_training = True


def test_a_rank_that_stops_for_a_reason_of_its_own_stops_the_others(fit_ranks):
    ranks = fit_ranks(regression(), parts(16, 16), FitConfig(epochs=9, batch_size=8), lambda: [StopOnOneRank()])
    assert [len(rank.history["loss"]) for rank in ranks] == [2, 2]


class StopAtTheBeginning(StopOnOneRank):
    """Stops where Keras looks at the wish only after one more step."""

    def on_epoch_begin(self, epoch, logs=None):
        if self.stops and epoch == 1:
            self.model.stop_training = True

    def on_epoch_end(self, epoch, logs=None):
        pass


def test_a_wish_to_stop_at_the_beginning_of_an_epoch_is_one_of_all_ranks_as_are_the_metrics_until_then(fit_ranks):
    ranks = fit_ranks(regression(), parts(16, 16), FitConfig(epochs=9, batch_size=4), lambda: [StopAtTheBeginning()])
    assert len(ranks[0].history["loss"]) == 2
    assert ranks[0].history == ranks[1].history


@keras.saving.register_keras_serializable("test_callbacks")
class UnitVector(keras.layers.Layer):
    """NaN for a row of zeros, which is what a rank without rows computes with."""

    def call(self, x):
        return x / keras.ops.norm(x, axis=1, keepdims=True)


def test_a_nan_of_a_rank_without_rows_does_not_end_the_training(fit_ranks):
    model = keras.Sequential([keras.Input((2,)), UnitVector(), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    config = FitConfig(epochs=3, batch_size=8)
    ranks = fit_ranks(model, parts(16, 0), config, lambda: [keras.callbacks.TerminateOnNaN()])
    assert [len(rank.history["loss"]) for rank in ranks] == [3, 3]
    assert np.isfinite(ranks[0].history["loss"]).all()


def test_files_are_written_by_the_root_alone(fit_ranks, tmp_path):
    paths = {"log": tmp_path / "log.csv", "model": tmp_path / "best.keras"}
    opened = []

    def callbacks():
        opened.append(time.monotonic())
        return [
            keras.callbacks.CSVLogger(str(paths["log"])),
            keras.callbacks.ModelCheckpoint(str(paths["model"]), save_best_only=True, monitor="loss"),
        ]

    ranks = fit_ranks(regression(), parts(16, 16), FitConfig(epochs=3, batch_size=8), callbacks)
    assert len(opened) == 2
    with paths["log"].open() as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["0", "1", "2"]
    plain = keras.saving.load_model(paths["model"])
    assert type(plain.optimizer) is keras.optimizers.SGD
    np.testing.assert_array_equal(plain.get_weights()[0], ranks[0].weights[0])


def test_root_only_is_respected_and_everything_else_runs_everywhere():
    mine = keras.callbacks.LambdaCallback()
    mine.root_only = True
    logger, stopper = keras.callbacks.CSVLogger("x"), keras.callbacks.EarlyStopping()
    assert callbacks_of_rank([logger, stopper, mine], is_root=True) == {0: logger, 1: stopper, 2: mine}
    assert callbacks_of_rank([logger, stopper, mine], is_root=False) == {1: stopper}


def test_only_callbacks_that_act_on_batches_cost_a_message_per_step():
    assert acts_on_batches(keras.callbacks.TerminateOnNaN())
    assert acts_on_batches(keras.callbacks.LambdaCallback(on_train_batch_end=print))
    assert not acts_on_batches(keras.callbacks.EarlyStopping())
    assert not acts_on_batches(keras.callbacks.LearningRateScheduler(float))


def test_what_is_no_callback_or_acts_on_one_rank_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"must be keras\.callbacks\.Callback"):
        check_callbacks(["early stopping"])
    with pytest.raises(ConfigError, match="BackupAndRestore would restore one rank only"):
        check_callbacks([keras.callbacks.BackupAndRestore(tmp_path)])
