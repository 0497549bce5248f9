"""What a search has found: its trials as a table, and the best models, one by one or as an ensemble."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from allreduce_spark.errors import ConfigError
from allreduce_spark.spark.tuning.study import Direction, State
from allreduce_spark.training.models.ensemble import Method, ensemble_of
from allreduce_spark.training.models.model_bytes import model_and_code, model_from_bytes

if TYPE_CHECKING:
    import keras

__all__ = ["KeptModel", "SearchResult", "Trial", "best_first"]

_ORDER: dict[State, int] = {"complete": 0, "pruned": 1, "stopped": 2, "failed": 3}


@dataclass(frozen=True)
class Trial:
    """One setting that was tried.

    Attributes:
        number: Trials count from 0, in the order in which they started.
        params: The setting.
        state: "complete"; "pruned" where it was given up for being worse than others; "stopped" where the time of the search
            was over; "failed".
        value: Of the objective: that of the trained model where the trial is complete, otherwise the last one that was seen,
            or None.
        epochs: How many epochs it has trained.
        duration_s: From its start to its end, in seconds.
        history: Name of a metric -> its value after each epoch.
        error: Why it failed, without its traceback, which would hold on to the model; None where it has not.
    """

    number: int
    params: dict[str, Any]
    state: State
    value: float | None
    epochs: int
    duration_s: float
    history: dict[str, list[Any]] = field(repr=False)
    error: Exception | None = None


@dataclass(frozen=True)
class KeptModel:
    """A trained model at rest: a `.keras` archive, and the code that its names stand for."""

    archive: bytes = field(repr=False)
    custom_objects: Mapping[str, Any]

    @classmethod
    def of(cls, model: keras.Model, custom_objects: Mapping[str, Any]) -> KeptModel:
        return cls(*model_and_code(model, custom_objects))

    def load(self) -> keras.Model:
        """A new model each time, compiled, with the state of its optimizer."""
        return model_from_bytes(self.archive, self.custom_objects)


@dataclass(frozen=True)
class SearchResult:
    """All trials of a search, and the models of the best of them.

    Attributes:
        trials: In the order in which they started.
        objective: Name of the metric that was looked at.
        direction: "minimize" or "maximize".
    """

    trials: tuple[Trial, ...]
    objective: str
    direction: Direction
    models: Mapping[int, KeptModel] = field(repr=False)

    @property
    def best_trial(self) -> Trial:
        """The complete trial with the best value; the first of equals."""
        return best_first(self.trials, self.direction)[0]

    @property
    def best_params(self) -> dict[str, Any]:
        return dict(self.best_trial.params)

    @property
    def best_value(self) -> float:
        value = self.best_trial.value
        assert value is not None  # it is complete
        return value

    def table(self) -> Any:
        """A pandas DataFrame with a row per trial, best first; without pandas, a list of dicts.

        The columns are number, state, value, epochs, duration_s, error (its text, or None), and `param_NAME` for each name of
        the space. After the complete trials come those that were pruned, then stopped, then failed.
        """
        rows = [
            {
                "number": trial.number,
                "state": trial.state,
                "value": trial.value,
                "epochs": trial.epochs,
                "duration_s": trial.duration_s,
                **{f"param_{name}": value for name, value in trial.params.items()},
                "error": None if trial.error is None else f"{type(trial.error).__name__}: {trial.error}",
            }
            for trial in best_first(self.trials, self.direction)
        ]
        try:
            import pandas
        except ModuleNotFoundError:
            return rows
        return pandas.DataFrame(rows)

    def best_model(self) -> keras.Model:
        """A new copy of the trained model of the best trial, compiled, with the state of its optimizer.

        Raises:
            ConfigError: The search was told to keep no models.
        """
        return self.best_models(1)[0]

    def best_models(self, n: int) -> list[keras.Model]:
        """New copies of the trained models of the best trials, best first.

        Raises:
            ConfigError: So many models were not kept.
        """
        if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= len(self.models):
            complete = sum(trial.state == "complete" for trial in self.trials)
            raise ConfigError(
                f"{n!r} models are asked for, but the search has kept those of its {len(self.models)} best trials ({complete} "
                "of its trials are complete): ask for fewer, or search with a larger keep_models."
            )
        best = [trial.number for trial in best_first(self.trials, self.direction) if trial.number in self.models]
        return [self.models[number].load() for number in best[:n]]

    def best_ensemble(self, n: int, method: Method = "average") -> keras.Model:
        """One model of the `n` best: see `allreduce_spark.training.models.ensemble.ensemble_of`.

        Raises:
            ConfigError: So many models were not kept, or they cannot be combined.
        """
        return ensemble_of(self.best_models(n), method)


def best_first(trials: tuple[Trial, ...], direction: Direction) -> list[Trial]:
    """Complete trials by value, then the others by state and value; equal ones in the order in which they started."""
    worst = float("inf")

    def rank(trial: Trial) -> tuple[int, float, int]:
        value = worst if trial.value is None else trial.value if direction == "minimize" else -trial.value
        return _ORDER[trial.state], worst if value != value else value, trial.number

    return sorted(trials, key=rank)
