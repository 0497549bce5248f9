"""The Params of the estimator and the transformer: names, meanings, types and defaults, in one place.

They are named as Spark ML names its own. Every Param has a getter and a setter (`getEpochs()`, `setEpochs(5)`), and a value
of the wrong kind is refused when it is set.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, TypeVar

from pyspark.ml.param import Param, Params

from allreduce_spark.config import Checkpoint
from allreduce_spark.errors import ConfigError

__all__ = ["ColumnParams", "FitParams", "accessors"]

P = TypeVar("P", bound="ColumnParams")
C = TypeVar("C", bound=type[Params])


def accessors(cls: C) -> C:
    """Class decorator: `getX` and `setX` for every Param `x` of the class that has none yet."""
    for name in dir(cls):
        param = getattr(cls, name, None)
        if isinstance(param, Param):
            stem = name[0].upper() + name[1:]
            for method in (_getter(name, stem), _setter(name, stem, param.doc)):
                if not hasattr(cls, method.__name__):
                    setattr(cls, method.__name__, method)
    return cls


def _getter(name: str, stem: str) -> Callable[..., Any]:
    def get(self: Params) -> Any:
        return self.getOrDefault(name)

    get.__name__, get.__doc__ = f"get{stem}", f"The value of `{name}`, or its default."
    return get


def _setter(name: str, stem: str, doc: str) -> Callable[..., Any]:
    def set_(self: Params, value: Any) -> Any:
        return self._set(**{name: value})

    set_.__name__, set_.__doc__ = f"set{stem}", f"Set `{name}`: {doc}"
    return set_


def _param(name: str, doc: str, check: Callable[[str, Any], Any]) -> Param[Any]:
    return Param(Params._dummy(), name, doc, typeConverter=lambda value: check(name, value))


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{name} must be a string, got {value!r}.")
    return value


def _names(name: str, value: Any) -> list[str]:
    if isinstance(value, str) or not isinstance(value, (list, tuple)) or not all(isinstance(v, str) for v in value):
        raise ConfigError(f"{name} must be a list of column names, got {value!r}.")
    return list(value)


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be True or False, got {value!r}.")
    return value


def _count(least: int) -> Callable[[str, Any], int]:
    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
            raise ConfigError(f"{name} must be an integer of at least {least}, got {value!r}.")
        return int(value)

    return check


def _number(name: str, value: Any, *, least: float, below: float) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not least <= float(value) < below:
        bounds = f"at least {least:g}" + ("" if below == math.inf else f" and below {below:g}")
        raise ConfigError(f"{name} must be a number, {bounds}, got {value!r}.")
    return float(value)


def _one_of(*allowed: str) -> Callable[[str, Any], str]:
    def check(name: str, value: Any) -> str:
        if value not in allowed:
            raise ConfigError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}.")
        return str(value)

    return check


def _sync(name: str, value: Any) -> int | str:
    return "epoch" if value == "epoch" else _count(1)(name, value)


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


class ColumnParams(Params):
    """What estimator and transformer share: which columns are read and written, and how."""

    featuresCol = _param(
        "featuresCol",
        "column of features: a vector (dense or sparse), a number, a (nested) array of numbers, or raw bytes in C order "
        "(uint8, float32 or float64, by their number)",
        _text,
    )
    featuresCols = _param(
        "featuresCols",
        "several columns of features, instead of featuresCol: they make one vector for a model with one input, else one "
        "column goes to each input, by name if the names are equal, otherwise in order",
        _names,
    )
    predictionCol = _param(
        "predictionCol",
        'column of predictions: the class as a double, or the value; several values as outputType says. "" for none. Several '
        "outputs of a model make several columns, predictionCol + '_' + the output's name",
        _text,
    )
    probabilityCol = _param(
        "probabilityCol",
        'column of class probabilities, as outputType says; [1 - p, p] for a single sigmoid unit. "" for none. A regression '
        "has none; several outputs have one each, as for predictionCol",
        _text,
    )
    rawPredictionCol = _param(
        "rawPredictionCol",
        "column of what the model says before it is made a probability, as outputType says, for Spark's evaluators: logits "
        'where the loss takes logits, [-z, z] for a single unit; else the same as probabilityCol. "" for none',
        _text,
    )
    outputCol = _param("outputCol", "column for the output of outputLayer", _text)
    outputLayer = _param("outputLayer", 'name of a layer whose output becomes the column outputCol; "" for none', _text)
    outputType = _param(
        "outputType",
        '"vector" for Spark ML vectors (of arrays with several axes, all values in one line), "array" for (nested) arrays of '
        "doubles",
        _one_of("vector", "array"),
    )
    task = _param(
        "task",
        '"classification", "regression", or "auto": a classification where the model is compiled with one of Keras\'s '
        "cross-entropies; where the loss is unknown, where the last layer is a softmax or sigmoid; else a regression",
        _one_of("auto", "classification", "regression"),
    )
    predictionBatchSize = _param("predictionBatchSize", "rows per call of the model in transform", _count(1))
    handleInvalid = _param(
        "handleInvalid",
        'what to do with rows whose features (or label, or weight) are null, or hold a null or NaN: "error", or "skip" to '
        "leave them out",
        _one_of("error", "skip"),
    )

    def setParams(self: P, **params: Any) -> P:
        """Set several params by name; None leaves one as it is.

        Raises:
            ConfigError: A param is unknown or has a wrong value.
        """
        self._set_known(params)
        return self

    def _set_known(self, params: dict[str, Any]) -> None:
        unknown = next((name for name in params if not self.hasParam(name)), None)
        if unknown is not None:
            known = [param.name for param in self.params]
            meant = difflib.get_close_matches(unknown, known, 1)
            hint = f"did you mean {meant[0]!r}?" if meant else f"there are {known}."
            raise ConfigError(f"{type(self).__name__} has no param {unknown!r}; {hint}")
        self._set(**{name: value for name, value in params.items() if value is not None})

    def _set_column_defaults(self) -> None:
        self._setDefault(
            featuresCol="features",
            featuresCols=[],
            predictionCol="prediction",
            probabilityCol="probability",
            rawPredictionCol="rawPrediction",
            outputCol="output",
            outputLayer="",
            outputType="vector",
            task="auto",
            predictionBatchSize=1024,
            handleInvalid="error",
        )

    def _features(self) -> tuple[str, ...]:
        """The feature columns, however they were named.

        Raises:
            ConfigError: They were named in both ways, or not at all.
        """
        several = self.getOrDefault(self.featuresCols)
        if several and self.isSet(self.featuresCol):
            raise ConfigError("featuresCol and featuresCols are both set: use one of them.")
        columns = tuple(several or [self.getOrDefault(self.featuresCol)])
        if not all(columns):
            raise ConfigError("the name of a feature column is empty: name at least one column in featuresCol.")
        return columns


class FitParams(ColumnParams):
    """What only the estimator needs: the model, the labels, and the settings of a fit."""

    model = _param(
        "model", "compiled Keras model; fit trains a copy of it. Not written with the other params", _anything
    )
    labelCol = _param(
        "labelCol",
        "column of labels: a number or an array. Class indices are one-hot encoded where the loss needs it",
        _text,
    )
    labelCols = _param(
        "labelCols",
        "one column of labels per output of a model with several, instead of labelCol: by name if the names are equal, "
        "otherwise in order",
        _names,
    )
    weightCol = _param("weightCol", 'column of sample weights; "" for none', _text)
    validationIndicatorCol = _param(
        "validationIndicatorCol", 'boolean column: True (null is False) for rows to validate on; "" for none', _text
    )
    epochs = _param("epochs", "passes over the rows", _count(1))
    batchSize = _param("batchSize", "rows per rank and step; a step uses batchSize * numRanks rows", _count(1))
    numRanks = _param("numRanks", "how many ranks train together; 0 for all slots of the application", _count(0))
    syncEvery = _param(
        "syncEvery",
        'steps between the exchanges of the ranks: 1 is exact synchronous training; k, or "epoch", averages weights after '
        "k local steps, or after each epoch",
        _sync,
    )
    validationSplit = _param(
        "validationSplit",
        "share of the rows to validate on, the last ones of each rank",
        lambda name, value: _number(name, value, least=0, below=1),
    )
    shuffle = _param("shuffle", "whether each epoch has its own order of rows", _flag)
    seed = _param(
        "seed", "of the order of rows and of all randomness in the ranks; drawn anew where it is not set", _count(0)
    )
    verbose = _param("verbose", '1 or "auto" for a progress bar, 2 for a line per epoch, 0 for silence', _verbosity)
    learningRate = _param(
        "learningRate",
        "learning rate that the optimizer of the copy gets before it is trained; where it is not set, the model's own",
        lambda name, value: _number(name, value, least=0, below=math.inf),
    )
    classWeight = _param("classWeight", "dict from class index to the weight of its rows in the loss", _weights)
    callbacks = _param(
        "callbacks", "Keras callbacks; copies of them run on every rank. Never written to a file", _anything
    )
    customObjects = _param(
        "customObjects",
        "dict of classes and functions that Keras needs to load the model. Never written to a file",
        _anything,
    )

    checkpointPath = _param(
        "checkpointPath",
        "folder, a path that all hosts share or a URI, for checkpoints of a fit: one of its own for each fit, so also for each "
        'point of a parameter grid. "" keeps checkpoints on the executors\' disks alone',
        _text,
    )
    checkpointEverySteps = _param(
        "checkpointEverySteps",
        "steps from one checkpoint to the next; where neither this nor checkpointEverySeconds is set, as often as costs less "
        "than 2 % of the time",
        _count(1),
    )
    checkpointEverySeconds = _param(
        "checkpointEverySeconds",
        "seconds from one checkpoint to the next, instead of checkpointEverySteps",
        lambda name, value: _number(name, value, least=0, below=math.inf),
    )
    resume = _param(
        "resume",
        '"auto" to go on from the newest whole checkpoint in checkpointPath, if there is one; "never" refuses a folder that '
        "has any",
        _one_of("auto", "never"),
    )
    maxRestarts = _param(
        "maxRestarts",
        "how often in a row ranks are started again, after one has died or a machine was lost, without having come further",
        _count(0),
    )
    minRanks = _param(
        "minRanks",
        "train with as few ranks as this while there are no slots for more; where it is not set, all ranks at the start, and "
        "as many as there are when machines are lost",
        _count(1),
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
