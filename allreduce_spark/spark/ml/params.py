"""The Params that estimator and transformer share: names, meanings, types and defaults; and how a Param is made.

They are named as Spark ML names its own. Every Param has a getter and a setter (`getEpochs()`, `setEpochs(5)`), and a value
of the wrong kind is refused when it is set.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from numbers import Integral
from typing import Any, TypeVar

from pyspark.ml.param import Param, Params

from allreduce_spark.errors import ConfigError

__all__ = ["ColumnParams", "accessors", "count", "names", "one_of", "param", "text"]

P = TypeVar("P", bound="ColumnParams")
C = TypeVar("C", bound=type[Params])


def accessors(cls: C) -> C:
    """Class decorator: `getX` and `setX` for every Param `x` of the class that has none yet."""
    for name in dir(cls):
        found = getattr(cls, name, None)
        if isinstance(found, Param):
            stem = name[0].upper() + name[1:]
            for method in (_getter(name, stem), _setter(name, stem, found.doc)):
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


def param(name: str, doc: str, check: Callable[[str, Any], Any]) -> Param[Any]:
    """A Param whose values `check` takes and returns, called with the name and the value; or raises a ConfigError."""
    return Param(Params._dummy(), name, doc, typeConverter=lambda value: check(name, value))


def text(name: str, value: Any) -> str:
    """For `param`: a string."""
    if not isinstance(value, str):
        raise ConfigError(f"{name} must be a string, got {value!r}.")
    return value


def names(name: str, value: Any) -> list[str]:
    """For `param`: a list of strings."""
    if isinstance(value, str) or not isinstance(value, (list, tuple)) or not all(isinstance(v, str) for v in value):
        raise ConfigError(f"{name} must be a list of column names, got {value!r}.")
    return list(value)


def count(least: int) -> Callable[[str, Any], int]:
    """For `param`: an integer that is not smaller than `least`."""

    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
            raise ConfigError(f"{name} must be an integer of at least {least}, got {value!r}.")
        return int(value)

    return check


def one_of(*allowed: str) -> Callable[[str, Any], str]:
    """For `param`: one of these strings."""

    def check(name: str, value: Any) -> str:
        if value not in allowed:
            raise ConfigError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}.")
        return str(value)

    return check


class ColumnParams(Params):
    """What estimator and transformer share: which columns are read and written, and how."""

    featuresCol = param(
        "featuresCol",
        "column of features: a vector (dense or sparse), a number, a (nested) array of numbers, or raw bytes in C order "
        "(uint8, float32 or float64, by their number)",
        text,
    )
    featuresCols = param(
        "featuresCols",
        "several columns of features, instead of featuresCol: they make one vector for a model with one input, else one "
        "column goes to each input, by name if the names are equal, otherwise in order",
        names,
    )
    predictionCol = param(
        "predictionCol",
        'column of predictions: the class as a double, or the value; several values as outputType says. "" for none. Several '
        "outputs of a model make several columns, predictionCol + '_' + the output's name",
        text,
    )
    probabilityCol = param(
        "probabilityCol",
        'column of class probabilities, as outputType says; [1 - p, p] for a single sigmoid unit. "" for none. A regression '
        "has none; several outputs have one each, as for predictionCol",
        text,
    )
    rawPredictionCol = param(
        "rawPredictionCol",
        "column of what the model says before it is made a probability, as outputType says, for Spark's evaluators: logits "
        'where the loss takes logits, [-z, z] for a single unit; else the same as probabilityCol. "" for none',
        text,
    )
    outputCol = param("outputCol", "column for the output of outputLayer", text)
    outputLayer = param("outputLayer", 'name of a layer whose output becomes the column outputCol; "" for none', text)
    outputType = param(
        "outputType",
        '"vector" for Spark ML vectors (of arrays with several axes, all values in one line), "array" for (nested) arrays of '
        "doubles",
        one_of("vector", "array"),
    )
    task = param(
        "task",
        '"classification", "regression", or "auto": a classification where the model is compiled with one of Keras\'s '
        "cross-entropies; where the loss is unknown, where the last layer is a softmax or sigmoid; else a regression",
        one_of("auto", "classification", "regression"),
    )
    predictionBatchSize = param("predictionBatchSize", "rows per call of the model in transform", count(1))
    handleInvalid = param(
        "handleInvalid",
        'what to do with rows whose features (or label, or weight) are null, or hold a null or NaN: "error", or "skip" to '
        "leave them out",
        one_of("error", "skip"),
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
