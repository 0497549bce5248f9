"""A trial of a search as a fit: its model is built on the driver, trained on ranks, and watched meanwhile."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import re
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from pyspark import SparkContext
from pyspark.resource import ResourceProfile

from allreduce_spark.config import FitConfig, Timeouts
from allreduce_spark.errors import CancelledError, ConfigError, DataError, MissingDependencyError
from allreduce_spark.rendezvous.protocol import Phase
from allreduce_spark.spark.fit import Rows, run_fit
from allreduce_spark.spark.recovery import Safety
from allreduce_spark.spark.tuning.result import KeptModel
from allreduce_spark.spark.tuning.trials import EndSearch, Outcome, RunningTrial
from allreduce_spark.training.checks import check_callbacks, check_model
from allreduce_spark.training.early_stopping import epoch_of_weights

if TYPE_CHECKING:
    import keras

__all__ = ["Callbacks", "TrialFits"]

Callbacks = Sequence["keras.callbacks.Callback"]

FOR_FIT = ("epochs", "batch_size", "sync_every")


@dataclass(frozen=True)
class TrialFits:
    """What all trials have in common; `begin` makes one."""

    context: SparkContext
    build_model: Callable[[dict[str, Any]], keras.Model]
    rows: Rows
    config: FitConfig
    callbacks: Callbacks | Callable[[dict[str, Any]], Callbacks] | None
    objective: str
    custom_objects: Mapping[str, Any]
    timeouts: Timeouts
    backend: str
    resources: ResourceProfile | None
    ranks_per_gpu: int
    built: weakref.WeakSet[keras.Model] = field(default_factory=weakref.WeakSet)

    def begin(self, number: int, params: dict[str, Any]) -> Callable[[RunningTrial], Outcome]:
        """Build the model of a trial.

        Raises:
            ConfigError: That did not work; names the setting.
        """
        seed = (self.config.seed + number) % 2**32
        try:
            for_fit = {name: params[name] for name in FOR_FIT if name in params}
            config = dataclasses.replace(self.config, **for_fit, seed=seed)
            with _own_randomness(seed):
                model = check_model(self.build_model(dict(params)))
                callbacks = self.callbacks(dict(params)) if callable(self.callbacks) else self.callbacks
                users = check_callbacks([] if callbacks is None else callbacks)
        except Exception as error:  # the function is the user's, so anything can come
            kind = "" if isinstance(error, ConfigError) else f"{type(error).__name__}: "
            raise ConfigError(f"no model to train with {params}: {kind}{error}") from error
        if model in self.built:
            raise EndSearch from ConfigError(
                "build_model has returned the same model twice: make a new one at each call, or the trials would go on "
                "training what others have trained."
            )
        self.built.add(model)
        return partial(self._fit, model, config, users)

    def _fit(
        self,
        model: keras.Model,
        config: FitConfig,
        callbacks: list[keras.callbacks.Callback],
        trial: RunningTrial,
    ) -> Outcome:
        """Train it: what a trial is, in a thread of its own."""
        watcher = _Watcher(trial, self.objective)
        try:
            history = run_fit(
                self.context,
                model,
                self.rows,
                config,
                callbacks=callbacks,
                custom_objects=self.custom_objects,
                timeouts=self.timeouts,
                spectator=watcher,
                safety=Safety(),
                backend=self.backend,
                resources=self.resources,
                ranks_per_gpu=self.ranks_per_gpu,
            )
        except (DataError, CancelledError, MissingDependencyError) as error:
            raise EndSearch from error  # it is the same for all
        column = history.history[_find(self.objective, history.history)]
        return Outcome(
            value=float(column[epoch_of_weights(model, callbacks, history.history)]),
            epochs=len(history.epoch),
            history=history.history,
            keep=partial(KeptModel.of, model, self.custom_objects),
        )


class _Watcher:
    """The spectator of a trial's fit: tells of each epoch, and ends the fit where that is decided.

    It ends it in `draw`, because an exception that is raised there comes out of `run_fit` as it is.
    """

    def __init__(self, trial: RunningTrial, objective: str) -> None:
        self._trial, self._objective = trial, objective
        self._error: EndSearch | None = None

    def show_phase(self, phase: Phase) -> None:
        pass

    def report(self, fields: dict[str, Any]) -> None:
        if fields.get("epoch_done"):
            logs = fields["logs"]
            try:
                value = logs[_find(self._objective, logs)]
            except EndSearch as error:
                self._error = error
            else:
                self._trial.report(fields["epoch"] + 1, value, logs)

    def draw(self) -> None:
        if self._error is not None:
            raise self._error
        self._trial.check()


def _find(objective: str, names: Collection[str]) -> str:
    """The name of the objective in a history: Keras calls the metrics of the second model "auc_1" where the first had "auc".

    Raises:
        EndSearch: There is none.
    """
    if objective in names:
        return objective
    numbered = [name for name in names if re.fullmatch(rf"{re.escape(objective)}_\d+", name)]
    if len(numbered) == 1:
        return numbered[0]
    raise EndSearch from ConfigError(
        f"the objective {objective!r} is not among what the model reports after an epoch: {sorted(names)}. Name one of these, "
        "or compile the model with the metric that is missing."
    )


@contextlib.contextmanager
def _own_randomness(seed: int) -> Iterator[None]:
    """Let `random` and `numpy.random` give what follows from the seed: Keras draws initial weights from the former."""
    states = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
