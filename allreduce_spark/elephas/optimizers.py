"""The optimizers that Elephas 0.1 to 0.3 ran on its parameter server.

Without a server, the Keras optimizer that the model was compiled with is the only one, and these only hold settings:
`SparkModel(sc, model, optimizer=...)` takes one without using it, and `ElephasEstimator(optimizer_config=...)` makes the
Keras optimizer of that name of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from allreduce_spark.errors import ConfigError

__all__ = ["SGD", "Adadelta", "Adagrad", "Adam", "Optimizer", "RMSprop", "get"]


class Optimizer:
    """The base of them all."""

    def get_config(self) -> dict[str, Any]:
        """The settings, with the class as "name".

        >>> Adagrad().get_config()
        {'name': 'Adagrad', 'lr': 0.01, 'epsilon': 1e-06}
        """
        return {"name": type(self).__name__, **vars(self)}


@dataclass
class SGD(Optimizer):
    """Stochastic gradient descent."""

    lr: float = 0.01
    momentum: float = 0.0
    decay: float = 0.0
    nesterov: bool = False


@dataclass
class RMSprop(Optimizer):
    """RMSprop."""

    lr: float = 0.001
    rho: float = 0.9
    epsilon: float = 1e-6


@dataclass
class Adagrad(Optimizer):
    """Adagrad."""

    lr: float = 0.01
    epsilon: float = 1e-6


@dataclass
class Adadelta(Optimizer):
    """Adadelta."""

    lr: float = 1.0
    rho: float = 0.95
    epsilon: float = 1e-6


@dataclass
class Adam(Optimizer):
    """Adam."""

    lr: float = 0.001
    beta_1: float = 0.9
    beta_2: float = 0.999
    epsilon: float = 1e-8


sgd, rmsprop, adagrad, adadelta, adam = SGD, RMSprop, Adagrad, Adadelta, Adam


def get(identifier: Any, kwargs: dict[str, Any] | None = None) -> Optimizer:
    """The optimizer of this name, with the settings of `kwargs`; an optimizer as it is.

    Raises:
        ConfigError: There is none of this name.
    """
    if isinstance(identifier, Optimizer):
        return identifier
    known = {kind.__name__.lower(): kind for kind in (SGD, RMSprop, Adagrad, Adadelta, Adam)}
    kind = known.get(str(identifier).lower())
    if kind is None:
        raise ConfigError(f"there is no optimizer {identifier!r}; there are {sorted(known)}.")
    return kind(**{name: value for name, value in (kwargs or {}).items() if name != "name"})
