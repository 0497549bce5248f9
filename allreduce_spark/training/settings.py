"""Keras's settings of a process, on their way to another: the types of layers that name none, the place of channels."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import keras
from keras.src.backend.common.global_state import get_global_attribute, set_global_attribute

__all__ = ["KerasSettings"]

_POLICY = "dtype_policy"  # Keras keeps it for each thread, and the others for all


@dataclass(frozen=True)
class KerasSettings:
    """What `keras.config` says. Losses, metrics, batches and the code of layers go by it; no archive of a model holds it.

    Attributes:
        floatx, epsilon, image_data_format: As `keras.config` names them.
        policy: That of dtypes, as `keras.dtype_policies` serializes it; None for that which is named like `floatx`.
    """

    floatx: str
    epsilon: float
    image_data_format: str
    policy: dict[str, Any] | None

    @classmethod
    def here(cls) -> KerasSettings:
        """Those of this thread."""
        return cls._with(get_global_attribute(_POLICY))

    @classmethod
    def of(cls, model: keras.Model) -> KerasSettings:
        """Those to load a model with: its layers were made where there was its own policy, in another thread perhaps."""
        return cls._with(model.dtype_policy)

    @classmethod
    def _with(cls, policy: keras.DTypePolicy | None) -> KerasSettings:
        config = keras.config
        serialized = None if policy is None else keras.dtype_policies.serialize(policy)
        return cls(config.floatx(), config.epsilon(), config.image_data_format(), serialized)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> KerasSettings:
        return cls(**json.loads(text))

    def set(self) -> None:
        """Make them those of this process; the policy that of this thread."""
        keras.config.set_floatx(self.floatx)
        keras.config.set_epsilon(self.epsilon)
        keras.config.set_image_data_format(self.image_data_format)
        set_global_attribute(_POLICY, None if self.policy is None else keras.dtype_policies.deserialize(self.policy))

    @contextlib.contextmanager
    def in_force(self) -> Iterator[None]:
        """Set them for a while: Spark uses a Python worker again, and what comes next may be another application's."""
        before = KerasSettings.here()
        self.set()
        try:
            yield
        finally:
            before.set()
