"""`Mode`: how the workers of Elephas come together."""

from __future__ import annotations

from enum import Enum

__all__ = ["Mode"]


class Mode(str, Enum):
    """A word of Elephas; `allreduce_spark.elephas.spark_model` says what each does here."""

    SYNCHRONOUS = "synchronous"
    ASYNCHRONOUS = "asynchronous"
    HOGWILD = "hogwild"
