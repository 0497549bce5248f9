"""`import elephas` finds this package: in this process, and in the Python workers of the executors.

Each module of `elephas` is the module of the same place here, not a copy of it: `elephas.spark_model` is
`allreduce_spark.elephas.spark_model`. An Elephas that is really installed is passed over, in these processes only, and not
touched. `python -m allreduce_spark.elephas` does this for a script; a notebook may call `install()` itself, before
anything imports `elephas`.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import zipfile
from collections.abc import Sequence
from functools import wraps
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from allreduce_spark.errors import ConfigError

__all__ = ["install", "install_here"]

NAME = "elephas"
TARGET = "allreduce_spark.elephas"

# What executors import by the name of `elephas`.
STAND_IN = """\
from allreduce_spark.elephas import alias

alias.take_place_of(__name__)
"""


def install() -> None:
    """Let `import elephas` find this package here, and on the executors of every SparkContext made from now on.

    Raises:
        ConfigError: Another `elephas` has been imported in this process, or there is a SparkContext already.
    """
    from pyspark import SparkContext

    from allreduce_spark.spark.cluster import active_context

    if SparkContext._active_spark_context is not None:
        raise ConfigError("there is a SparkContext already: call install() before the first one is made.")
    install_here()
    make = SparkContext.__init__
    if getattr(make, "ships_stand_in", False):
        return

    @wraps(make)
    def make_and_ship(self: SparkContext, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        active_context()  # on one machine, workers run this Python
        _ship_stand_in(self)

    make_and_ship.ships_stand_in = True  # type: ignore[attr-defined]
    SparkContext.__init__ = make_and_ship  # type: ignore[method-assign]


def install_here() -> None:
    """Let `import elephas` find this package, in this process alone.

    Raises:
        ConfigError: Another `elephas` has been imported in this process.
    """
    present = sys.modules.get(NAME)
    if present is not None and present.__name__ == NAME:
        raise ConfigError(
            f"this process has imported an Elephas already, from {getattr(present, '__file__', None)}. Two cannot be "
            "used in one process: begin a new one."
        )
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def take_place_of(stand_in: str) -> None:
    """For the stand-in, while it is imported: be what it stands for."""
    del sys.modules[stand_in]
    install_here()
    sys.modules[stand_in] = importlib.import_module(TARGET)


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] != NAME:
            return None
        real = TARGET + fullname.removeprefix(NAME)
        found = importlib.util.find_spec(real)
        if found is None:
            raise ModuleNotFoundError(
                f"No module named {fullname!r}: allreduce_spark.elephas stands in for Elephas, and has no counterpart of it.",
                name=fullname,
            )
        return ModuleSpec(fullname, _Loader(real), is_package=found.submodule_search_locations is not None)


class _Loader(Loader):
    def __init__(self, real: str) -> None:
        self._real = real

    def exec_module(self, module: ModuleType) -> None:
        # A module may put another in its own place while it is imported; the import system then returns that one.
        sys.modules[module.__name__] = importlib.import_module(self._real)


def _ship_stand_in(context: Any) -> None:
    """Give the executors of this context a file that comes before any other Elephas, installed or shipped."""
    path = Path(context._temp_dir) / "allreduce_spark_elephas.zip"  # Spark removes that folder when the context ends
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{NAME}/__init__.py", STAND_IN)
    context.addPyFile(str(path))
