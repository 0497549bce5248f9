"""What a fit is a fit of: equal for equal code, whatever names Keras makes up, and different where it matters."""

from __future__ import annotations

import keras
import pytest

from allreduce_spark.checkpoint.fingerprint import Fingerprint, differences
from allreduce_spark.config import FitConfig
from allreduce_spark.training.identity import fingerprint_of


def compiled(units: int = 4, activation: str = "relu", optimizer: object = "adam", skip: bool = False) -> keras.Model:
    inputs = keras.Input((3,))
    hidden = keras.layers.Dense(units, activation)(inputs)
    hidden = keras.layers.Concatenate()([hidden, inputs]) if skip else hidden
    model = keras.Model(inputs, keras.layers.Dense(1)(hidden))
    model.compile(optimizer, "mse")
    return model


def fingerprint(
    model: keras.Model, callbacks: tuple[keras.callbacks.Callback, ...] = (), **settings: object
) -> Fingerprint:
    config = FitConfig(**{"seed": 1, **settings})
    return fingerprint_of(model, config, callbacks, data_schema="schema", rows=(5, 6), validation_rows=2)


def test_the_same_code_makes_the_same_fit_though_keras_makes_up_other_names():
    one, two = compiled(), compiled()
    assert one.layers[1].name != two.layers[1].name
    assert fingerprint(one) == fingerprint(two)
    assert Fingerprint.from_json(fingerprint(one).to_json()) == fingerprint(two)


def my_loss(y, predicted):
    return keras.ops.mean(keras.ops.abs(y - predicted), -1)


class Strange(keras.losses.Loss):
    def call(self, y, predicted):
        return my_loss(y, predicted)

    def get_config(self):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("compiled_with", "loss", "metrics"),
    [
        (lambda: ("mse", ["mae"]), '{"loss": "mse"}', '{"metrics": ["mae"]}'),
        (lambda: (my_loss, None), '{"loss": "my_loss"}', "{}"),
        (lambda: (Strange(), None), '{"loss": "Strange"}', "{}"),
        (lambda: (keras.losses.Huber(2.0), None), r'{"loss": {"Huber": {"delta": 2.0,', "{}"),
        (lambda: ("mse", [keras.metrics.AUC()]), '{"loss": "mse"}', r'{"metrics": [{"AUC": {"curve": "ROC",'),
    ],
    ids=["names", "function", "silent object", "object", "metric"],
)
def test_losses_and_metrics_are_told_apart_as_people_name_them(compiled_with, loss, metrics):
    def one():
        loss, metrics = compiled_with()
        model = compiled()
        model.compile("adam", loss, metrics=metrics)
        return fingerprint(model)

    assert one() == one()
    assert one().loss.startswith(loss)
    assert one().metrics.startswith(metrics)


def test_arguments_of_fit_that_change_the_result_are_part_of_it():
    model = compiled()
    stopping = keras.callbacks.EarlyStopping()
    for changed in ({"shuffle": False}, {"class_weight": {0: 2.0}}, {"seed": 2}, {"callbacks": (stopping,)}):
        found = differences(fingerprint(model), fingerprint(model, **changed), mid_epoch=True)
        assert len(found) == 1, changed


def test_another_precision_is_another_model():
    class Silent(keras.Model):
        pass

    def in_half_precision(make):
        keras.config.set_dtype_policy("mixed_bfloat16")
        try:
            return fingerprint(make())
        finally:
            keras.config.set_dtype_policy("float32")

    def silent():
        model = Silent()
        model.compile("adam", "mse")
        return model

    for make in (compiled, silent):
        assert in_half_precision(make).model != fingerprint(make()).model


@pytest.mark.parametrize("change", [{"units": 5}, {"activation": "tanh"}, {"skip": True}])
def test_another_architecture_is_another_fit(change):
    assert fingerprint(compiled()).model != fingerprint(compiled(**change)).model


def test_training_changes_neither_the_model_nor_the_kind_of_optimizer():
    model = compiled()
    before = fingerprint(model)
    model.optimizer.learning_rate = 0.5
    found = differences(before, fingerprint(model), mid_epoch=True)
    assert [(difference.forbids, "learning_rate" in difference.text) for difference in found] == [(False, True)]


def test_the_global_batch_is_that_of_all_shards():
    assert fingerprint(compiled(), batch_size=8).global_batch_size == 16


def test_a_class_that_says_not_what_it_is_made_of_counts_by_its_name():
    class Silent(keras.Model):
        def __init__(self, units):
            super().__init__()
            self.dense = keras.layers.Dense(units)

        def call(self, inputs):
            return self.dense(inputs)

    model = Silent(3)
    model.compile("sgd", "mse")
    assert fingerprint(model) == fingerprint(model)
    assert fingerprint(model).model != fingerprint(compiled()).model
