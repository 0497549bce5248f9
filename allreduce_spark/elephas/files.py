"""The files of estimators and transformers: an attribute of an HDF5 file, as in Elephas, or a model file of this library.

Elephas writes a transformer's weights into that attribute, as nested lists in JSON text. Such files are read; what is written
here has the model in it as Keras saves it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py

from allreduce_spark.checkpoint.files import fetch_file, put_file
from allreduce_spark.elephas.utils.model_utils import ModelTypeEncoder, as_enum
from allreduce_spark.errors import ConfigError
from allreduce_spark.spark.files import load_model_at, save_model

if TYPE_CHECKING:
    from allreduce_spark.elephas.ml_model import ElephasTransformer

__all__ = ["read_config", "read_transformer", "write_config", "write_transformer"]

ATTRIBUTE = "distributed_config"
HDF5_HEAD = b"\x89HDF\r\n\x1a\n"


def write_config(file_name: str, class_name: str, config: Mapping[str, Any]) -> None:
    """Write an HDF5 file with a configuration and nothing else, at a path or a URI.

    Raises:
        ConfigError: A value is no JSON value, or the file cannot be written.
    """
    try:
        text = json.dumps({"class_name": class_name, "config": dict(config)}, cls=ModelTypeEncoder)
    except TypeError as error:
        raise ConfigError(
            f"a param of {class_name} cannot be saved: {error}. Give loss and metrics by name."
        ) from error
    with tempfile.TemporaryDirectory(prefix="allreduce_spark-") as folder:
        local = Path(folder) / "config.h5"
        with h5py.File(local, "w", libver="latest") as file:  # the older format has no room for more than 64 KiB
            file.attrs[ATTRIBUTE] = text.encode()
        put_file(local, file_name, overwrite=True)


def read_config(file_name: str, class_name: str) -> dict[str, Any]:
    """The configuration that `write_config`, or Elephas, wrote for an object of this class.

    Raises:
        ConfigError: There is no such file, or it holds something else.
    """
    about = _attribute(file_name)
    found = about.get("class_name", "no object of Elephas")
    if found != class_name:
        raise ConfigError(f"{file_name!r} holds {found}, expected {class_name}.")
    return dict(about["config"])


def write_transformer(file_name: str, transformer: ElephasTransformer) -> None:
    """Write a model file with a transformer's model and params.

    Raises:
        ConfigError: The file cannot be written, or ends neither in .h5 nor in .keras.
    """
    config = transformer.get_config()
    settings = {name: value for name, value in config.items() if name not in ("weights", "keras_model_config")}
    settings = json.loads(json.dumps({**settings, "history": transformer.history}, cls=ModelTypeEncoder))
    save_model(file_name, transformer.get_model(), type(transformer).__name__, settings, overwrite=True)


def read_transformer(file_name: str, class_name: str, custom_objects: Mapping[str, Any] | None) -> dict[str, Any]:
    """The keyword arguments of the transformer that `write_transformer`, or Elephas, wrote.

    Raises:
        ConfigError: There is no such file, or it holds something else.
    """
    if "weights" in _attribute(file_name).get("config", {}):
        return read_config(file_name, class_name)
    file = load_model_at(file_name, custom_objects, safe_mode=True, compiled=False)
    if file.class_name != class_name:
        raise ConfigError(f"{file_name!r} holds {file.class_name or 'a plain Keras model'}, expected {class_name}.")
    settings = json.loads(json.dumps(file.settings), object_hook=as_enum)
    return {**settings, "keras_model_config": file.model.to_json(), "weights": file.model.get_weights()}


def _attribute(file_name: str) -> dict[str, Any]:
    """What Elephas's attribute of the file says; nothing where it has none, or is no HDF5 file."""
    with tempfile.TemporaryDirectory(prefix="allreduce_spark-") as folder:
        local = fetch_file(file_name, Path(folder))
        with local.open("rb") as start:
            if start.read(len(HDF5_HEAD)) != HDF5_HEAD:
                return {}
        try:
            with h5py.File(local) as file:
                text = file.attrs.get(ATTRIBUTE, "{}")
        except OSError as error:
            raise ConfigError(f"{file_name!r} is damaged, or was not written to its end: {error}") from error
    return dict(json.loads(text, object_hook=as_enum))
