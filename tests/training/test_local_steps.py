"""Local SGD: steps of each rank alone, then the mean weighted by rows."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from allreduce_spark.config import FitConfig

SIZES = (29, 0, 11, 8)
BATCH = 4


def parts_of(sizes):
    chance = np.random.default_rng(0)
    parts = []
    for size in sizes:
        x = chance.normal(size=(size, 5)).astype("float32")
        parts.append((x, (x[:, 0] - x[:, 1] > 0).astype("float32")))
    return parts


def network(optimizer, *, normalize=False):
    keras.utils.set_random_seed(1)
    layers = [keras.Input((5,)), keras.layers.Dense(6, activation="tanh")]
    layers += [keras.layers.BatchNormalization()] if normalize else []
    model = keras.Sequential([*layers, keras.layers.Dense(1, activation="sigmoid")])
    model.compile(optimizer, "binary_crossentropy", metrics=["accuracy", "auc"])
    return model


def assert_equal_ranks(ranks):
    assert ranks[0].digests
    assert all(rank.digests == ranks[0].digests for rank in ranks)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_one_step_between_two_means_is_a_step_of_the_global_batch(fit_ranks, fit_reference, momentum):
    model, parts = network(keras.optimizers.SGD(0.1, momentum=momentum)), parts_of(SIZES)
    config = FitConfig(epochs=6, batch_size=32, seed=3, sync_every="epoch")  # one step holds a whole shard
    ranks, reference = fit_ranks(model, parts, config), fit_reference(model, parts, config)
    assert_equal_ranks(ranks)
    for ours, theirs in zip(ranks[0].weights, reference.weights, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)
    # The reference evaluates in the same order: metrics while training are those before each step.
    np.testing.assert_allclose(ranks[0].history["loss"], reference.history["loss"], rtol=1e-5)
    np.testing.assert_allclose(ranks[0].history["auc"], reference.history["auc"], rtol=1e-5)


def local_sgd(model, parts, every, epochs):
    """The same by hand: train copies one after the other, average by rows; weights and momenta of the mean."""
    copies = [keras.models.clone_model(model) for _ in parts]
    for copy in copies:
        copy.compile(keras.optimizers.SGD(0.1, momentum=0.9), "binary_crossentropy")
        copy.set_weights(model.get_weights())
        copy.optimizer.build(copy.trainable_variables)
    state = [
        [variable for variable in (*copy.weights, *copy.optimizer.variables) if len(variable.shape)] for copy in copies
    ]
    steps = -(-max(len(y) for _, y in parts) // BATCH)
    for _ in range(epochs):
        for start in range(0, steps, every):
            trained = []
            for copy, (x, y) in zip(copies, parts, strict=True):
                rows = 0
                for step in range(start, min(start + every, steps)):
                    batch = slice(step * BATCH, (step + 1) * BATCH)
                    if len(y[batch]):
                        copy.train_on_batch(x[batch], y[batch])
                    rows += len(y[batch])
                trained.append(rows)
            for variables in zip(*state, strict=True):
                mean = np.average([v.numpy() for v in variables], axis=0, weights=trained)
                for variable in variables:
                    variable.assign(mean)
    return copies[0].get_weights()


@pytest.mark.parametrize("every", [2, 3, "epoch"])
def test_the_ranks_continue_from_the_mean_weighted_by_rows(fit_ranks, every):
    model, parts = network(keras.optimizers.SGD(0.1, momentum=0.9)), parts_of(SIZES)
    ranks = fit_ranks(model, parts, FitConfig(epochs=3, batch_size=BATCH, shuffle=False, sync_every=every))
    assert_equal_ranks(ranks)
    expected = local_sgd(model, parts, 8 if every == "epoch" else every, epochs=3)
    for ours, theirs in zip(ranks[0].weights, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
    assert ranks[1].model.optimizer.iterations == 3 * 8  # those of the longest shard, also where there are no rows


@pytest.mark.parametrize("optimizer", ["adam", "adafactor", "nadam", "rmsprop"])
def test_any_optimizer_learns_and_frozen_weights_keep_their_bits(fit_ranks, optimizer):
    model, parts = network(optimizer, normalize=True), parts_of((60, 0, 40))
    model.optimizer.learning_rate = 0.02
    model.layers[0].trainable = False
    model.compile(model.optimizer, "binary_crossentropy", metrics=["accuracy"])
    before = model.layers[0].get_weights()
    ranks = fit_ranks(model, parts, FitConfig(epochs=12, batch_size=BATCH, sync_every=5, validation_split=0.2))
    assert_equal_ranks(ranks)
    assert ranks[0].history["loss"][-1] < 0.8 * ranks[0].history["loss"][0]
    assert ranks[0].history["val_loss"] == ranks[2].history["val_loss"]
    for ours, theirs in zip(ranks[0].model.layers[0].get_weights(), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)


class StopInTheMiddle(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if batch == 3:
            self.model.stop_training = True


def test_an_epoch_that_is_stopped_ends_with_one_model(fit_ranks):
    ranks = fit_ranks(
        network("sgd"),
        parts_of(SIZES),
        FitConfig(epochs=5, batch_size=BATCH, sync_every=3),
        lambda: [StopInTheMiddle()],
    )
    assert_equal_ranks(ranks)
    assert len(ranks[0].digests) == 1


def test_one_rank_has_nobody_to_wait_for(fit_ranks, fit_reference):
    model, parts = network("adam"), parts_of((30,))
    config = FitConfig(epochs=2, batch_size=8, sync_every="epoch")
    ours, theirs = fit_ranks(model, parts, config)[0], fit_reference(model, parts, config)
    for one, other in zip(ours.weights, theirs.weights, strict=True):
        np.testing.assert_array_equal(one, other)
