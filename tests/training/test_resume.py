"""A fit that is resumed from a checkpoint, taken anywhere, ends with the bits of one that was not interrupted."""

from __future__ import annotations

import csv
import itertools
import json
import random
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np
import pytest

from allreduce_spark.checkpoint.shares import read_share
from allreduce_spark.communicator.local import LocalGroup
from allreduce_spark.config import Checkpoint, FitConfig
from allreduce_spark.errors import CheckpointError
from allreduce_spark.training.resume import Resume, read_saved_state

SIZES = {1: (21,), 2: (19, 12), 3: (21, 3, 14)}
BATCH = 4
EPOCHS = 2  # with every resumed fit, Keras traces the model anew, on each rank


def parts_of(sizes, outputs=1):
    chance = np.random.default_rng(3)
    parts = []
    for size in sizes:
        x = chance.normal(size=(size, 6)).astype("float32")
        y = (x[:, :outputs] - x[:, 1 : outputs + 1] > 0).astype("float32")
        parts.append((x, y))
    return parts


def network(optimizer="adam", *, policy=None, metrics=("accuracy",), batch_norm=True, dropout=True):
    keras.utils.set_random_seed(1)
    layers = [keras.Input((6,)), keras.layers.Dense(8, activation="relu", dtype=policy)]
    layers += [keras.layers.BatchNormalization(momentum=0.9, dtype=policy)] if batch_norm else []
    layers += [keras.layers.Dropout(0.3, seed=5)] if dropout else []
    model = keras.Sequential([*layers, keras.layers.Dense(1, activation="sigmoid", dtype="float32")])
    model.compile(optimizer, "binary_crossentropy", metrics=list(metrics))
    return model


@pytest.fixture
def fit_and_resume(fit_ranks):
    """Returns run(model, parts, config, every_steps, ...): `Checkpointed`."""

    def run(model, parts, config, every_steps=None, **arguments):
        checkpoint = Checkpoint(every_steps=every_steps, path="somewhere", keep_best="loss")
        return Checkpointed(fit_ranks, model, parts, config, checkpoint, arguments)

    return run


@dataclass
class Checkpointed:
    """A fit that went through, and all checkpoints that it has taken."""

    fit_ranks: object
    model: keras.Model
    parts: list
    config: FitConfig
    checkpoint: Checkpoint
    arguments: dict

    def __post_init__(self):
        self.whole = self.fit_ranks(self.model, self.parts, self.config, checkpoint=self.checkpoint, **self.arguments)

    @property
    def ids(self):
        return sorted(set.intersection(*({message["id"] for message in rank.saved} for rank in self.whole)))

    def resume(self, name, num_ranks=None, **arguments):
        shares = {rank: m["kept"] for rank, fitted in enumerate(self.whole) for m in fitted.saved if m["id"] == name}
        resume = Resume(name, shares)
        return self.fit_ranks(
            self.model, self.parts, self.config, resume=resume, num_ranks=num_ranks, **{**self.arguments, **arguments}
        )

    def assert_same_bits(self, ids=None):
        assert self.ids, "nothing was saved"
        for name in ids or self.ids:
            for rank, (resumed, whole) in enumerate(zip(self.resume(name), self.whole, strict=True)):
                where = f"rank {rank}, resumed from {name}"
                assert resumed.final == whole.final, f"other weights or optimizer state: {where}"
                assert same(resumed.history, whole.history), f"another history: {where}"
                assert resumed.epochs == whole.epochs, where


def same(one, other):
    """Whether two histories are the same, NaN included."""
    assert list(one) == list(other)
    return all(
        len(one[name]) == len(other[name])
        and all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in zip(one[name], other[name], strict=True))
        for name in one
    )


OPTIMIZERS = {
    "adam": lambda: keras.optimizers.Adam(0.01),
    "momentum": lambda: keras.optimizers.SGD(0.05, momentum=0.9),
    "schedule": lambda: keras.optimizers.SGD(keras.optimizers.schedules.CosineDecay(0.1, 12)),
    "moving average": lambda: keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.7, ema_overwrite_frequency=4),
    "moving average at the end": lambda: keras.optimizers.Adam(0.01, use_ema=True, ema_momentum=0.7),
    "accumulation": lambda: keras.optimizers.Adam(0.01, gradient_accumulation_steps=4),
    "nadam": lambda: keras.optimizers.Nadam(0.01),
}


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_fit_resumed_at_any_step_has_the_bits_of_one_that_was_not_interrupted(fit_and_resume, world_size):
    config = FitConfig(epochs=EPOCHS, batch_size=BATCH, seed=7, validation_split=0.2)
    model = network(metrics=("accuracy", "auc"))
    fit = fit_and_resume(model, parts_of(SIZES[world_size]), config, every_steps=1)
    assert {"000000-00000001", "000001-00000000", f"{EPOCHS:06d}-00000000"} < set(fit.ids)
    fit.assert_same_bits(fit.ids if world_size < 3 else fit.ids[::3])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_kind_of_optimizer_state_is_resumed(fit_and_resume, name):
    config = FitConfig(epochs=EPOCHS, batch_size=BATCH, seed=7)
    fit_and_resume(network(OPTIMIZERS[name]()), parts_of(SIZES[2]), config, every_steps=7).assert_same_bits()


def callbacks_that_remember():
    return [
        keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.9),
        keras.callbacks.ReduceLROnPlateau("loss", factor=0.5, patience=1, min_delta=0.02, cooldown=1),
        keras.callbacks.EarlyStopping("loss", patience=2, min_delta=0.05, restore_best_weights=True),
    ]


@pytest.mark.parametrize("optimizer", ["adam", "momentum"])
def test_callbacks_go_on_with_what_they_remember_and_stop_at_the_same_epoch(fit_and_resume, optimizer):
    config = FitConfig(epochs=9, batch_size=BATCH, seed=7)
    model, parts = network(OPTIMIZERS[optimizer]()), parts_of(SIZES[2])
    fit = fit_and_resume(model, parts, config, every_steps=6, callbacks=callbacks_that_remember)
    assert len(fit.whole[0].history["loss"]) > 3
    fit.assert_same_bits(fit.ids[1::2])


def test_a_fit_that_had_stopped_is_not_trained_further(fit_and_resume):
    config = FitConfig(epochs=9, batch_size=BATCH, seed=7)
    stop = {"callbacks": lambda: [keras.callbacks.EarlyStopping("loss", min_delta=1.0, restore_best_weights=True)]}
    fit = fit_and_resume(network(), parts_of(SIZES[2]), config, **stop)
    epochs = len(fit.whole[0].history["loss"])
    assert 1 < epochs < 9
    assert fit.ids[-1] == f"{epochs:06d}-00000000"
    fit.assert_same_bits()


def test_the_weights_that_early_stopping_keeps_are_saved_once_by_all_ranks_together(fit_and_resume):
    config = FitConfig(epochs=3, batch_size=BATCH, seed=7)
    stop = {"callbacks": lambda: [keras.callbacks.EarlyStopping("loss", restore_best_weights=True)]}
    model = network()
    fit = fit_and_resume(model, parts_of(SIZES[2]), config, **stop)
    shares = [read_share(Path(rank.saved[-1]["kept"])) for rank in fit.whole]
    best = [{name for name in share.tensors if name.startswith("shared/best/")} for share in shares]
    assert all(best)
    assert sorted([*best[0], *best[1]]) == sorted(f"shared/best/0/{number}" for number in range(len(model.weights)))
    assert all("best_weights" not in share.about["callbacks"]["0"]["attributes"] for share in shares)


@keras.saving.register_keras_serializable("test_resume")
class OwnStep(keras.Model):
    """A custom train_step whose metric comes to be in its first step."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.dense, self.dropout = keras.layers.Dense(1), keras.layers.Dropout(0.3, seed=2)
        self.correct = keras.metrics.F1Score(threshold=0.5, name="correct")

    def call(self, x, training=False):
        return keras.ops.sigmoid(self.dense(self.dropout(x, training=training)))

    def train_step(self, data):
        import tensorflow as tf

        x, y = data
        with tf.GradientTape() as tape:
            predicted = self(x, training=True)
            loss = tf.reduce_mean(tf.square(predicted - y))
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        self.correct.update_state(y, predicted)
        return {"loss": loss, "correct": self.correct.result()}


def test_a_custom_train_step_is_resumed_with_metrics_that_only_it_makes(fit_and_resume):
    keras.utils.set_random_seed(4)
    model = OwnStep()
    model(np.zeros((1, 6), "float32"))
    model.compile("adam")
    config = FitConfig(epochs=2, batch_size=BATCH, seed=7)
    fit_and_resume(model, parts_of(SIZES[2]), config, every_steps=3).assert_same_bits()


@pytest.mark.parametrize("policy", ["mixed_float16", "bfloat16"])
def test_half_precision_is_resumed_with_what_its_variables_cannot_hold(fit_and_resume, policy):
    optimizer = keras.optimizers.LossScaleOptimizer(
        keras.optimizers.Adam(0.01), initial_scale=2.0**12, dynamic_growth_steps=4
    )
    model = network(optimizer if policy == "mixed_float16" else "adam", policy=policy)
    config = FitConfig(epochs=EPOCHS, batch_size=BATCH, seed=7)
    fit_and_resume(model, parts_of(SIZES[2]), config, every_steps=4).assert_same_bits()


@pytest.mark.parametrize("every", [3, "epoch"])
def test_ranks_that_take_steps_alone_are_resumed_where_they_have_met(fit_and_resume, every):
    config = FitConfig(epochs=EPOCHS, batch_size=BATCH, seed=7, sync_every=every)
    fit = fit_and_resume(network(), parts_of(SIZES[2]), config, every_steps=1)
    steps = {int(name.split("-")[1]) for name in fit.ids}
    assert steps == ({0, 3} if every == 3 else {0})
    fit.assert_same_bits()


class Remembers(keras.callbacks.Callback):
    """Plain values, arrays, and random numbers of the process."""

    def __init__(self):
        super().__init__()
        self.seen, self.by_name, self.total, self.drawn = [], {}, np.zeros(2), ()

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append(batch)
        self.by_name[str(batch)] = np.float32(logs["loss"])
        self.total += logs["loss"]
        if self.model.optimizer is not None:
            self.drawn = (*self.drawn, random.random(), float(np.random.random()))

    def on_epoch_end(self, epoch, logs=None):
        logs["seen"], logs["total"] = len(self.seen), self.total.copy()
        logs["drawn"] = float(sum(self.drawn))


class SaysItself(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self._epochs = {1}

    def get_state(self):
        return {"epochs": sorted(self._epochs)}

    def set_state(self, state):
        self._epochs = set(state["epochs"])

    def on_epoch_end(self, epoch, logs=None):
        self._epochs.add(epoch * 10)
        logs["epochs"] = len(self._epochs)


def test_callbacks_of_the_users_own_go_on_with_their_attributes_or_with_what_they_say(fit_and_resume):
    # One rank: the random numbers are those of a process, of which the ranks of this test are threads.
    config = FitConfig(epochs=2, batch_size=BATCH, seed=7)
    own = {"callbacks": lambda: [Remembers(), SaysItself()]}
    fit = fit_and_resume(network(), parts_of(SIZES[1]), config, every_steps=4, **own)
    assert fit.whole[0].history["seen"] == [6, 12]
    fit.assert_same_bits()


def test_a_log_file_holds_every_epoch_once(fit_and_resume, tmp_path):
    path = tmp_path / "log.csv"
    config = FitConfig(epochs=3, batch_size=BATCH, seed=7)
    logger = {"callbacks": lambda: [keras.callbacks.CSVLogger(str(path))]}
    fit = fit_and_resume(network(), parts_of(SIZES[2]), config, every_steps=6, **logger)
    whole = path.read_bytes()
    for name in fit.ids:
        path.write_bytes(whole + b"3,0.1")  # a line that somebody died of
        fit.resume(name)
        assert path.read_bytes() == whole, name
    with path.open() as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["0", "1", "2"]


def test_other_numbers_of_ranks_train_on_the_same_rows(fit_and_resume):
    sizes = (17, 0, 26, 9)
    config = FitConfig(epochs=3, batch_size=BATCH, seed=7, validation_split=0.2)
    model = network(keras.optimizers.SGD(0.05, momentum=0.9), batch_norm=False, dropout=False)
    fit = fit_and_resume(model, parts_of(sizes), config, every_steps=4)
    assert len(fit.ids) > 4
    for name, num_ranks in zip(fit.ids, itertools.cycle((1, 2, 3)), strict=False):
        where = f"{name} on {num_ranks} ranks"
        for rank in fit.resume(name, num_ranks=num_ranks):
            for ours, theirs in zip(rank.weights, fit.whole[0].weights, strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7, err_msg=where)
            for column, values in fit.whole[0].history.items():
                np.testing.assert_allclose(rank.history[column], values, rtol=1e-5, err_msg=f"{where}: {column}")


def test_a_fit_shrinks_and_grows_again_with_dropout_and_callbacks(fit_and_resume, fit_ranks):
    config = FitConfig(epochs=9, batch_size=BATCH, seed=7)
    model, parts = network(), parts_of((17, 5, 26, 9))
    fit = fit_and_resume(model, parts, config, every_steps=6, callbacks=callbacks_that_remember)
    smaller = fit.resume(fit.ids[2], num_ranks=2, checkpoint=Checkpoint(every_steps=6))
    name = sorted(
        {message["id"] for message in smaller[0].saved} - {message["id"] for message in fit.whole[0].saved[:3]}
    )[0]
    shares = {rank: m["kept"] for rank, fitted in enumerate(smaller) for m in fitted.saved if m["id"] == name}
    grown = fit_ranks(model, parts, config, callbacks_that_remember, num_ranks=3, resume=Resume(name, shares))
    assert len({rank.final for rank in grown}) == 1
    assert all(same(rank.history, grown[0].history) for rank in grown)
    states = [np.array(rank.model.layers[2].seed_generator.state) for rank in grown]
    assert len({int(state[0]) for state in states}) == 3
    assert len({int(state[1]) for state in states}) == 1


def test_a_checkpoint_of_another_model_is_refused(fit_and_resume):
    config = FitConfig(epochs=1, batch_size=BATCH)
    fit = fit_and_resume(network(), parts_of(SIZES[1]), config, every_steps=3)
    fit.model = network("sgd")
    with pytest.raises(CheckpointError, match=r"of another model: it has shared/optimizer/"):
        fit.resume(fit.ids[0])


def test_a_missing_share_and_one_of_another_checkpoint_are_named(fit_and_resume, tmp_path):
    config = FitConfig(epochs=1, batch_size=BATCH)
    fit = fit_and_resume(network(), parts_of(SIZES[2]), config, every_steps=2)
    (alone,) = LocalGroup(1, timeout_s=10).communicators
    shares = {m["id"]: [rank.saved[i]["kept"] for rank in fit.whole] for i, m in enumerate(fit.whole[0].saved)}
    one, other = sorted(shares)[:2]
    with pytest.raises(CheckpointError, match=f"share 1 of the checkpoint {one} is missing"):
        read_saved_state(Resume(one, {0: shares[one][0]}), alone, tmp_path)
    with pytest.raises(CheckpointError, match=r"share 1 is of epoch 0, step 4"):
        read_saved_state(Resume(one, {0: shares[one][0], 1: shares[other][1]}), alone, tmp_path)


def test_where_to_go_on_comes_as_json():
    fields = json.loads(json.dumps({"id": "000001-00000002", "shares": {"0": "/a", "1": "s3://b"}}))
    assert Resume.from_json(fields) == Resume("000001-00000002", {0: "/a", 1: "s3://b"})
