"""Exactness with Keras on JAX and on PyTorch; `tests/test_keras_backends.py` runs it for each in a process of its own.

With TensorFlow, `test_exactness.py` and its neighbours say all this, and more.
"""

from __future__ import annotations

import keras
import numpy as np
import pytest
from exactness import RELATIVE, assert_exact, assert_same_history, dense_data, on_ranks

from allreduce_spark.communicator.local import LocalGroup
from allreduce_spark.config import Checkpoint, FitConfig
from allreduce_spark.errors import CollectiveError, ConfigError, DataError
from allreduce_spark.training.batches import BatchPlan, ShardBatches
from allreduce_spark.training.loops import DistributedOptimizer, broadcast
from allreduce_spark.training.resume import Resume

layers = keras.layers


def assert_same_fit(ranks, reference, relative=RELATIVE):
    assert_exact(ranks, reference, relative)
    assert_same_history(ranks, reference, relative)


def tagger():
    """Masked tokens in, two outputs: neither loss is a mean over rows."""
    keras.utils.set_random_seed(5)
    tokens = keras.Input((6,), dtype="int32")
    hidden = layers.Dense(8, "tanh")(layers.Embedding(20, 4, mask_zero=True)(tokens))
    tag = layers.Dense(3, activation="softmax", name="tag")(hidden)
    value = layers.Dense(1, name="value")(layers.GlobalAveragePooling1D()(hidden))
    model = keras.Model(tokens, {"tag": tag, "value": value})
    losses = {"tag": "sparse_categorical_crossentropy", "value": keras.losses.MeanSquaredError(reduction="sum")}
    optimizer = keras.optimizers.Adam(0.01, global_clipnorm=0.5, use_ema=True, gradient_accumulation_steps=2)
    model.compile(optimizer, losses, loss_weights={"tag": 1.0, "value": 0.01}, metrics={"tag": ["accuracy"]})
    return model


def tagged(sizes, seed):
    chance = np.random.default_rng(seed)
    parts = []
    for size in sizes:
        lengths = chance.integers(1, 7, size)
        x = np.where(np.arange(6) < lengths[:, None], chance.integers(1, 20, (size, 6)), 0)
        y = {"tag": chance.integers(0, 3, (size, 6)), "value": chance.normal(size=(size, 1)).astype("f4")}
        parts.append((x, y))
    return parts


def test_ranks_on_uneven_shards_end_where_one_process_ends_also_with_losses_that_are_no_mean(fit_ranks, fit_reference):
    model, config = tagger(), FitConfig(epochs=2, batch_size=8, seed=7)
    parts = tagged((16, 0, 9), seed=6)
    assert_same_fit(fit_ranks(model, parts, config), fit_reference(model, parts, config))


def test_weights_of_rows_and_validation_and_metrics_that_are_no_mean_are_those_of_one_process(fit_ranks, fit_reference):
    keras.utils.set_random_seed(14)
    model = keras.Sequential(
        [keras.Input((8,)), layers.Dense(6, "tanh", kernel_regularizer="l2"), layers.Dense(1, activation="sigmoid")]
    )
    model.compile("adam", "binary_crossentropy", metrics=[keras.metrics.AUC(), keras.metrics.F1Score(threshold=0.5)])
    parts = [(x, y.reshape(-1, 1).astype("f4")) for x, y in dense_data((24, 0, 9))]
    config = FitConfig(epochs=2, batch_size=8, validation_split=0.3, class_weight={0: 0.3, 1: 2.5})
    assert_same_fit(fit_ranks(model, parts, config), fit_reference(model, parts, config))


def normalized(policy=None):
    keras.utils.set_random_seed(11)
    model = keras.Sequential(
        [
            keras.Input((8,)),
            layers.Dense(4, dtype=policy),
            layers.BatchNormalization(momentum=0.5, name="moving", dtype=policy),
            layers.Dropout(0.3, seed=5),
            layers.Dense(3, activation="softmax", dtype="float32"),
        ]
    )
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def test_an_overflow_on_one_rank_makes_all_skip_the_step_and_scale_the_loss_as_one_process_does(
    fit_ranks, fit_reference
):
    keras.utils.set_random_seed(16)
    model = keras.Sequential([keras.Input((8,)), layers.Dense(4, dtype="mixed_float16"), layers.Dense(1)])
    sgd = keras.optimizers.SGD(0.02, momentum=0.5)
    model.compile(keras.optimizers.LossScaleOptimizer(sgd, initial_scale=1024.0, dynamic_growth_steps=2), "mse")
    parts = [(x, x.sum(axis=1)) for x, _ in dense_data((40, 29))]
    parts[1][1][13] = 1e5  # on rank 1, in the second step of each epoch: its gradient is more than float16 can hold
    config = FitConfig(epochs=3, batch_size=8, shuffle=False)
    ranks, reference = fit_ranks(model, parts, config), fit_reference(model, parts, config)
    assert_same_fit(ranks, reference, relative=2e-2)
    optimizers = [fitted.model.optimizer for fitted in (*ranks, reference)]
    assert [int(each.inner_optimizer.iterations) for each in optimizers] == [3 * (5 - 1)] * 3, "one of five is skipped"
    (scale,) = {float(each.dynamic_scale) for each in optimizers}
    assert scale != 1024


def test_moving_statistics_are_averaged_by_rows(fit_ranks):
    model, parts = normalized(), dense_data((8, 4, 0))
    kernel, bias = model.layers[0].get_weights()
    ranks = fit_ranks(model, parts, FitConfig(epochs=1, batch_size=8, shuffle=False))
    assert len({tuple(rank.digests) for rank in ranks}) == 1
    # One step: the moving mean is half of the mean of each rank's batch means, weighted by rows.
    activations = np.concatenate([x for x, _ in parts]) @ kernel + bias
    moving = ranks[0].model.get_layer("moving").moving_mean.numpy()
    np.testing.assert_allclose(moving, 0.5 * activations.mean(axis=0), rtol=1e-4, atol=1e-6)
    states = [rank.model.get_layer(index=2).seed_generator.state.numpy() for rank in ranks]
    assert states[0][0] != states[1][0], "the ranks drop the same units"


def test_a_fit_resumed_in_the_middle_of_an_epoch_has_the_bits_of_one_that_was_not_interrupted(fit_ranks):
    model, parts = normalized("mixed_bfloat16"), dense_data((16, 12))
    config = FitConfig(epochs=2, batch_size=4, seed=7, validation_split=0.25)
    arguments = {"checkpoint": Checkpoint(every_steps=5), "callbacks": lambda: [keras.callbacks.EarlyStopping("loss")]}
    whole = fit_ranks(model, parts, config, **arguments)
    name = "000001-00000002"
    resume = Resume(name, {r: m["kept"] for r, fitted in enumerate(whole) for m in fitted.saved if m["id"] == name})
    assert len(resume.shares) == 2, whole[0].saved
    for resumed, before in zip(fit_ranks(model, parts, config, resume=resume, **arguments), whole, strict=True):
        assert resumed.final == before.final
        assert resumed.history == before.history


def test_steps_of_each_rank_alone_end_in_one_model(fit_ranks, fit_reference):
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((8,)), layers.Dense(6, "tanh"), layers.Dense(3, activation="softmax")])
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "sparse_categorical_crossentropy", metrics=["accuracy"])
    parts = dense_data((29, 0, 11))
    config = FitConfig(epochs=3, batch_size=32, sync_every="epoch")  # one step holds a whole shard
    assert_same_fit(fit_ranks(model, parts, config), fit_reference(model, parts, config))
    ranks = fit_ranks(normalized(), parts, FitConfig(epochs=1, batch_size=4, sync_every=3))
    assert all(rank.digests == ranks[0].digests for rank in ranks)


@keras.saving.register_keras_serializable("on_any_keras_backend")
class OwnStep(keras.Model):
    """A custom train_step in the form that Keras's guides give it."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.dense = layers.Dense(3)

    def call(self, x):
        return self.dense(x)

    def train_step(self, *arguments):
        return self._jax_step(*arguments) if keras.backend.backend() == "jax" else self._torch_step(*arguments)

    def _loss(self, y, logits):
        return keras.ops.mean(keras.losses.sparse_categorical_crossentropy(y, logits, from_logits=True))

    def _jax_step(self, state, data):
        import jax

        (trainable, others, optimizer, metrics), (x, y) = state, data

        def forward(trainable):
            logits, changed = self.stateless_call(trainable, others, x)
            return self._loss(y, logits), changed

        (loss, others), gradients = jax.value_and_grad(forward, has_aux=True)(trainable)
        trainable, optimizer = self.optimizer.stateless_apply(optimizer, gradients, trainable)
        return {"own_loss": loss}, (trainable, others, optimizer, metrics)

    def _torch_step(self, data):
        import torch

        x, y = data
        self.zero_grad()
        loss = self._loss(y, self(x))
        loss.backward()
        with torch.no_grad():
            self.optimizer.apply([v.value.grad for v in self.trainable_weights], self.trainable_weights)
        return {"own_loss": loss}


def test_a_custom_train_step_is_exact_and_its_logs_agree(fit_ranks, fit_reference):
    keras.utils.set_random_seed(8)
    model = OwnStep()
    model(np.zeros((1, 8), "float32"))
    model.compile("adam")
    parts, config = dense_data((13, 9)), FitConfig(epochs=2, batch_size=8)
    assert_same_fit(fit_ranks(model, parts, config), fit_reference(model, parts, config))


def test_an_error_of_a_collective_within_a_step_comes_out_as_it_was_raised(fit_ranks, monkeypatch):
    communicator = type(LocalGroup(1, timeout_s=1).communicators[0])
    allreduce = communicator.allreduce

    def lose(self, buffer, *arguments, **named):
        if buffer.dtype == np.float32:  # gradients
            raise CollectiveError("rank 1 is gone")
        allreduce(self, buffer, *arguments, **named)

    model, parts = normalized(), dense_data((8, 8))
    monkeypatch.setattr(communicator, "allreduce", lose)
    with pytest.raises(CollectiveError, match=r"^rank 1 is gone$"):
        fit_ranks(model, parts, FitConfig(batch_size=8))


def test_a_loop_of_ones_own_averages_the_statistics_of_a_model_that_is_given():
    models, x = [normalized(), normalized()], dense_data((8, 8))
    models[1].get_layer("moving").set_weights([w + 1 for w in models[1].get_layer("moving").get_weights()])

    def train(communicator, model):
        broadcast(model, communicator)
        optimizer = DistributedOptimizer(keras.optimizers.SGD(0.1), communicator, model=model)
        model.compile(optimizer, "sparse_categorical_crossentropy", jit_compile=keras.backend.backend() == "jax")
        kernel, bias = model.layers[0].get_weights()
        model.fit(*x[communicator.rank], batch_size=8, verbose=0)
        return (x[communicator.rank][0] @ kernel + bias).mean(axis=0), model.get_weights()

    (first, weights), (second, others) = on_ranks(train, *models)
    for ours, theirs in zip(weights, others, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    moving = models[0].get_layer("moving").moving_mean.numpy()
    np.testing.assert_allclose(moving, 0.5 * (first + second) / 2, rtol=1e-4, atol=1e-6)


def test_scaling_the_loss_around_a_distributed_optimizer_is_refused_in_the_first_step():
    models = [normalized(), normalized()]

    def train(communicator, model):
        optimizer = keras.optimizers.LossScaleOptimizer(DistributedOptimizer(keras.optimizers.SGD(), communicator))
        model.compile(optimizer, "sparse_categorical_crossentropy", jit_compile=keras.backend.backend() == "jax")
        model.fit(*dense_data((8,))[0], verbose=0)

    with pytest.raises(ConfigError, match=r"LossScaleOptimizer\(optimizer\), communicator"):
        on_ranks(train, *models)


def test_a_step_without_rows_has_the_batch_that_has_been_compiled_where_each_would_be_compiled_anew(write_shard):
    (part,) = dense_data((13,))
    batches = ShardBatches({1: write_shard(part)}, BatchPlan((40, 13), 8, 2))
    padding = 8 if keras.backend.backend() == "jax" else 1
    assert [len(batches[step][0]) for step in range(len(batches))] == [8, 5, padding, padding, padding]
    np.testing.assert_array_equal(batches[4][0], np.repeat(part[0][:1], padding, axis=0))


def test_what_the_backend_cannot_do_is_refused_on_the_driver():
    from allreduce_spark.data.spec import LeafSpec, RowSpec
    from allreduce_spark.training.checks import check_backends, check_inputs

    assert check_backends("mpi") == "mpi"
    with pytest.raises(ConfigError, match="backend='horovod-mpi' reduces what TensorFlow computes"):
        check_backends("horovod-mpi")
    with pytest.raises(DataError, match="computes with numbers only"):
        check_inputs(OwnStep(), RowSpec(LeafSpec("x", "string", ())))
