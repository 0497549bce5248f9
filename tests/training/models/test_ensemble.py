"""An ensemble is a Keras model whose predictions are the mean, or the votes, of its members'."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from allreduce_spark.errors import ConfigError
from allreduce_spark.training.models.ensemble import ensemble_of

X = np.random.default_rng(0).normal(size=(40, 4)).astype("float32")
Y = np.random.default_rng(1).integers(0, 3, 40)


def classifier(units: int = 8, classes: int = 3) -> keras.Model:
    model = keras.Sequential(
        [
            keras.Input((4,), name="x"),
            keras.layers.Dense(units, activation="relu", name="hidden"),
            keras.layers.Dense(classes, activation="softmax", name="class"),
        ],
        name="classifier",
    )
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def binary(probabilities: float) -> keras.Model:
    """A model that finds class 1 as probable as this, whatever the row."""
    logit = np.log(probabilities / (1 - probabilities))
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(
                1,
                activation="sigmoid",
                kernel_initializer="zeros",
                bias_initializer=keras.initializers.Constant(logit),
            ),
        ]
    )
    model.compile("sgd", "binary_crossentropy", metrics=["accuracy"])
    return model


def with_two_outputs() -> keras.Model:
    inputs = {"a": keras.Input((4,), name="a"), "b": keras.Input((2,), name="b")}
    joined = keras.layers.Concatenate()([inputs["a"], inputs["b"]])
    kind = keras.layers.Dense(3, activation="softmax", name="kind")(joined)
    size = keras.layers.Dense(1, name="size")(joined)
    model = keras.Model(inputs, {"kind": kind, "size": size})
    model.compile("sgd", {"kind": "sparse_categorical_crossentropy", "size": "mse"}, metrics={"kind": ["accuracy"]})
    return model


def predict(model: keras.Model, x: Any = X) -> Any:
    return model.predict(x, verbose=0)


def test_the_average_is_the_mean_of_the_predictions_of_members_with_the_same_names():
    members = [classifier(), classifier(units=5), classifier()]
    expected = np.mean([predict(member) for member in members], axis=0)
    ensemble = ensemble_of(members)
    np.testing.assert_allclose(predict(ensemble), expected, atol=1e-6)
    assert {member.name for member in members} == {"classifier"}  # they are as they were


def test_votes_are_counted_per_class():
    members = [classifier(), classifier(), classifier()]
    choices = np.stack([predict(member).argmax(axis=1) for member in members])
    shares = np.stack([(choices == label).mean(axis=0) for label in range(3)], axis=1)
    ensemble = ensemble_of(members, "vote")
    np.testing.assert_allclose(predict(ensemble), shares, atol=1e-6)
    accuracy = float(np.mean(shares.argmax(axis=1) == Y))
    assert ensemble.evaluate(X, Y, verbose=0, return_dict=True)["accuracy"] == pytest.approx(accuracy)


def test_a_single_sigmoid_unit_votes_for_one_of_two_classes():
    shares = predict(ensemble_of([binary(0.9), binary(0.55), binary(0.01)], "vote"))
    np.testing.assert_allclose(shares, np.full((40, 1), 2 / 3), atol=1e-6)
    assert predict(ensemble_of([binary(0.9), binary(0.55), binary(0.01)]))[0] == pytest.approx(1.46 / 3, abs=1e-5)


def test_a_tie_stays_visible_and_falls_to_the_lowest_class():
    for_two, for_zero = classifier(), classifier()
    for model, favourite in ((for_two, 2), (for_zero, 0)):
        last = model.get_layer("class")
        last.set_weights([np.zeros_like(last.kernel), np.eye(3)[favourite]])
    shares = predict(ensemble_of([for_two, for_zero], "vote"))
    np.testing.assert_array_equal(shares[0], [0.5, 0.0, 0.5])
    assert shares[0].argmax() == 0
    np.testing.assert_array_equal(predict(ensemble_of([binary(0.9), binary(0.2)], "vote"))[0], [0.5])


@pytest.mark.parametrize("method", ["average", "vote"])
def test_an_ensemble_is_saved_and_loaded_with_all_it_needs(method, tmp_path):
    ensemble = ensemble_of([classifier(), classifier(units=5)], method)
    path = tmp_path / "ensemble.keras"
    ensemble.save(path)
    loaded = keras.saving.load_model(path)
    np.testing.assert_array_equal(predict(loaded), predict(ensemble))
    assert loaded.evaluate(X, Y, verbose=0) == pytest.approx(ensemble.evaluate(X, Y, verbose=0))


def test_a_process_without_this_library_loads_an_ensemble(tmp_path: Path):
    ensemble = ensemble_of([classifier(), classifier()], "vote")
    ensemble.save(tmp_path / "ensemble.keras")
    np.save(tmp_path / "x.npy", X)
    program = (
        "import sys, keras, numpy as np\n"
        f"model = keras.saving.load_model({str(tmp_path / 'ensemble.keras')!r})\n"
        f"np.save({str(tmp_path / 'y.npy')!r}, model.predict(np.load({str(tmp_path / 'x.npy')!r}), verbose=0))\n"
        "assert not any(name.startswith('allreduce_spark') for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120, cwd=tmp_path)
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), predict(ensemble))


def test_each_of_several_outputs_is_averaged_and_compiled_under_its_own_name():
    x = {"a": X, "b": X[:, :2]}
    y = {"kind": Y, "size": X[:, :1]}
    members = [with_two_outputs(), with_two_outputs()]
    predictions = [predict(member, x) for member in members]
    ensemble = ensemble_of(members)
    combined = predict(ensemble, x)
    assert set(combined) == {"kind", "size"}
    for name, array in combined.items():
        np.testing.assert_allclose(array, np.mean([one[name] for one in predictions], axis=0), atol=1e-6)
    assert set(ensemble.evaluate(x, y, verbose=0, return_dict=True)) == set(
        members[0].evaluate(x, y, verbose=0, return_dict=True)
    )


def test_an_ensemble_of_one_predicts_as_its_member_does():
    member = classifier()
    expected = predict(member)
    np.testing.assert_allclose(predict(ensemble_of([member])), expected, atol=1e-6)


def test_an_ensemble_of_averages_can_be_trained_on():
    ensemble = ensemble_of([classifier(), classifier()])
    ensemble.optimizer.learning_rate = 0.1
    losses = ensemble.fit(X, Y, epochs=20, verbose=0).history["loss"]
    assert losses[-1] < 0.8 * losses[0]


def unbuilt() -> keras.Model:
    model = keras.Sequential([keras.layers.Dense(3)])
    model.compile("sgd", "mse")
    return model


def linear() -> keras.Model:
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, name="price")])
    model.compile("sgd", "mse")
    return model


@pytest.mark.parametrize(
    ("models", "method", "message"),
    [
        ([], "average", "needs at least one model"),
        ([classifier(), classifier(classes=4)], "average", r"outputs .* differ: float32\(None, 3\) and .*\(None, 4\)"),
        ([classifier(), with_two_outputs()], "average", "inputs .* differ"),
        ([unbuilt()], "average", "that are built"),
        ([linear()], "vote", "'price' is a single linear unit"),
        ([classifier()], "median", "'average' or 'vote', got 'median'"),
    ],
)
def test_what_cannot_be_combined_is_refused(models, method, message):
    with pytest.raises(ConfigError, match=message):
        ensemble_of(models, method)


def test_a_model_that_is_twice_among_the_members_is_refused():
    member = classifier()
    with pytest.raises(ConfigError, match="twice"):
        ensemble_of([member, member])
