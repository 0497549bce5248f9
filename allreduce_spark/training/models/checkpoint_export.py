"""A checkpoint as a `.keras` file, with weights and optimizer state: for whoever wants the model and not the fit.

Ranks save what all of them have as `shared/weights/<index>`, in the order of `model.weights`, and `shared/optimizer/<index>`,
in the order of `model.optimizer.variables`. Code in the files is never run: see `model_file`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from allreduce_spark.checkpoint.files import check_absent, fetch_file, inside, put_file
from allreduce_spark.checkpoint.fingerprint import Fingerprint
from allreduce_spark.checkpoint.manifest import Manifest
from allreduce_spark.checkpoint.shares import read_share
from allreduce_spark.checkpoint.store import Store
from allreduce_spark.data.spec import RowSpec
from allreduce_spark.errors import ConfigError
from allreduce_spark.training.models.model_bytes import save_keras
from allreduce_spark.training.models.model_file import read_model_file
from allreduce_spark.training.result import build_like

__all__ = ["export_checkpoint", "model_of"]


def export_checkpoint(
    store: Store,
    destination: str | os.PathLike[str],
    *,
    checkpoint: str | None = None,
    safe_mode: bool = True,
    overwrite: bool = False,
) -> Manifest:
    """Write the model of a checkpoint to a `.keras` file; returns which checkpoint it was.

    Args:
        destination: A local path or a URI.
        checkpoint: Its id; None for the newest one that is not damaged.
        safe_mode: Refuse models that hold code, such as Lambda layers.
        overwrite: Replace a file that is there.

    Raises:
        ConfigError: There is no such checkpoint, it is damaged, its model cannot be loaded or saved, or the file exists.
    """
    name = os.fspath(destination)
    if not (name.partition("?")[0] if "://" in name else name).endswith(".keras"):
        raise ConfigError(f"the name of the exported model must end in .keras, got {name!r}.")
    check_absent(name, overwrite=overwrite)
    manifest = _manifest(store, checkpoint)
    model = model_of(store, manifest, safe_mode=safe_mode)
    with tempfile.TemporaryDirectory(prefix="allreduce_spark-") as folder:
        local = Path(folder) / "model.keras"
        save_keras(model, local)
        put_file(local, name, overwrite=overwrite)
    return manifest


def model_of(store: Store, manifest: Manifest, *, safe_mode: bool = True) -> keras.Model:
    """The model of a checkpoint as it was trained so far, compiled as it was.

    Raises:
        ConfigError: The model is not in the store, cannot be loaded, or is another one than was trained.
    """
    if manifest.model is None:
        raise ConfigError(
            f"{store.path!r} holds the numbers of checkpoint {manifest.id} alone, without a model for them."
        )
    with tempfile.TemporaryDirectory(prefix="allreduce_spark-") as folder:
        place = inside(store.path, manifest.model.name)
        model = read_model_file(fetch_file(place, Path(folder)), safe_mode=safe_mode, name=place).model
        schema = Fingerprint.from_json(manifest.fingerprint).data_schema
        build_like(model, RowSpec.from_json(schema))
        shared: dict[str, Any] = {}
        for share in manifest.shares:
            shared |= read_share(fetch_file(store.place(manifest.id, share.name), Path(folder))).tensors
        _assign("weights", model.weights, shared)
        _assign("optimizer", model.optimizer.variables, shared)
    return model


def _manifest(store: Store, checkpoint: str | None) -> Manifest:
    if checkpoint is None:
        latest = store.latest()
        if latest is None:
            raise ConfigError(f"{store.path!r} holds no complete checkpoint.")
        return latest
    found = [manifest for manifest in store.checkpoints() if manifest.id == checkpoint]
    problems = store.verify(checkpoint)
    if problems or not found:
        raise ConfigError(f"checkpoint {checkpoint} in {store.path!r} cannot be exported: {'; '.join(problems)}.")
    return found[0]


def _assign(kind: str, variables: Sequence[keras.Variable], shared: Mapping[str, Any]) -> None:
    prefix = f"shared/{kind}/"
    named = {name.removeprefix(prefix): array for name, array in shared.items() if name.startswith(prefix)}
    arrays = {int(index): array for index, array in named.items() if index.isdecimal()}
    if sorted(arrays) != list(range(len(variables))):
        raise ConfigError(
            f"the checkpoint is of another model: it has {len(arrays)} {kind} variables, where the model has {len(variables)}."
        )
    for index, variable in enumerate(variables):
        if arrays[index].shape != tuple(variable.shape):
            raise ConfigError(
                f"the checkpoint is of another model: {variable.path} has shape {tuple(variable.shape)}, but was saved as "
                f"{arrays[index].shape}."
            )
        variable.assign(np.array(arrays[index]))
