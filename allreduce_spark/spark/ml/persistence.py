"""Estimators and transformers on disk, in Spark ML's own layout: params as JSON in `metadata`, the model as `model.keras`.

Spark's own Hadoop file systems write and read it, so every path that Spark knows works, and it lies where the other stages of a
pipeline lie. A path that ends in `.keras` or `.h5` means one file instead, with the params inside. No pickle either way.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pyspark.ml.param import Params
from pyspark.ml.util import DefaultParamsReader, DefaultParamsWriter, MLReadable, MLReader, MLWritable, MLWriter

from allreduce_spark.errors import ConfigError
from allreduce_spark.spark.files import load_model_at, save_model
from allreduce_spark.spark.hadoop import fetch_hadoop_file, hadoop_exists, put_hadoop_file
from allreduce_spark.training.models.model_file import read_model_file, write_model_file

if TYPE_CHECKING:
    import keras

__all__ = ["Persistent"]

FORMAT_VERSION = 1
ABOUT = "allreduceSpark"  # our part of the metadata
MODEL = "model.keras"
NOT_WRITTEN = ("model", "callbacks", "customObjects", "resources")  # Params whose values are no JSON


class Persistent(MLWritable, MLReadable[Any]):
    """Params with a Keras model that can be saved and loaded: `save`, `write().overwrite().save`, `load`, `read`.

    Loading refuses what would run code from the file. Classes of the user's own must be registered with Keras
    (`keras.saving.register_keras_serializable`) when the file is loaded.
    """

    def write(self) -> _Writer:
        """A writer; `write().overwrite().save(path)` replaces what is at the path."""
        return _Writer(self)

    @classmethod
    def read(cls) -> _Reader:
        """A reader; `read().load(path)` is `load(path)`."""
        return _Reader(cls)

    # What the writer and the reader need to know of the two classes.

    def _saved_model(self) -> keras.Model:
        raise NotImplementedError

    def _saved_about(self) -> dict[str, Any]:
        """What else is to be kept, as JSON values."""
        return {}

    def _restore(self, model: keras.Model, about: dict[str, Any]) -> None:
        raise NotImplementedError


class _Writer(MLWriter):
    def __init__(self, instance: Any) -> None:
        super().__init__()
        self._instance = instance

    def save(self, path: str) -> None:
        """Write to a folder of any file system that Spark knows, or, if `path` ends in .keras or .h5, to one file.

        Raises:
            ConfigError: The path exists and `overwrite()` was not called, or Keras cannot save the model.
        """
        if not _is_file_name(path):
            self.saveImpl(path)
            return
        model, params = self._instance._saved_model(), _params_of(self._instance)
        settings = {"params": params, "uid": self._instance.uid, **self._instance._saved_about()}
        save_model(path, model, type(self._instance).__name__, settings, overwrite=self.shouldOverwrite)

    def saveImpl(self, path: str) -> None:
        model, params = self._instance._saved_model(), _params_of(self._instance)
        about = {"formatVersion": FORMAT_VERSION, **self._instance._saved_about()}
        context = self.sparkSession.sparkContext
        if not self.shouldOverwrite and hadoop_exists(context, path):
            raise ConfigError(f"{path!r} exists already: use write().overwrite().save(path) to replace it.")
        with tempfile.TemporaryDirectory(prefix="allreduce_spark-") as folder:
            local = Path(folder) / MODEL
            write_model_file(local, model, type(self._instance).__name__, {})
            if self.shouldOverwrite:  # not before it is sure that there is something to take its place
                self._handleOverwrite(path)
            put_hadoop_file(context, local, f"{path}/{MODEL}", overwrite=False)
        # The metadata last: what has them is complete.
        DefaultParamsWriter.saveMetadata(self._instance, path, context, {ABOUT: about}, params)


class _Reader(MLReader[Any]):
    def __init__(self, cls: type[Any]) -> None:
        super().__init__()
        self._cls = cls

    def load(self, path: str) -> Any:
        """Read what `save` wrote.

        Raises:
            ConfigError: It was written by a newer version, is damaged, is something else, or needs code that is not here.
        """
        return self._from_file(path) if _is_file_name(path) else self._from_folder(path)

    def _from_file(self, path: str) -> Any:
        saved = load_model_at(path, None, safe_mode=True)
        self._check_class(saved.class_name, path)
        instance = self._cls()
        instance._resetUid(saved.settings["uid"])
        instance._set_known(saved.settings["params"])
        instance._restore(saved.model, saved.settings)
        return instance

    def _from_folder(self, path: str) -> Any:
        metadata = DefaultParamsReader.loadMetadata(path, self.sparkSession.sparkContext)
        self._check_class(metadata["class"].rpartition(".")[2], path)
        about = metadata.get(ABOUT, {})
        version = about.get("formatVersion")
        if version is None or version > FORMAT_VERSION:
            raise ConfigError(
                f"{path!r} was written by a newer version of allreduce-spark (format {version}; this one reads up to "
                f"{FORMAT_VERSION}): update allreduce-spark."
            )
        context, there = self.sparkSession.sparkContext, f"{path}/{MODEL}"
        if not hadoop_exists(context, there):
            raise ConfigError(f"{there!r} is missing: what was saved there is not complete.")
        with tempfile.TemporaryDirectory(prefix="allreduce_spark-") as folder:
            model = read_model_file(fetch_hadoop_file(context, there, Path(folder)), name=there).model
        instance = self._cls()
        instance._resetUid(metadata["uid"])
        DefaultParamsReader.getAndSetParams(instance, metadata)
        instance._restore(model, about)
        return instance

    def _check_class(self, name: str | None, path: str) -> None:
        if name != self._cls.__name__:
            what = "a model of plain Keras" if name is None else f"a {name}"
            raise ConfigError(
                f"{path!r} holds {what}, not a {self._cls.__name__}: load it with the class it was saved with."
            )


def _is_file_name(path: str) -> bool:
    return path.endswith((".keras", ".h5"))


def _params_of(instance: Params) -> dict[str, Any]:
    """The values of the params that were set, as JSON values.

    Raises:
        ConfigError: One is none.
    """
    params = {param.name: value for param, value in instance._paramMap.items() if param.name != "model"}
    lost = [name for name in NOT_WRITTEN if params.pop(name, None)]
    if lost:
        warnings.warn(f"{', '.join(lost)} cannot be written to a file: set them again after loading.", stacklevel=4)
    try:
        json.dumps(params)
    except TypeError as error:
        raise ConfigError(f"a param of {type(instance).__name__} cannot be saved: {error}.") from error
    return params


def plain_history(history: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """A history as JSON values: metrics with one number per class are lists."""
    return {name: [np.asarray(value).tolist() for value in values] for name, values in history.items()}
