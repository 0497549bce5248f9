"""N ranks on uneven shards end with the weights of one process on the union of their batches, and hold the same bits."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from exactness import assert_exact, assert_same_history, dense_data

from allreduce_spark.config import FitConfig
from allreduce_spark.errors import ConfigError

SIZES = {1: (37,), 2: (29, 18), 3: (31, 3, 14), 4: (17, 0, 26, 9)}


def mlp(optimizer="sgd", loss="sparse_categorical_crossentropy", metrics=("accuracy",), **layer_arguments):
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(16, activation="relu", **layer_arguments),
            keras.layers.Dense(3, activation="softmax"),
        ]
    )
    model.compile(optimizer, loss, metrics=list(metrics))
    return model


def cnn(optimizer):
    keras.utils.set_random_seed(2)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((6, 6, 1)),
            layers.Conv2D(4, 3, activation="relu"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(3, activation="softmax"),
        ]
    )
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def embedding(optimizer):
    keras.utils.set_random_seed(3)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((5,), dtype="int32"),
            layers.Embedding(50, 6),
            layers.Flatten(),
            layers.Dense(3, activation="softmax"),
        ]
    )
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def data_for(model, sizes):
    chance = np.random.default_rng(4)
    shape, dtype = model.input_shape[1:], model.inputs[0].dtype
    return [
        (
            chance.integers(0, 50, (n, *shape)) if dtype == "int32" else chance.normal(size=(n, *shape)).astype("f4"),
            chance.integers(0, 3, n),
        )
        for n in sizes
    ]


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("build", [mlp, cnn, embedding])
@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_ranks_on_uneven_shards_end_with_the_weights_of_one_process(
    fit_ranks, fit_reference, build, optimizer, world_size
):
    model = build(keras.optimizers.SGD(0.05, momentum=0.9) if optimizer == "momentum" else keras.optimizers.Adam(0.01))
    parts = data_for(model, SIZES[world_size])
    config = FitConfig(epochs=3, batch_size=8, seed=7)
    ranks, reference = fit_ranks(model, parts, config), fit_reference(model, parts, config)
    assert_exact(ranks, reference)
    assert_same_history(ranks, reference)


@pytest.mark.parametrize("build", [mlp, cnn, embedding])
def test_gradients_that_are_reduced_in_the_graph_are_those_of_one_process(fit_ranks, fit_reference, build):
    model, config = build(keras.optimizers.Adam(0.01)), FitConfig(epochs=3, batch_size=8, seed=7)
    parts = data_for(model, SIZES[4])
    ranks, reference = fit_ranks(model, parts, config, in_graph=True), fit_reference(model, parts, config)
    assert_exact(ranks, reference)
    assert_same_history(ranks, reference)


def test_the_graph_and_numpy_reduce_to_the_same_bits(fit_ranks):
    model, config = mlp("adam"), FitConfig(epochs=3, batch_size=8, seed=7)
    parts = dense_data(SIZES[3])
    in_graph, by_numpy = (fit_ranks(model, parts, config, in_graph=there) for there in (True, False))
    assert in_graph[0].digests == by_numpy[0].digests


def test_one_rank_has_the_bits_of_plain_keras(fit_ranks, fit_reference):
    model, parts, config = mlp("adam"), dense_data(SIZES[1]), FitConfig(epochs=2, batch_size=8)
    (rank,), reference = fit_ranks(model, parts, config), fit_reference(model, parts, config)
    assert rank.digests == reference.digests


OPTIMIZERS = {
    "schedule": lambda: keras.optimizers.SGD(keras.optimizers.schedules.CosineDecay(0.1, 10)),
    "clipnorm": lambda: keras.optimizers.SGD(0.1, clipnorm=0.01),
    "clipvalue": lambda: keras.optimizers.SGD(0.1, clipvalue=0.005),
    "global_clipnorm": lambda: keras.optimizers.Adam(0.01, global_clipnorm=0.02),
    "weight decay": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
    "moving average": lambda: keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.7, ema_overwrite_frequency=3),
    "moving average at the end": lambda: keras.optimizers.Adam(0.01, use_ema=True, ema_momentum=0.7),
    "accumulation": lambda: keras.optimizers.Adam(0.01, gradient_accumulation_steps=3),
    "loss scale factor": lambda: keras.optimizers.SGD(0.1, loss_scale_factor=128.0),
    "dynamic loss scale": lambda: keras.optimizers.LossScaleOptimizer(
        keras.optimizers.SGD(0.1), initial_scale=2.0**12, dynamic_growth_steps=3
    ),
    "rmsprop": lambda: keras.optimizers.RMSprop(0.01, centered=True),
    "ftrl": lambda: keras.optimizers.Ftrl(0.1),
    "lion": lambda: keras.optimizers.Lion(0.001),
    "adafactor": lambda: keras.optimizers.Adafactor(0.01),
    "nadam": lambda: keras.optimizers.Nadam(0.01),
    "lamb": lambda: keras.optimizers.Lamb(0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_an_optimizer_does_with_gradients_it_does_with_those_of_all_ranks(fit_ranks, fit_reference, name):
    model, parts = mlp(OPTIMIZERS[name]()), dense_data(SIZES[3])
    config = FitConfig(epochs=2, batch_size=8)
    assert_exact(fit_ranks(model, parts, config), fit_reference(model, parts, config), relative=5e-5)


@pytest.mark.parametrize("clip", ["clipnorm", "global_clipnorm"])
def test_sparse_gradients_are_clipped_as_one_process_clips_them(fit_ranks, fit_reference, clip):
    model = embedding(keras.optimizers.SGD(0.5, **{clip: 0.05}))
    parts, config = data_for(model, SIZES[3]), FitConfig(epochs=2, batch_size=8)
    assert_exact(fit_ranks(model, parts, config), fit_reference(model, parts, config))


def test_sample_weights_class_weights_and_l2_losses_count_as_in_one_process(fit_ranks, fit_reference):
    config = FitConfig(epochs=2, batch_size=8)
    model = mlp(kernel_regularizer="l2", activity_regularizer="l2")
    parts = dense_data(SIZES[3], weights=True)
    ranks, reference = fit_ranks(model, parts, config), fit_reference(model, parts, config)
    assert_exact(ranks, reference)
    assert_same_history(ranks, reference)
    config = FitConfig(epochs=2, batch_size=8, class_weight={0: 0.3, 1: 2.5})
    parts = dense_data(SIZES[4])
    ranks, reference = fit_ranks(model, parts, config), fit_reference(model, parts, config)
    assert_exact(ranks, reference)
    assert_same_history(ranks, reference)


@pytest.mark.parametrize("reduction", ["sum", "mean", "mean_with_sample_weight"])
def test_every_reduction_of_a_loss_is_that_of_the_global_batch(fit_ranks, fit_reference, reduction):
    rate = 0.002 if reduction == "sum" else 0.1
    loss = keras.losses.SparseCategoricalCrossentropy(reduction=reduction)
    model = mlp(keras.optimizers.SGD(rate), loss)
    parts, config = dense_data(SIZES[4], weights=True), FitConfig(epochs=2, batch_size=8)
    ranks, reference = fit_ranks(model, parts, config), fit_reference(model, parts, config)
    assert_exact(ranks, reference)
    assert_same_history(ranks, reference)


def test_masked_outputs_count_valid_entries_over_all_ranks(fit_ranks, fit_reference):
    layers = keras.layers
    keras.utils.set_random_seed(5)
    tokens = keras.Input((6,), dtype="int32")
    hidden = layers.LSTM(8, return_sequences=True)(layers.Embedding(20, 4, mask_zero=True)(tokens))
    outputs = {
        "tag": layers.Dense(3, activation="softmax", name="tag")(hidden),
        "value": layers.Dense(1, name="value")(hidden),
    }
    model = keras.Model(tokens, outputs)
    model.compile("sgd", {"tag": "sparse_categorical_crossentropy", "value": "mse"})
    chance = np.random.default_rng(6)
    parts = []
    for size in SIZES[3]:
        lengths = chance.integers(1, 7, size)
        x = np.where(np.arange(6) < lengths[:, None], chance.integers(1, 20, (size, 6)), 0)
        parts.append(
            (x, {"tag": chance.integers(0, 3, (size, 6)), "value": chance.normal(size=(size, 6, 1)).astype("f4")})
        )
    config = FitConfig(epochs=2, batch_size=8)
    ranks, reference = fit_ranks(model, parts, config), fit_reference(model, parts, config)
    assert_exact(ranks, reference)
    np.testing.assert_allclose(ranks[0].history["loss"], reference.history["loss"], rtol=1e-5)


def mean_of_valid_entries(y_true, y_pred):
    """One number for a batch: a mean over rows, each of the mean of its valid entries."""
    valid = keras.ops.cast(keras.ops.not_equal(y_true, -1), y_pred.dtype)
    squares = keras.ops.square(y_true - y_pred) * valid
    return keras.ops.mean(keras.ops.sum(squares, axis=1) / keras.ops.sum(valid, axis=1))


def test_a_loss_that_returns_one_number_is_a_mean_over_rows_also_for_masked_outputs(fit_ranks, fit_reference):
    keras.utils.set_random_seed(5)
    tokens = keras.Input((6,), dtype="int32")
    hidden = keras.layers.LSTM(8, return_sequences=True)(keras.layers.Embedding(20, 4, mask_zero=True)(tokens))
    model = keras.Model(tokens, keras.layers.Dense(1)(hidden))
    model.compile(keras.optimizers.SGD(0.1), mean_of_valid_entries)
    chance = np.random.default_rng(6)
    parts = []
    for size in SIZES[3]:
        valid = np.arange(6) < chance.integers(1, 7, size)[:, None]
        x = np.where(valid, chance.integers(1, 20, (size, 6)), 0)
        parts.append((x, np.where(valid, chance.normal(size=(size, 6)), -1).astype("f4")))
    config = FitConfig(epochs=2, batch_size=8)
    ranks, reference = fit_ranks(model, parts, config), fit_reference(model, parts, config)
    assert_exact(ranks, reference)
    assert_same_history(ranks, reference)


@keras.saving.register_keras_serializable("test_exactness")
class OneNumber(keras.losses.Loss):
    def call(self, y_true, y_pred):
        return keras.ops.mean(keras.ops.square(y_pred[:, 0] - y_true))


@pytest.mark.parametrize(
    ("reduction", "weights", "why"), [("sum", False, "asks for their sum"), ("mean", True, "the rows have weights")]
)
def test_a_loss_that_returns_one_number_that_is_no_mean_over_rows_is_refused(fit_ranks, reduction, weights, why):
    model = mlp(loss=OneNumber(reduction=reduction), metrics=())
    with pytest.raises(ConfigError, match=f"returns one number for a batch, but .*{why}.*axis=-1"):
        fit_ranks(model, dense_data((8, 8), weights=weights), FitConfig(batch_size=8))


def nothing(y_true, y_pred):
    return 0.0


def test_an_output_may_not_count(fit_ranks, fit_reference):
    keras.utils.set_random_seed(1)
    inputs = keras.Input((8,))
    hidden = keras.layers.Dense(4)(inputs)
    outputs = {"counts": keras.layers.Dense(3, name="counts")(hidden), "shown": keras.layers.ReLU(name="shown")(hidden)}
    model = keras.Model(inputs, outputs)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", {"counts": loss, "shown": nothing})
    parts = [(x, {"counts": y, "shown": y}) for x, y in dense_data(SIZES[2])]
    config = FitConfig(epochs=1, batch_size=8)
    assert_exact(fit_ranks(model, parts, config), fit_reference(model, parts, config))


def test_steps_that_are_no_graphs_are_those_of_one_process(fit_ranks, fit_reference):
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [keras.Input((8,)), keras.layers.Dense(3, use_bias=False)]
    )  # one gradient, which comes alone
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=1)  # one denominator
    model.compile("sgd", loss, run_eagerly=True)
    parts, config = dense_data(SIZES[2]), FitConfig(epochs=1, batch_size=8)
    assert_exact(fit_ranks(model, parts, config), fit_reference(model, parts, config))


def test_the_losses_of_rows_are_computed_once(fit_ranks):
    calls = []

    def absolute(y_true, y_pred):
        calls.append(1)
        return keras.ops.mean(keras.ops.abs(y_true[:, None] - y_pred), axis=-1)

    model = mlp()
    model.compile("sgd", absolute, run_eagerly=True)
    fit_ranks(model, dense_data((16, 16)), FitConfig(batch_size=8))
    assert len(calls) == 2 * 2  # on each rank, in each step


def test_ignored_classes_count_over_all_ranks(fit_ranks, fit_reference):
    model = mlp(loss=keras.losses.SparseCategoricalCrossentropy(ignore_class=1))
    parts, config = dense_data(SIZES[3]), FitConfig(epochs=2, batch_size=8)
    assert_exact(fit_ranks(model, parts, config), fit_reference(model, parts, config))


@keras.saving.register_keras_serializable("test_exactness")
class OwnStep(keras.Model):
    """A custom train_step with its own loss and its own logs."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.dense = keras.layers.Dense(3)

    def call(self, x):
        return self.dense(x)

    def train_step(self, data):
        import tensorflow as tf

        x, y = data
        with tf.GradientTape() as tape:
            logits = self(x, training=True)
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(y, logits))
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        return {"own_loss": loss}


@keras.saving.register_keras_serializable("test_exactness")
class WeighedStep(OwnStep):
    """Reconstructs its input, of which some rows count for more; there are no labels."""

    def train_step(self, data):
        import tensorflow as tf

        x, y, weight = keras.utils.unpack_x_y_sample_weight(data)
        assert y is None
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(weight[:, None] * tf.square(self(x, training=True) - x[:, :3]))
        self.optimizer.apply(tape.gradient(loss, self.trainable_variables), self.trainable_variables)
        return {"own_loss": loss}


def test_rows_may_have_weights_and_no_labels(fit_ranks):
    keras.utils.set_random_seed(8)
    model = WeighedStep()
    model(np.zeros((1, 8), "float32"))
    model.compile("adam")
    (x, _, weight), (other_x, _, other_weight) = dense_data((16, 16), weights=True)
    ranks = fit_ranks(model, [(x, None, weight), (other_x, None, other_weight)], FitConfig(batch_size=8, shuffle=False))
    # Plain Keras takes no such rows from a `PyDataset`: so one rank, with the same global batches.
    both = [np.concatenate([a[:8], b[:8], a[8:], b[8:]]) for a, b in ((x, other_x), (weight, other_weight))]
    assert_exact(ranks, fit_ranks(model, [(both[0], None, both[1])], FitConfig(batch_size=16, shuffle=False))[0])


def test_a_custom_train_step_is_exact_and_its_logs_agree(fit_ranks, fit_reference):
    keras.utils.set_random_seed(8)
    model = OwnStep()
    model(np.zeros((1, 8), "float32"))
    model.compile("adam")
    parts, config = dense_data(SIZES[2]), FitConfig(epochs=2, batch_size=8)
    ranks = fit_ranks(model, parts, config)
    assert_exact(ranks, fit_reference(model, parts, config))
    assert ranks[0].history == ranks[1].history
    assert list(ranks[0].history) == ["own_loss"]


def test_float64_models_are_reduced_in_float64(fit_ranks, fit_reference):
    keras.utils.set_random_seed(9)
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(3, dtype="float64")])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True, dtype="float64"))
    parts, config = dense_data(SIZES[3]), FitConfig(epochs=2, batch_size=8)
    assert_exact(
        fit_ranks(model, parts, config), fit_reference(model, parts, config), relative=1e-8
    )  # float32 would give 1e-7


@pytest.mark.parametrize(
    ("policy", "relative"), [("mixed_float16", 2e-3), ("mixed_bfloat16", 2e-2), ("bfloat16", None)]
)
def test_half_precision_is_that_of_one_process_to_the_precision_that_it_has(fit_ranks, fit_reference, policy, relative):
    keras.utils.set_random_seed(10)
    model = keras.Sequential(
        [keras.Input((8,)), keras.layers.Dense(16, "relu", dtype=policy), keras.layers.Dense(3, dtype="float32")]
    )
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    parts, config = dense_data((64, 40)), FitConfig(epochs=5, batch_size=8)
    ranks, reference = fit_ranks(model, parts, config), fit_reference(model, parts, config)
    assert ranks[0].history["loss"][-1] < ranks[0].history["loss"][0]
    # Weights of half precision are rounded after each step, and no two ways of summing stay together for long.
    assert_exact(ranks, reference, relative or np.inf)


@pytest.fixture
def global_policy():
    """Returns set(name): Keras's dtype policy until the end of the test."""
    before = keras.config.dtype_policy()
    yield keras.config.set_dtype_policy
    keras.config.set_dtype_policy(before)


def test_the_loss_is_scaled_as_in_one_process_where_keras_sees_to_it_by_its_policy(
    fit_ranks, fit_reference, global_policy
):
    global_policy("mixed_float16")
    keras.utils.set_random_seed(10)
    model = keras.Sequential(
        [keras.Input((8,)), keras.layers.Dense(16, "relu"), keras.layers.Dense(3, dtype="float32")]
    )
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    global_policy("float32")  # as it is where the copies are loaded
    parts, config = dense_data((64, 40)), FitConfig(epochs=3, batch_size=8)
    ranks, reference = fit_ranks(model, parts, config), fit_reference(model, parts, config)
    assert_exact(ranks, reference, relative=2e-3)
    scales = {float(fitted.model.optimizer.dynamic_scale) for fitted in (*ranks, reference)}
    assert scales == {model.optimizer.initial_scale}


@pytest.mark.parametrize("in_graph", [False, True])
def test_an_overflow_on_one_rank_makes_all_skip_the_step_and_scale_the_loss_as_one_process_does(
    fit_ranks, fit_reference, in_graph
):
    keras.utils.set_random_seed(16)
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4, dtype="mixed_float16"), keras.layers.Dense(1)])
    sgd = keras.optimizers.SGD(0.02, momentum=0.5)
    optimizer = keras.optimizers.LossScaleOptimizer(sgd, initial_scale=1024.0, dynamic_growth_steps=2)
    model.compile(optimizer, "mse")
    parts = [(x, x.sum(axis=1)) for x, _ in dense_data((40, 29))]
    parts[1][1][13] = 1e5  # on rank 1, in the second step of each epoch: its gradient is more than float16 can hold
    config = FitConfig(epochs=3, batch_size=8, shuffle=False)
    ranks, reference = fit_ranks(model, parts, config, in_graph=in_graph), fit_reference(model, parts, config)
    assert_exact(ranks, reference, relative=2e-2)
    scales, steps = [], []
    for fitted in (*ranks, reference):
        scales.append(float(fitted.model.optimizer.dynamic_scale))
        steps.append(int(fitted.model.optimizer.inner_optimizer.iterations))
    assert steps == [3 * (5 - 1)] * 3, "one step of five is skipped"
    assert len(set(scales)) == 1
    assert scales[0] != 1024


def test_moving_statistics_are_averaged_and_frozen_ones_keep_their_bits(fit_ranks):
    keras.utils.set_random_seed(11)
    frozen = keras.layers.BatchNormalization(trainable=False, name="frozen")
    model = keras.Sequential(
        [
            keras.Input((8,)),
            frozen,
            keras.layers.Dense(4),
            keras.layers.BatchNormalization(momentum=0.5, name="moving"),
            keras.layers.Dense(3, activation="softmax"),
        ]
    )
    model.compile("sgd", "sparse_categorical_crossentropy")
    frozen.set_weights([w + 0.1 for w in frozen.get_weights()])
    before = frozen.get_weights()
    dense_kernel, dense_bias = model.layers[1].get_weights()
    parts = dense_data((8, 4, 0))
    ranks = fit_ranks(model, parts, FitConfig(epochs=1, batch_size=8, shuffle=False))
    assert len({tuple(rank.digests) for rank in ranks}) == 1
    for left, right in zip(before, ranks[0].model.get_layer("frozen").get_weights(), strict=True):
        assert left.tobytes() == right.tobytes()
    # One step of one epoch: the moving mean is half of the mean of each rank's batch means, weighted by rows.
    scale, offset, mean, variance = before
    x = np.concatenate([part[0] for part in parts])
    activations = ((x - mean) / np.sqrt(variance + 1e-3) * scale + offset) @ dense_kernel + dense_bias
    np.testing.assert_allclose(
        ranks[0].model.get_layer("moving").moving_mean, 0.5 * activations.mean(axis=0), rtol=1e-4, atol=1e-6
    )


def test_ranks_draw_different_dropout_masks_and_still_hold_the_same_weights(fit_ranks):
    keras.utils.set_random_seed(12)
    model = keras.Sequential(
        [keras.Input((8,)), keras.layers.Dropout(0.5, seed=3), keras.layers.Dense(3, activation="softmax")]
    )
    model.compile("sgd", "sparse_categorical_crossentropy")
    ranks = fit_ranks(model, dense_data((16, 16)), FitConfig(epochs=2, batch_size=8))
    assert ranks[0].digests == ranks[1].digests
    states = [np.array(rank.model.layers[0].seed_generator.state) for rank in ranks]
    assert states[0][0] != states[1][0]
    assert states[0][1] == states[1][1]  # both drew equally often


def test_fewer_rows_than_ranks_still_train(fit_ranks, fit_reference):
    model, parts, config = mlp("adam"), dense_data((0, 2, 0, 1)), FitConfig(epochs=2, batch_size=8)
    assert_exact(fit_ranks(model, parts, config), fit_reference(model, parts, config))


def test_validation_is_that_of_one_process(fit_ranks, fit_reference):
    metrics = ["accuracy", keras.metrics.SparseTopKCategoricalAccuracy(2)]
    model, config = mlp("adam", metrics=metrics), FitConfig(epochs=2, batch_size=8, validation_split=0.3)
    parts = dense_data(SIZES[4])
    ranks, reference = fit_ranks(model, parts, config), fit_reference(model, parts, config)
    assert_exact(ranks, reference)
    assert_same_history(ranks, reference)
    config, others = FitConfig(epochs=2, batch_size=8), dense_data((2, 0, 11, 5), seed=13)
    ranks = fit_ranks(model, parts, config, validation=others)
    assert_same_history(ranks, fit_reference(model, parts, config, validation=others))


def test_metrics_that_are_no_means_equal_those_of_one_process(fit_ranks, fit_reference):
    keras.utils.set_random_seed(14)
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(1, activation="sigmoid")])
    metrics = [
        keras.metrics.AUC(),
        keras.metrics.Precision(),
        keras.metrics.F1Score(threshold=0.5),
        keras.metrics.R2Score(),
    ]
    model.compile("adam", "binary_crossentropy", metrics=[*metrics, keras.metrics.BinaryIoU()])
    parts = [(x, y.reshape(-1, 1).astype("f4")) for x, y in dense_data(SIZES[4])]
    config = FitConfig(epochs=2, batch_size=8, validation_split=0.3)
    assert_same_history(fit_ranks(model, parts, config), fit_reference(model, parts, config))


@keras.saving.register_keras_serializable("test_exactness")
class TwoLogs(OwnStep):
    """Logs something beside the loss, so that Keras shows what the last step returned."""

    def train_step(self, data):
        logs = super().train_step(data)
        return {"loss": logs["own_loss"], "extra": logs["own_loss"] * 2}


def test_logs_that_are_no_metrics_are_the_mean_over_the_rows_of_the_last_step_on_every_rank(fit_ranks, fit_reference):
    keras.utils.set_random_seed(15)
    model = TwoLogs()
    model(np.zeros((1, 8), "float32"))
    model.compile("sgd", "mse")
    parts, config = dense_data(SIZES[4]), FitConfig(epochs=2, batch_size=8)
    ranks, reference = fit_ranks(model, parts, config), fit_reference(model, parts, config)
    assert all(rank.history == ranks[0].history for rank in ranks)
    assert_same_history(ranks, reference)


@keras.saving.register_keras_serializable("test_exactness")
class TwoApplies(keras.Model):
    """One optimizer that is applied twice in a step, each time to other variables."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.first, self.second = keras.layers.Dense(3), keras.layers.Dense(3, use_bias=False)

    def call(self, x):
        return self.second(self.first(x))

    def train_step(self, data):
        import tensorflow as tf

        x, y = data
        for layer in (self.first, self.second):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(y, self(x)))
            gradients = tape.gradient(loss, layer.trainable_variables)
            self.optimizer.apply(gradients, layer.trainable_variables)
        return {"own_loss": loss}


def test_an_optimizer_may_be_applied_twice_in_a_step(fit_ranks, fit_reference):
    keras.utils.set_random_seed(16)
    model = TwoApplies()
    model(np.zeros((1, 8), "float32"))
    model.compile(keras.optimizers.SGD(0.1))
    parts, config = dense_data(SIZES[3]), FitConfig(epochs=2, batch_size=8)
    assert_exact(fit_ranks(model, parts, config), fit_reference(model, parts, config))
