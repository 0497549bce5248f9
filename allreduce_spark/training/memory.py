"""What the user's callbacks remember, in a form that can be put into a checkpoint and given back to new ones.

A callback with `get_state()` and `set_state(state)` says itself what that is. Of any other it is the attributes with plain
values that have changed since the fit began: EarlyStopping's `best` and `wait`, ReduceLROnPlateau's `wait`.
Settings are left alone, so a fit may be resumed with others; what is no plain value (a file, a function) each makes again.
The `best_weights` of EarlyStopping are large and the same on every rank, so whoever asks gets them apart from the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from allreduce_spark.errors import ConfigError
from allreduce_spark.training.plain import NotPlain, pack, unpack

__all__ = ["CallbackMemory"]

# Settings that Keras's own callbacks change when training begins, and would change once more: MonitorCallback gives `min_delta`
# its sign together with a function, and CSVLogger's `append` becomes what a resumed fit needs.
_NO_MEMORY = ("params", "min_delta", "append", "append_header")

_Packed = tuple[Any, dict[str, np.ndarray]]  # what `pack` makes: JSON, and the arrays that it names


class CallbackMemory:
    """The memory of the user's callbacks on one rank. Make it before the training begins.

    Args:
        callbacks: Those that run on this rank, by their index in the user's list.
    """

    def __init__(self, callbacks: Mapping[int, keras.callbacks.Callback]) -> None:
        self._callbacks = dict(callbacks)
        self._initial = {index: _copied(_attributes(callback)) for index, callback in callbacks.items()}

    def collect(self, arrays: dict[str, np.ndarray], prefix: str) -> dict[str, Any]:
        """The memory as a JSON value; the arrays in it are added to `arrays`, as they are, under names with this prefix.

        Raises:
            ConfigError: The `get_state` of a callback returns what is no plain data.
        """
        collected: dict[str, Any] = {}
        for index, callback in self._callbacks.items():
            entry: dict[str, Any] = {"class": type(callback).__name__}
            if _speaks_for_itself(callback):
                entry["state"] = _state_of(callback, f"{prefix}/{index}", arrays)
            else:
                entry["attributes"] = {}
                for key, value in _attributes(callback).items():
                    if not _equal(value, self._initial[index].get(key)):
                        entry["attributes"][key], found = value
                        arrays.update({f"{prefix}/{index}/{name}": array for name, array in found.items()})
            collected[str(index)] = entry
        return collected

    def best_weights(self) -> dict[int, list[np.ndarray]]:
        """The weights of the model that an EarlyStopping keeps, by its index."""
        return {
            index: callback.best_weights
            for index, callback in self._callbacks.items()
            if _keeps_weights(callback) and callback.best_weights is not None
        }

    def restore(
        self,
        collected: Mapping[str, Any],
        arrays: Mapping[str, np.ndarray],
        prefix: str,
        best_weights: Mapping[int, Sequence[np.ndarray]],
    ) -> None:
        """Give the callbacks the memory that `collect` found; what had not changed then becomes again what it was at first.

        A callback of another class than was there starts anew: the driver has said so (`checkpoint.fingerprint`).

        Args:
            best_weights: What `best_weights` returned then.
        """
        for index, callback in self._callbacks.items():
            entry = collected.get(str(index))
            if entry is None or entry["class"] != type(callback).__name__:
                continue
            if _keeps_weights(callback):
                kept = best_weights.get(index)
                callback.best_weights = None if kept is None else list(kept)
            if "state" in entry:
                callback.set_state(unpack(entry["state"], arrays))
                continue
            own = {key.removeprefix(f"{prefix}/{index}/"): array for key, array in arrays.items()}
            for key, (packed, initial_arrays) in self._initial[index].items():
                if key in _attributes(callback):
                    setattr(callback, key, unpack(packed, initial_arrays))
            for key, packed in entry["attributes"].items():
                setattr(callback, key, unpack(packed, own))


def _speaks_for_itself(callback: keras.callbacks.Callback) -> bool:
    return callable(getattr(callback, "get_state", None)) and callable(getattr(callback, "set_state", None))


def _keeps_weights(callback: keras.callbacks.Callback) -> bool:
    """Whether it keeps weights that all ranks keep: of what the user has made of EarlyStopping nobody knows."""
    return type(callback) is keras.callbacks.EarlyStopping and not getattr(callback, "root_only", False)


def _state_of(callback: keras.callbacks.Callback, name: str, arrays: dict[str, np.ndarray]) -> Any:
    try:
        return pack(callback.get_state(), name, arrays)
    except NotPlain as error:
        raise ConfigError(
            f"get_state() of the callback {type(callback).__name__} must return numbers, strings, numpy arrays, and lists, "
            f"tuples and dicts of these, but there is something else in it: {error}."
        ) from error


def _attributes(callback: keras.callbacks.Callback) -> dict[str, _Packed]:
    """The attributes with plain values, each packed."""
    found: dict[str, _Packed] = {}
    for name, value in vars(callback).items():
        arrays: dict[str, np.ndarray] = {}
        if name not in _NO_MEMORY and not (name == "best_weights" and _keeps_weights(callback)):
            try:
                found[name] = pack(value, name, arrays), arrays
            except NotPlain:
                pass
    return found


def _copied(attributes: dict[str, _Packed]) -> dict[str, _Packed]:
    return {
        key: (packed, {name: np.array(array) for name, array in arrays.items()})
        for key, (packed, arrays) in attributes.items()
    }


def _equal(one: _Packed, other: _Packed | None) -> bool:
    """Whether two packed values are the same; NaN, as ever, is not."""
    if other is None or one[0] != other[0] or one[1].keys() != other[1].keys():
        return False
    return all(a.dtype == other[1][name].dtype and np.array_equal(a, other[1][name]) for name, a in one[1].items())
