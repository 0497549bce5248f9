"""The search of Elephas 0.3 to 2.1, in the form that hyperas gave it: templates in the source of a function."""

# ruff: noqa: F821 - the names in templates are hyperas's

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from pyspark.sql import SparkSession

from allreduce_spark.elephas.hyperparam import HyperParamModel, VotingModel
from allreduce_spark.elephas.templates import read_template
from allreduce_spark.errors import ConfigError

STATUS_OK = "ok"


def data() -> Any:
    x = np.random.default_rng(0).normal(size=(128, 3)).astype("float32")
    y = np.eye(2)[(x.sum(axis=1) > 0).astype(int)]
    return x[:96], y[:96], x[96:], y[96:]


def model(x_train, y_train, x_test, y_test):
    model = keras.Sequential()
    model.add(keras.layers.Dense({{choice([4, 8])}}, activation={{choice(["relu", "tanh"])}}))
    model.add(keras.layers.Dropout({{uniform(0, 0.3)}}))
    model.add(keras.layers.Dropout({{uniform(0, 0.1)}}))
    model.add(keras.layers.Dense(2, activation="softmax"))
    # One of the two learns nothing.
    rate = {{choice([0.05, 1e-9])}}
    model.compile(keras.optimizers.Adam(rate), "categorical_crossentropy", metrics=["accuracy"])
    fitted = model.fit(x_train, y_train, batch_size={{choice([8, 16])}}, nb_epoch=3, verbose=2, show_accuracy=True)
    score, _ = model.evaluate(x_test, y_test, verbose=0)
    assert len(fitted.history["loss"]) == 3
    return {"loss": score, "status": STATUS_OK, "model": model}


def test_templates_are_read_into_a_space() -> None:
    def other(x):
        scaler.fit(x)
        y = {{loguniform(0, 1)}}
        if {{choice(["a", "b"])}} == "a":
            return {"loss": len({1, 2}) + y}
        return {{quniform(1, 2, 0.5)}} + {{randint(4)}}

    assert read_template(model).space == {
        "Dense": [4, 8],
        "Dense_activation": ["relu", "tanh"],
        "Dropout": (0.0, 0.3),
        "Dropout_1": (0.0, 0.1),
        "choice": [0.05, 1e-9],
        "batch_size": [8, 16],
    }
    template = read_template(other)
    assert template.space == {
        "loguniform": (1.0, np.e, "log"),
        "choice": ["a", "b"],
        "quniform": [1.0, 1.5, 2.0],
        "randint": (0, 3),
    }
    scope = {**template.scope, "scaler": "the scaler"}
    fitted: list[Any] = []
    run = type(template)(template.name, template.space, template.code, scope).run
    setting = {"loguniform": 2.0, "choice": "b", "quniform": 1.5, "randint": 3}
    assert run(setting, lambda *arguments: fitted.append(arguments), ["x"]) == 4.5
    assert run({**setting, "choice": "a"}, lambda *arguments: None, ["x"]) == {"loss": 4.0}
    assert fitted == [("the scaler", "x")]


def test_what_cannot_be_read_is_refused() -> None:
    def without() -> None:
        return None

    def unknown() -> Any:
        return {{normal(0, 1)}}

    with pytest.raises(ConfigError, match=r"without\(\) has no templates"):
        read_template(without)
    with pytest.raises(ConfigError, match=r"the template \{\{normal\(0, 1\)\}\} is not understood.*'uniform'"):
        read_template(unknown)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_template(len)


@pytest.mark.spark
@pytest.mark.slow
def test_the_best_model_is_found_and_the_best_ones_decide_together(spark: SparkSession) -> None:
    pytest.importorskip("optuna")
    _, _, x_test, y_test = data()
    hyperparam = HyperParamModel(spark.sparkContext, num_workers=2)

    trials = hyperparam.compute_trials(model, data, max_evals=3)

    losses = [trial.loss for trial in trials]
    assert len(losses) == 6
    assert losses == sorted(losses)  # Elephas kept the worst
    for trial in trials:
        assert trial.loss == pytest.approx(trial.model.evaluate(x_test, y_test, verbose=0)[0], abs=1e-5)
        assert trial.model.layers[0].units == trial.params["Dense"]

    with pytest.MonkeyPatch.context() as patch:  # one search is enough
        patch.setattr(hyperparam, "compute_trials", lambda *arguments: trials)
        assert hyperparam.minimize(model=model, data=data, max_evals=3) is trials[0].model
        assert hyperparam.best_models(2, model, data, 3) == [trial.model for trial in trials[:2]]
        voting = hyperparam.best_ensemble(nb_ensemble_models=9, model=model, data=data, max_evals=3)
        assert len(voting.model_list) == 6  # there are no more
        assert set(voting.predict(x_test)) <= {0, 1}
        ensemble = hyperparam.best_ensemble(3, model, data, 3, "soft", [0.5, 0.3, 0.2])
        assert np.mean(ensemble.predict(x_test) == y_test.argmax(axis=-1)) > 0.6


def constant(probability: float) -> keras.Model:
    made = keras.Sequential(
        [keras.Input((1,)), keras.layers.Dense(1, activation="sigmoid", kernel_initializer="zeros")]
    )
    made.compile("sgd", "binary_crossentropy")
    made.set_weights([np.zeros((1, 1)), np.array([np.log(probability / (1 - probability))])])
    return made


def test_votes_are_counted_or_weighed() -> None:
    models, x = [constant(0.95), constant(0.4), constant(0.3)], np.zeros((2, 1))
    assert VotingModel(models).predict(x).tolist() == [0, 0]
    assert VotingModel(models, "soft").predict(x).tolist() == [1, 1]
    assert VotingModel(models, "soft", [0, 1, 1]).predict(x).tolist() == [0, 0]
    with pytest.raises(ConfigError, match="'hard' or 'soft'"):
        VotingModel(models, "loud")
    with pytest.raises(ConfigError, match="one for each of the 3 models"):
        VotingModel(models, "soft", [1])


def test_a_function_that_does_not_fit_or_judge_is_refused() -> None:
    def unfitted(x_train, y_train):
        return {"loss": {{uniform(0, 1)}}}

    def on_other_rows(x_train, y_train):
        made = keras.Sequential([keras.layers.Dense({{choice([1])}})])
        made.compile("sgd", "mse")
        made.fit(x_train[:1], y_train[:1])

    def with_steps(x_train, y_train):
        made = keras.Sequential([keras.layers.Dense({{choice([1])}})])
        made.compile("sgd", "mse")
        made.fit(x_train, y_train, steps_per_epoch=3)

    def two() -> Any:
        return np.ones((2, 1)), np.ones((2, 1))

    hyperparam = HyperParamModel(None)  # type: ignore[arg-type]
    for function, words in (
        (unfitted, "without a call of model.fit"),
        (on_other_rows, "first two of what data"),
        (with_steps, "steps_per_epoch"),
    ):
        with pytest.raises(ConfigError, match=words):
            hyperparam.minimize(function, two, max_evals=1)
