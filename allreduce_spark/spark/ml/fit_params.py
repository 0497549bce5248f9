"""The Params of the estimator alone: the model, the labels, and the settings of a fit."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

from allreduce_spark.config import BACKENDS, Checkpoint
from allreduce_spark.errors import ConfigError
from allreduce_spark.spark.ml.params import ColumnParams, count, names, one_of, param, text
from allreduce_spark.spark.resources import check_resources

__all__ = ["FitParams"]


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be True or False, got {value!r}.")
    return value


def _number(name: str, value: Any, *, least: float, below: float) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not least <= float(value) < below:
        bounds = f"at least {least:g}" + ("" if below == math.inf else f" and below {below:g}")
        raise ConfigError(f"{name} must be a number, {bounds}, got {value!r}.")
    return float(value)


def _sync(name: str, value: Any) -> int | str:
    return "epoch" if value == "epoch" else count(1)(name, value)


def _verbosity(name: str, value: Any) -> int | str:
    if isinstance(value, bool) or value not in (0, 1, 2, "auto"):
        raise ConfigError(f"{name} must be 0, 1, 2 or 'auto', got {value!r}.")
    return value


def _weights(name: str, value: Any) -> dict[int, float]:
    try:
        weights = {int(label): float(weight) for label, weight in dict(value).items()}  # of JSON, the keys are strings
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name} must be a dict from class index to weight, got {value!r}.") from error
    if not weights or not all(label >= 0 and 0 <= weight < math.inf for label, weight in weights.items()):
        raise ConfigError(f"{name} must map class indices 0, 1, ... to finite weights >= 0, got {value!r}.")
    return weights


def _anything(name: str, value: Any) -> Any:
    return value


class FitParams(ColumnParams):
    """What only the estimator needs: the model, the labels, and the settings of a fit."""

    model = param(
        "model", "compiled Keras model; fit trains a copy of it. Not written with the other params", _anything
    )
    labelCol = param(
        "labelCol",
        "column of labels: a number or an array. Class indices are one-hot encoded where the loss needs it",
        text,
    )
    labelCols = param(
        "labelCols",
        "one column of labels per output of a model with several, instead of labelCol: by name if the names are equal, "
        "otherwise in order",
        names,
    )
    weightCol = param("weightCol", 'column of sample weights; "" for none', text)
    validationIndicatorCol = param(
        "validationIndicatorCol", 'boolean column: True (null is False) for rows to validate on; "" for none', text
    )
    epochs = param("epochs", "passes over the rows", count(1))
    batchSize = param("batchSize", "rows per rank and step; a step uses batchSize * numRanks rows", count(1))
    numRanks = param("numRanks", "how many ranks train together; 0 for all slots of the application", count(0))
    syncEvery = param(
        "syncEvery",
        'steps between the exchanges of the ranks: 1 is exact synchronous training; k, or "epoch", averages weights after '
        "k local steps, or after each epoch",
        _sync,
    )
    backend = param(
        "backend",
        'what the ranks reduce by: "mpi"; "horovod" or "horovod-mpi", where it is installed; "auto" for Horovod where all '
        "ranks have GPUs and it can use them, else MPI",
        one_of(*BACKENDS),
    )
    resources = param(
        "resources",
        "pyspark.resource.ResourceProfile: what each task of a fit asks of Spark, such as a GPU, where that is not what the "
        "application's settings say. Never written to a file",
        lambda name, value: check_resources(value),
    )
    ranksPerGpu = param("ranksPerGpu", "how many ranks may share a GPU", count(1))
    validationSplit = param(
        "validationSplit",
        "share of the rows to validate on, the last ones of each rank",
        lambda name, value: _number(name, value, least=0, below=1),
    )
    shuffle = param("shuffle", "whether each epoch has its own order of rows", _flag)
    seed = param(
        "seed", "of the order of rows and of all randomness in the ranks; drawn anew where it is not set", count(0)
    )
    verbose = param("verbose", '1 or "auto" for a progress bar, 2 for a line per epoch, 0 for silence', _verbosity)
    learningRate = param(
        "learningRate",
        "learning rate that the optimizer of the copy gets before it is trained; where it is not set, the model's own",
        lambda name, value: _number(name, value, least=0, below=math.inf),
    )
    classWeight = param("classWeight", "dict from class index to the weight of its rows in the loss", _weights)
    callbacks = param(
        "callbacks", "Keras callbacks; copies of them run on every rank. Never written to a file", _anything
    )
    customObjects = param(
        "customObjects",
        "dict of classes and functions that Keras needs to load the model. Never written to a file",
        _anything,
    )

    checkpointPath = param(
        "checkpointPath",
        "folder, a path that all hosts share or a URI, for checkpoints of a fit: one of its own for each fit, so also for each "
        'point of a parameter grid. "" keeps checkpoints on the executors\' disks alone',
        text,
    )
    checkpointEverySteps = param(
        "checkpointEverySteps",
        "steps from one checkpoint to the next; where neither this nor checkpointEverySeconds is set, as often as costs less "
        "than 2 % of the time",
        count(1),
    )
    checkpointEverySeconds = param(
        "checkpointEverySeconds",
        "seconds from one checkpoint to the next, instead of checkpointEverySteps",
        lambda name, value: _number(name, value, least=0, below=math.inf),
    )
    resume = param(
        "resume",
        '"auto" to go on from the newest whole checkpoint in checkpointPath, if there is one; "never" refuses a folder that '
        "has any",
        one_of("auto", "never"),
    )
    maxRestarts = param(
        "maxRestarts",
        "how often in a row ranks are started again, after one has died or a machine was lost, without having come further",
        count(0),
    )
    minRanks = param(
        "minRanks",
        "train with as few ranks as this while there are no slots for more; where it is not set, all ranks at the start, and "
        "as many as there are when machines are lost",
        count(1),
    )

    def _set_fit_defaults(self) -> None:
        self._set_column_defaults()
        self._setDefault(
            labelCol="label",
            labelCols=[],
            weightCol="",
            validationIndicatorCol="",
            epochs=1,
            batchSize=32,
            numRanks=0,
            syncEvery=1,
            backend="mpi",
            ranksPerGpu=1,
            validationSplit=0.0,
            shuffle=True,
            verbose=0,
            callbacks=[],
            customObjects={},
            checkpointPath="",
            resume="never",
            maxRestarts=3,
        )

    def _labels(self) -> tuple[str, ...]:
        several = self.getOrDefault(self.labelCols)
        if several and self.isSet(self.labelCol):
            raise ConfigError("labelCol and labelCols are both set: use one of them.")
        return tuple(several or [self.getOrDefault(self.labelCol)])

    def _checkpoint(self) -> Checkpoint:
        """The settings of checkpoints.

        Raises:
            ConfigError: They do not fit each other.
        """
        return Checkpoint(
            self.getOrDefault(self.checkpointPath) or None,
            every_steps=self._if_set("checkpointEverySteps"),
            every_s=self._if_set("checkpointEverySeconds"),
        )

    def _if_set(self, name: str) -> Any:
        """The value of a Param without a default, or None."""
        return self.getOrDefault(name) if self.isDefined(name) else None
