"""What kind of model a loss makes, which decides the type of `ElephasTransformer`'s output column."""

from __future__ import annotations

import json
from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING, Any

from allreduce_spark.errors import ConfigError

if TYPE_CHECKING:
    import keras

__all__ = [
    "LossModelTypeMapper",
    "ModelType",
    "ModelTypeEncoder",
    "Singleton",
    "as_enum",
    "is_multiple_input_model",
    "is_multiple_output_model",
]


class ModelType(Enum):
    """Classification gives an array of probabilities, regression one number."""

    CLASSIFICATION = 1
    REGRESSION = 2


class Singleton:
    """A class with one instance, which every call returns."""

    _instance: Any = None

    def __new__(cls) -> Any:
        if "_instance" not in vars(cls):
            cls._instance = super().__new__(cls)
            cls._instance._begin()
        return cls._instance

    def _begin(self) -> None:
        """What would be `__init__`, which Python runs at every call."""


class LossModelTypeMapper(Singleton):
    """From the name of a loss to the type of the model, for Keras's own losses and those that users register."""

    def _begin(self) -> None:
        regression = (
            "mean_squared_error",
            "mean_absolute_error",
            "mse",
            "mae",
            "cosine_proximity",
            "mean_absolute_percentage_error",
            "mean_squared_logarithmic_error",
            "logcosh",
        )
        classification = ("binary_crossentropy", "categorical_crossentropy", "sparse_categorical_crossentropy")
        self._types = dict.fromkeys(regression, ModelType.REGRESSION)
        self._types |= dict.fromkeys(classification, ModelType.CLASSIFICATION)

    def get_model_type(self, loss: str | Callable[..., Any]) -> ModelType | None:
        """The type of model that this loss, or its name, belongs to; None where it is not known."""
        return self._types.get(_name_of(loss))

    def register_loss(self, loss: str | Callable[..., Any], model_type: ModelType) -> None:
        """Say what type of model a loss of your own, or its name, belongs to."""
        self._types[_name_of(loss)] = model_type


def _name_of(loss: str | Callable[..., Any]) -> str:
    return loss if isinstance(loss, str) else str(getattr(loss, "__name__", getattr(loss, "name", loss)))


class ModelTypeEncoder(json.JSONEncoder):
    """JSON with `ModelType.REGRESSION` as `{"__enum__": "ModelType.REGRESSION"}`; `as_enum` is the way back."""

    def default(self, o: Any) -> Any:
        return {"__enum__": str(o)} if isinstance(o, ModelType) else super().default(o)


def as_enum(d: dict[str, Any]) -> Any:
    """The `object_hook` that reads what `ModelTypeEncoder` wrote.

    Raises:
        ConfigError: The dict names something else than a `ModelType`.
    """
    if "__enum__" not in d:
        return d
    kind, _, member = str(d["__enum__"]).partition(".")
    if kind != "ModelType" or member not in ModelType.__members__:
        raise ConfigError(f"{d['__enum__']!r} is no ModelType; there are {[str(item) for item in ModelType]}.")
    return ModelType[member]


def is_multiple_input_model(model: keras.Model) -> bool:
    """Whether the model takes several arrays by position."""
    return isinstance(model.input_shape, list)


def is_multiple_output_model(model: keras.Model) -> bool:
    """Whether the model gives several arrays by position."""
    return isinstance(model.output_shape, list)
