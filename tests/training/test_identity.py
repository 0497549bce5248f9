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


def fingerprint(model: keras.Model, **settings: object) -> Fingerprint:
    return fingerprint_of(model, FitConfig(**{"seed": 1, **settings}), "schema", (5, 6))


def test_the_same_code_makes_the_same_fit_though_keras_makes_up_other_names():
    one, two = compiled(), compiled()
    assert one.layers[1].name != two.layers[1].name
    assert fingerprint(one) == fingerprint(two)
    assert Fingerprint.from_json(fingerprint(one).to_json()) == fingerprint(two)


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
