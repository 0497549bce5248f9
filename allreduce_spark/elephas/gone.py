"""Names of Elephas that have no counterpart here. They can be imported; using them says what to do instead."""

from __future__ import annotations

from typing import Any

from allreduce_spark.errors import ConfigError

__all__ = ["Gone"]


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
