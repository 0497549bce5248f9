"""What went with the parameter server: classes that can be imported, and say what to do instead when they are used; and
what is told, once in a process, to whoever asks for the server in other ways.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

from allreduce_spark.errors import ConfigError

__all__ = ["Gone", "PartOfServer", "tell_about_modes", "tell_about_optimizers"]


class Gone:
    """The base of such classes; `_instead` is the sentence that helps."""

    _instead = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise ConfigError(self._message())

    @classmethod
    def _message(cls) -> str:
        return f"{cls.__name__} of Elephas has no counterpart in allreduce_spark: {cls._instead}"


class PartOfServer(Gone):
    """A part of the parameter server."""

    _instead = (
        "there is no parameter server, the ranks reduce their gradients among themselves. Leave it out: SparkModel and "
        "AsynchronousSparkModel need nothing beside `fit`, and take `parameter_server_mode` and `port` without using them."
    )


@cache  # so it is said once
def tell_about_modes() -> None:
    """Of the asynchronous modes."""
    warnings.warn(
        "there is no parameter server: in the modes 'asynchronous' and 'hogwild', frequency='batch' reduces the gradients of "
        "all ranks at every step, and frequency='epoch' averages weights and optimizer state after every epoch.",
        stacklevel=3,
    )


@cache
def tell_about_optimizers() -> None:
    """Of the optimizer on the parameter server, in Elephas 0.1 to 0.3."""
    warnings.warn(
        "the optimizer that was given to SparkModel is not used: it ran on the parameter server, and there is none. The "
        "optimizer that the Keras model was compiled with is.",
        stacklevel=3,
    )
