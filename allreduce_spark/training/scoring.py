"""The outputs of a model for rows that arrive batch after batch: what the task of a transformer does in a Python worker."""

from __future__ import annotations

import hashlib
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cloudpickle
import keras
import numpy as np

from allreduce_spark.training.job import pickle_objects
from allreduce_spark.training.models.layout import outputs_in_order, outputs_of, sub_model
from allreduce_spark.training.models.model_bytes import keras_lock, model_and_code
from allreduce_spark.training.settings import KerasSettings

__all__ = ["PackedModel", "Scorer", "load_uncompiled", "pack", "scorer_of", "state_of"]

MODELS_KEPT = 2  # per Python worker: a cross-validation, for example, uses several in turn


@dataclass(frozen=True)
class PackedModel:
    """A model on its way to the executors.

    Attributes:
        archive: The `.keras` archive.
        objects: The custom objects, by cloudpickle.
        settings: Keras's settings for it, as JSON.
    """

    archive: bytes = field(repr=False)
    objects: bytes = field(repr=False)
    settings: bytes

    @property
    def keras_settings(self) -> KerasSettings:
        """To be in force wherever the model is loaded and used."""
        return KerasSettings.from_json(self.settings)


def pack(model: keras.Model, custom_objects: Mapping[str, Any] | None = None) -> PackedModel:
    """Pack a model with the user's code that it needs.

    Args:
        custom_objects: By name, what cannot be found in the model.

    Raises:
        ConfigError: Keras cannot save it, or its code cannot be sent.
    """
    archive, code = model_and_code(model, custom_objects)
    return PackedModel(archive, pickle_objects(code), KerasSettings.of(model).to_json().encode())


def state_of(model: keras.Model) -> str:
    """A digest that changes when a weight does. Reading all weights is much cheaper than sending them."""
    digest = hashlib.sha256()
    for variable in model.variables:
        digest.update(np.ascontiguousarray(variable.numpy()).tobytes())
    return digest.hexdigest()


class Scorer:
    """A loaded model, and which of its outputs are wanted.

    Args:
        packed: See `pack`. Loss, metrics and optimizer are not restored, nor the user's code for them needed.
        layer: Name of a layer whose output is wanted too, from the same pass; "" for none.
        with_outputs: Whether the outputs of the model itself are wanted.
    """

    def __init__(self, packed: PackedModel, layer: str, *, with_outputs: bool) -> None:
        self._settings = packed.keras_settings
        with self._settings.in_force():
            model = load_uncompiled(packed)
        self._outputs = [slot.name for slot in outputs_of(model) or ()]
        # Keras takes a list for a list of inputs only in its order; models of which it knows no inputs say names themselves.
        self._takes_list = bool(layer) or (bool(getattr(model, "inputs", None)) and not _is_dict(model))
        self._layer = layer
        self._model = sub_model(model, layer, with_outputs=with_outputs) if layer else model

    def __call__(self, arrays: Mapping[str, np.ndarray]) -> tuple[list[np.ndarray], np.ndarray | None]:
        """The outputs for one batch of rows.

        Args:
            arrays: By the name of the input, of shape (rows, ...), in the order of `layout.feature_forms`.

        Returns:
            The outputs in the order of `layout.outputs_of`, and that of the layer, each of shape (rows, ...).
        """
        x: Any = arrays
        if len(arrays) == 1:
            (x,) = arrays.values()
        elif self._takes_list:
            x = list(arrays.values())
        with self._settings.in_force():
            result = self._model.predict_on_batch(x)
        if not self._layer:
            return outputs_in_order(result, self._outputs), None
        results = outputs_in_order(result, ())
        return results[:-1], results[-1]


def _is_dict(model: keras.Model) -> bool:
    return not isinstance(model, keras.Sequential) and isinstance(model.input, dict)


_scorers: OrderedDict[tuple[Any, ...], Scorer] = OrderedDict()


def scorer_of(token: str, layer: str, *, with_outputs: bool, packed: Callable[[], PackedModel]) -> Scorer:
    """A scorer, loaded once for all tasks that one Python worker runs.

    Args:
        token: Stands for the model: two models never share one.
        layer, with_outputs: See `Scorer`.
        packed: Brings the model; called only where it is not here yet.
    """
    key = (token, layer, with_outputs)
    if key not in _scorers:
        while len(_scorers) >= MODELS_KEPT:
            _scorers.popitem(last=False)
        _scorers[key] = Scorer(packed(), layer, with_outputs=with_outputs)
    _scorers.move_to_end(key)
    return _scorers[key]


def load_uncompiled(packed: PackedModel) -> keras.Model:
    """A packed model without loss, metrics and optimizer, nor need of the user's code for them.

    Lambda layers are allowed: the archive comes from the user's own driver.
    """
    with tempfile.TemporaryDirectory(prefix="allreduce_spark-") as folder, keras_lock:
        path = Path(folder) / "model.keras"
        path.write_bytes(packed.archive)
        return keras.saving.load_model(
            path, custom_objects=cloudpickle.loads(packed.objects), compile=False, safe_mode=False
        )
