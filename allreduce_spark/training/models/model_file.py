"""One file with a trained model and what this library knows about it: `.keras` (a zip archive) or `.h5` (Keras's older HDF5).

The settings travel inside the file: in an archive as the entry `allreduce_spark.json`, which Keras does not look at; in HDF5
as the attribute `distributed_config`, as Elephas wrote it. Reading never runs code from the file unless the caller says so:
there is no pickle, and Lambda layers, which hold bytecode, are refused.
"""

from __future__ import annotations

import json
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import keras
from keras.src.saving import serialization_lib

from allreduce_spark.errors import ConfigError
from allreduce_spark.training.models import legacy_h5
from allreduce_spark.training.models.model_bytes import keras_lock, save_keras

__all__ = ["ModelFile", "check_file_name", "read_model_file", "write_model_file"]

FORMAT_VERSION = 1
_ENTRY = "allreduce_spark.json"
_ARCHIVE_ENTRIES = {"config.json", "metadata.json", "model.weights.h5"}


@dataclass(frozen=True)
class ModelFile:
    """What a file holds.

    Attributes:
        model: With its weights; compiled, with the optimizer's state, where it was when it was saved.
        class_name: Of what was saved: "SparkModel", "ElephasTransformer", ...; None for a file of plain Keras.
        settings: What that class had written beside the model.
    """

    model: keras.Model
    class_name: str | None
    settings: dict[str, Any]


def check_file_name(path: str) -> None:
    """Make sure that the name says which format is meant.

    Raises:
        ConfigError: It ends neither in .keras nor in .h5.
    """
    if not path.endswith((".keras", ".h5")):
        raise ConfigError(
            f"the name of a model file must end in .keras (or in .h5, Keras's older format), got {path!r}."
        )


def write_model_file(path: Path, model: keras.Model, class_name: str, settings: Mapping[str, Any]) -> None:
    """Write a model file on the local disk.

    Args:
        path: Ends in .keras or .h5.
        class_name, settings: See `ModelFile`; the settings are JSON values.

    Raises:
        ConfigError: Keras cannot save the model in this format, or a setting is no JSON value.
    """
    check_file_name(path.name)
    about = {"class_name": class_name, "config": dict(settings)}
    try:
        text = json.dumps(about if path.suffix == ".h5" else {"format_version": FORMAT_VERSION, **about})
    except TypeError as error:
        raise ConfigError(f"a setting of {class_name} cannot be saved: {error}. Settings are plain values.") from error
    try:
        save_keras(model, path)
    except Exception as error:
        raise ConfigError(f"Keras cannot save the model {model.name!r} as {path.suffix}: {error}") from error
    if path.suffix == ".h5":
        with h5py.File(path, "a") as file:
            file.attrs[legacy_h5.ATTRIBUTE] = text.encode()
    else:
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(_ENTRY, text)


def read_model_file(
    path: Path,
    custom_objects: Mapping[str, Any] | None = None,
    *,
    safe_mode: bool = True,
    compiled: bool = True,
    name: str | None = None,
) -> ModelFile:
    """Read what `write_model_file`, Keras, or Elephas wrote.

    Args:
        path: On the local disk. The content says which format it is, not the name.
        custom_objects: Classes and functions, by name, beside those registered with Keras.
        safe_mode: Refuse what would run code from the file. Only pass False for a file whose author you trust;
            `keras.config.enable_unsafe_deserialization()` says so for all files.
        compiled: Whether to restore loss, metrics and optimizer as well.
        name: What to call the file in errors, where `path` is a copy of it.

    Raises:
        ConfigError: The file is no model file, is damaged, comes from a newer version, or needs code that is not here.
    """
    name = name or str(path)
    safe_mode = safe_mode and serialization_lib.in_safe_mode() is not False
    with path.open("rb") as file:
        head = file.read(8)
    archive = head.startswith(b"PK\x03\x04")
    if not archive and head != b"\x89HDF\r\n\x1a\n":
        raise ConfigError(f"{name!r} is no Keras model file: {_what_it_is(head)}.")
    class_name, settings = _settings_of_archive(path, name) if archive else legacy_h5.settings_of(path, name)
    with tempfile.TemporaryDirectory(prefix="allreduce_spark-") as folder:
        named = Path(folder) / ("model.keras" if archive else "model.h5")  # Keras goes by the name
        named.symlink_to(path.absolute())
        load = keras.saving.load_model if archive else legacy_h5.load
        try:
            with keras_lock:
                model = load(named, dict(custom_objects or {}), compiled, safe_mode)
        except Exception as error:
            raise ConfigError(_why_not_loaded(name, error)) from error
    return ModelFile(model, class_name, settings)


def _why_not_loaded(name: str, error: Exception) -> str:
    if "Lambda" in str(error) or "lambda" in str(error):
        advice = (
            "A Lambda layer is Python bytecode in the file, which could do anything. If you trust the author of the file, pass "
            "safe_mode=False, or where nothing can be passed call keras.config.enable_unsafe_deserialization() before; better, "
            "replace the layer by a class of your own."
        )
    else:
        advice = (
            "Classes and functions of your own must be there when the file is read: import the module that registers them "
            "with @keras.saving.register_keras_serializable(), or pass custom_objects."
        )
    return f"{name!r} cannot be loaded by Keras {keras.__version__}: {type(error).__name__}: {error} {advice}"


def _what_it_is(head: bytes) -> str:
    if not head:
        return "it is empty"
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "it is a pickle, which could run any code while it is read, so it is not loaded"
    return f"it begins with {head!r}, not as a .keras archive or an HDF5 file does"


def _settings_of_archive(path: Path, name: str) -> tuple[str | None, dict[str, Any]]:
    """(class name, settings), after making sure that the archive is whole."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            names = set(archive.namelist())
            text = archive.read(_ENTRY) if _ENTRY in names else None
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise ConfigError(f"{name!r} is damaged, or was not written to its end: {error}") from error
    if damaged is not None:
        raise ConfigError(f"{name!r} is damaged: the checksum of its part {damaged!r} is wrong.")
    if not names >= _ARCHIVE_ENTRIES:
        raise ConfigError(f"{name!r} is a zip file, but no Keras model: it lacks {sorted(_ARCHIVE_ENTRIES - names)}.")
    if text is None:
        return None, {}
    about = json.loads(text)
    if about["format_version"] > FORMAT_VERSION:
        raise ConfigError(
            f"{name!r} was written by a newer version of allreduce-spark (format {about['format_version']}; this one "
            f"reads up to {FORMAT_VERSION}): update allreduce-spark, or load the model alone with keras.saving.load_model."
        )
    return about["class_name"], about["config"]
