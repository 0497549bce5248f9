"""The files of estimators and transformers: HDF5 with a configuration as an attribute, as Elephas writes them.

Elephas writes a transformer's weights into that attribute, too, as nested lists in JSON text. Such files are read; what is
written here has them as the arrays they are, which may be of any size.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from allreduce_spark.checkpoint.files import fetch_file, put_file
from allreduce_spark.elephas.utils.model_utils import ModelTypeEncoder, as_enum
from allreduce_spark.errors import ConfigError
from allreduce_spark.training.models.legacy_h5 import ATTRIBUTE

__all__ = ["read_config", "write_config"]

WEIGHTS = "distributed_weights"


def write_config(
    file_name: str, class_name: str, config: Mapping[str, Any], weights: Sequence[np.ndarray] | None = None
) -> None:
    """Write an HDF5 file at a path or a URI; what is there is replaced.

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
            if weights is not None:
                group = file.create_group(WEIGHTS)
                for index, weight in enumerate(weights):
                    # HDF5 knows no bfloat16; the model casts it back.
                    group[f"{index:05d}"] = weight if weight.dtype.kind in "fiub" else weight.astype("float32")
        put_file(local, file_name, overwrite=True)


def read_config(file_name: str, class_name: str) -> dict[str, Any]:
    """The configuration that `write_config`, or Elephas, wrote for an object of this class, its weights as "weights".

    Raises:
        ConfigError: There is no such file, or it holds something else.
    """
    with tempfile.TemporaryDirectory(prefix="allreduce_spark-") as folder:
        local = fetch_file(file_name, Path(folder))
        try:
            with h5py.File(local) as file:
                about = json.loads(file.attrs.get(ATTRIBUTE, "{}"), object_hook=as_enum)
                group = file.get(WEIGHTS, {})
                weights = [np.asarray(group[name]) for name in sorted(group)]
        except (OSError, ValueError) as error:
            raise ConfigError(f"{file_name!r} is no file of Elephas, or is damaged: {error}") from error
    found = about.get("class_name", "no object of Elephas")
    if found != class_name:
        raise ConfigError(f"{file_name!r} holds {found}, expected {class_name}.")
    return {"weights": weights, **about["config"]} if weights else dict(about["config"])
