"""`HyperParamModel`, which Elephas 0.3 to 2.1 had on hyperas, over `allreduce_spark.spark.tuning.search`.

As there, a function `data()` returns (x_train, y_train, x_test, y_test), and a function `model(x_train, y_train, x_test,
y_test)`, with templates of hyperas in it, builds a model, fits and judges it, and returns a dict with its "loss". Here the
building is done on the driver, up to `model.fit(...)`; the fitting by trials on the executors; and the rest of the function,
which judges, on the driver again, with the trained weights in the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
from pyspark import SparkContext

from allreduce_spark.elephas.templates import Template, read_template
from allreduce_spark.errors import ConfigError
from allreduce_spark.spark.tuning.search import search
from allreduce_spark.training.models.ensemble import ensemble_of

if TYPE_CHECKING:
    import keras

__all__ = ["HyperParamModel", "VotingModel"]

# Arguments of `fit` that a search has, too; and those that make no difference to the outcome.
FOR_SEARCH = ("callbacks", "class_weight", "validation_data", "validation_split")
WITHOUT_EFFECT = ("verbose", "show_accuracy", "shuffle")


class HyperParamModel:
    """Searches for good hyper-parameters, at random.

    Args:
        sc: The Spark context.
        num_workers: Each of so many workers has `max_evals` trials; so many run at once, where there is room.
    """

    def __init__(self, sc: SparkContext, num_workers: int = 4) -> None:
        self.spark_context, self.num_workers = sc, num_workers

    def minimize(
        self, model: Callable[..., Any], data: Callable[[], Any], max_evals: int, notebook_name: str | None = None
    ) -> keras.Model:
        """The trained model with the smallest "loss".

        Args:
            model, data: See the module.
            max_evals: Trials per worker.
            notebook_name: Not used.

        Raises:
            ConfigError: The functions are not as they have to be.
            SearchError: No trial was complete.
        """
        return self.best_models(1, model, data, max_evals)[0]

    def best_models(
        self, nb_models: int, model: Callable[..., Any], data: Callable[[], Any], max_evals: int
    ) -> list[keras.Model]:
        """The trained models with the smallest "loss", best first: `nb_models`, or as many as there are."""
        trials = self.compute_trials(model, data, max_evals)
        return [trial.model for trial in trials[:nb_models]]

    def best_ensemble(
        self,
        nb_ensemble_models: int,
        model: Callable[..., Any],
        data: Callable[[], Any],
        max_evals: int,
        voting: str = "hard",
        weights: Sequence[float] | None = None,
    ) -> VotingModel:
        """The best models, which decide together. See `VotingModel` for `voting` and `weights`."""
        return VotingModel(self.best_models(nb_ensemble_models, model, data, max_evals), voting, weights)

    def compute_trials(
        self, model: Callable[..., Any], data: Callable[[], Any], max_evals: int, notebook_name: str | None = None
    ) -> list[JudgedTrial]:
        """All complete trials, best first."""
        values = data()
        template = read_template(model)
        first = _begin(template, template.first_setting(), values)
        given = {name: first.arguments[name] for name in FOR_SEARCH if name in first.arguments}
        validated = bool(given.get("validation_data") or given.get("validation_split"))
        max_trials = self.num_workers * max_evals
        result = search(
            lambda setting: _begin(template, setting, values).model,
            template.space,
            tuple(values[:2]),
            max_trials=max_trials,
            epochs=first.epochs,
            batch_size=first.batch_size,
            objective="val_loss" if validated else "loss",
            sampler="random",
            pruner=None,
            max_parallel=self.num_workers,
            keep_models=max_trials,
            **given,
        )
        judged = [
            _judge(template, trial.params, trial.history, result.models[trial.number].load(), values)
            for trial in result.trials
            if trial.number in result.models
        ]
        return sorted(judged, key=lambda trial: trial.loss)


@dataclass(frozen=True)
class JudgedTrial:
    """One setting that was tried.

    Attributes:
        params: The setting.
        loss: What the user's function said.
        model: Trained.
    """

    params: dict[str, Any]
    loss: float
    model: keras.Model


class VotingModel:
    """Several classifiers that decide together.

    Args:
        model_list: Compiled Keras models.
        voting: "hard" for one vote each; "soft" for the mean of their probabilities.
        weights: Of the models, in a soft vote.
    """

    def __init__(
        self, model_list: Sequence[keras.Model], voting: str = "hard", weights: Sequence[float] | None = None
    ) -> None:
        if voting not in ("hard", "soft"):
            raise ConfigError(f"voting must be 'hard' or 'soft', got {voting!r}.")
        if weights is not None and (voting == "hard" or len(weights) != len(model_list)):
            raise ConfigError(
                f"weights are for a soft vote, one for each of the {len(model_list)} models: got {weights!r}."
            )
        self.model_list, self.voting, self.weights = list(model_list), voting, weights

    def predict(self, X: Any, batch_size: int = 128, verbose: int = 0) -> np.ndarray:
        """The class of each row, int64 of shape (rows,)."""
        if self.voting == "hard":
            shares = ensemble_of(self.model_list, "vote").predict(X, batch_size, verbose)
        else:
            outputs = [model.predict(X, batch_size, verbose) for model in self.model_list]
            shares = np.average(outputs, axis=0, weights=self.weights)
        return shares.argmax(axis=-1) if shares.shape[-1] > 1 else (shares[..., 0] > 0.5).astype("int64")


@dataclass(frozen=True)
class _FitCall:
    """A call of `fit`: the model, compiled and not trained, and what else was given."""

    model: keras.Model
    epochs: int
    batch_size: int
    arguments: dict[str, Any]


class _Begun(BaseException):
    """Leaves the user's function at its call of `fit`; no `except Exception` in it is in the way."""

    def __init__(self, call: _FitCall) -> None:
        self.call = call


def _begin(template: Template, setting: dict[str, Any], values: Sequence[Any]) -> _FitCall:
    """Run the user's function up to its call of `model.fit`."""

    def fit(
        model: Any, x: Any = None, y: Any = None, batch_size: int | None = None, epochs: int = 1, **rest: Any
    ) -> Any:
        if not hasattr(model, "train_step"):  # a scaler, say
            return model.fit(*(part for part in (x, y) if part is not None), **rest)
        if x is not values[0] or y is not values[1]:
            raise ConfigError("model.fit must be given the first two of what data() returned, as they are.")
        epochs = rest.pop("nb_epoch", epochs)
        strange = sorted(set(rest) - {*FOR_SEARCH, *WITHOUT_EFFECT})
        if strange:
            raise ConfigError(f"model.fit has the arguments {strange}, which a search does not know.")
        raise _Begun(_FitCall(model, epochs, batch_size or 32, rest))

    try:
        template.run(setting, fit, values)
    except _Begun as begun:
        return begun.call
    raise ConfigError(f"{template.name}() has returned without a call of model.fit(...).")


def _judge(
    template: Template,
    setting: dict[str, Any],
    history: dict[str, list[Any]],
    trained: keras.Model,
    values: Sequence[Any],
) -> JudgedTrial:
    """Run the user's function once more, with a `fit` that brings in the trained weights."""

    def fit(model: Any, *args: Any, **rest: Any) -> Any:
        if not hasattr(model, "train_step"):
            return model.fit(*args, **rest)
        if not model.built:
            model(values[0][:1])
        model.set_weights(trained.get_weights())
        return SimpleNamespace(model=model, history=history, epoch=list(range(len(history["loss"]))))

    verdict = template.run(setting, fit, values)
    if not isinstance(verdict, dict) or "loss" not in verdict:
        raise ConfigError(f"{template.name}() must return a dict with the key 'loss', it has returned {verdict!r}.")
    return JudgedTrial(setting, float(verdict["loss"]), trained)
