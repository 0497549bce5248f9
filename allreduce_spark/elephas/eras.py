"""The arguments of `SparkModel` as they were in each era of Elephas, read into one form.

    0.1 to 0.3      SparkModel(sc, model, optimizer=..., mode=..., frequency=..., num_workers=4)
    0.4 to 6.2      SparkModel(model, "asynchronous", "epoch", "http", num_workers, custom_objects, batch_size, port)
    from 7.0        SparkModel(model, num_workers, custom_objects, batch_size); AsynchronousSparkModel(..., mode, ...)

Which is meant shows in the types: a SparkContext comes first in the oldest, and only there; a second argument that is text is
a mode. What is given by name is the same in all of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pyspark import SparkContext
from pyspark.sql import SparkSession

from allreduce_spark.elephas.enums.frequency import Frequency
from allreduce_spark.elephas.enums.modes import Mode
from allreduce_spark.errors import ConfigError

__all__ = ["Arguments", "read_arguments", "sync_every_of"]

WORDS = ("parameter_server_mode", "mode", "frequency")  # that Elephas writes into files


@dataclass(frozen=True)
class Arguments:
    """What a `SparkModel` is made with.

    Attributes:
        model: The compiled Keras model.
        num_workers: How many ranks are asked for; None for all slots.
        custom_objects: For Keras, by name.
        batch_size: Rows per rank per step, where `fit` is not told.
        mode, frequency: Words of Elephas.
        optimizer: What the oldest versions ran on the parameter server, or None.
        recorded: What Elephas writes into files beside `num_workers` and `batch_size`: names it does not know, and the
            words of asynchronous training where its version had them.
    """

    model: Any
    num_workers: int | None
    custom_objects: dict[str, Any]
    batch_size: int
    mode: Mode
    frequency: Frequency
    optimizer: Any = None
    recorded: dict[str, Any] = field(default_factory=dict)


def _until_0_3(
    sc: Any,
    master_network: Any,
    optimizer: Any = None,
    mode: Any = Mode.ASYNCHRONOUS,
    frequency: Any = Frequency.EPOCH,
    num_workers: Any = 4,
    **recorded: Any,
) -> None: ...


def _until_6_2(
    model: Any,
    mode: Any = Mode.ASYNCHRONOUS,
    frequency: Any = Frequency.EPOCH,
    parameter_server_mode: Any = "http",
    num_workers: Any = None,
    custom_objects: Any = None,
    batch_size: Any = 32,
    port: Any = 4000,
    **recorded: Any,
) -> None: ...


def _from_7_0(
    model: Any, num_workers: Any = None, custom_objects: Any = None, batch_size: Any = 32, **recorded: Any
) -> None: ...


def _asynchronous_from_7_0(
    model: Any,
    num_workers: Any = None,
    custom_objects: Any = None,
    batch_size: Any = 32,
    mode: Any = Mode.ASYNCHRONOUS,
    frequency: Any = Frequency.EPOCH,
    parameter_server_mode: Any = "http",
    port: Any = 4000,
    **recorded: Any,
) -> None: ...


def read_arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any], *, asynchronous: bool = False) -> Arguments:
    """Read the arguments of a `SparkModel`, or of an `AsynchronousSparkModel`, of any era.

    Raises:
        ConfigError: `mode` or `frequency` is no word of Elephas.
        TypeError: They are the arguments of no era.
    """
    shape = _shape_of(args, kwargs, asynchronous)
    bound = inspect.signature(shape).bind(*args, **kwargs)
    bound.apply_defaults()
    values = {**bound.arguments, **bound.arguments["recorded"]}
    # Whoever names a frequency and no mode means the mode that has one.
    mode = values.get("mode", Mode.ASYNCHRONOUS if "frequency" in values else Mode.SYNCHRONOUS)
    words: dict[str, Any] = {
        name: values[name] for name in ("parameter_server_mode", "mode", "frequency") if name in bound.arguments
    }
    return Arguments(
        model=values["master_network"] if shape is _until_0_3 else values["model"],
        num_workers=values["num_workers"],
        custom_objects=dict(values.get("custom_objects") or {}),
        batch_size=values.get("batch_size", 32),
        mode=_word("mode", Mode, mode),
        frequency=_word("frequency", Frequency, values.get("frequency", Frequency.EPOCH)),
        optimizer=values.get("optimizer"),
        recorded={**words, **bound.arguments["recorded"]},
    )


def sync_every_of(mode: Mode, frequency: Frequency) -> int | str:
    """The `sync_every` of `allreduce_spark.SparkModel` that stands for a mode.

    >>> sync_every_of(Mode.SYNCHRONOUS, Frequency.EPOCH), sync_every_of(Mode.HOGWILD, Frequency.BATCH)
    (1, 1)
    >>> sync_every_of(Mode.ASYNCHRONOUS, Frequency.EPOCH)
    'epoch'
    """
    return "epoch" if mode is not Mode.SYNCHRONOUS and frequency is Frequency.EPOCH else 1


def _shape_of(args: tuple[Any, ...], kwargs: Mapping[str, Any], asynchronous: bool) -> Callable[..., None]:
    if (args and isinstance(args[0], (SparkContext, SparkSession))) or "sc" in kwargs:
        return _until_0_3
    if asynchronous:
        return _asynchronous_from_7_0
    return _until_6_2 if len(args) > 1 and isinstance(args[1], str) else _from_7_0


def _word(name: str, kind: Any, value: Any) -> Any:
    try:
        return kind(value)
    except ValueError:
        raise ConfigError(f"{name} must be one of {[str(word.value) for word in kind]}, got {value!r}.") from None
