"""Saving and loading: a model and its settings as one file, wherever it lies."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from allreduce_spark.checkpoint.files import check_absent, fetch_file, put_file
from allreduce_spark.errors import ConfigError
from allreduce_spark.training.models.model_file import ModelFile, check_file_name, read_model_file, write_model_file

if TYPE_CHECKING:
    import keras

__all__ = ["load_model_at", "save_model"]


def save_model(
    path: str | os.PathLike[str], model: keras.Model, class_name: str, settings: Mapping[str, Any], *, overwrite: bool
) -> None:
    """Write `model` to `path`, a local path or a URI that ends in .keras or .h5, with `settings` of `class_name` beside it.

    Raises:
        ConfigError: The file exists and `overwrite` is False, cannot be written, or the model cannot be saved.
    """
    name = os.fspath(path)
    plain = name.partition("?")[0] if "://" in name else name  # a URI may have options
    check_file_name(plain)
    check_absent(name, overwrite=overwrite)
    if not model.built:
        raise ConfigError(f"the model {model.name!r} has no weights yet: fit it, or build it, before it is saved.")
    with tempfile.TemporaryDirectory(prefix="allreduce_spark-") as folder:
        local = Path(folder) / f"model.{plain.rpartition('.')[2]}"
        write_model_file(local, model, class_name, settings)
        put_file(local, name, overwrite=overwrite)


def load_model_at(
    path: str | os.PathLike[str], custom_objects: Mapping[str, Any] | None, *, safe_mode: bool, compiled: bool = True
) -> ModelFile:
    """Read a model file from a local path or a URI; see `training.model_file.read_model_file`.

    Raises:
        ConfigError: There is no such file, or it is not fit to be read.
    """
    with tempfile.TemporaryDirectory(prefix="allreduce_spark-") as folder:
        local = fetch_file(path, Path(folder))
        return read_model_file(local, custom_objects, safe_mode=safe_mode, compiled=compiled, name=os.fspath(path))
