"""What every rank of a fit is given, as files in its scratch folder: the model, the user's objects, and the settings."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cloudpickle
import keras

from allreduce_spark.config import Checkpoint, FitConfig, Timeouts
from allreduce_spark.errors import ConfigError
from allreduce_spark.training.backends import ours
from allreduce_spark.training.models.model_bytes import load_model, model_and_code
from allreduce_spark.training.settings import KerasSettings

__all__ = ["Job", "check_arrival", "load_job", "make_job", "pickle_objects", "precision_of", "seed_variables"]

log = logging.getLogger(__name__)

_MODEL, _OBJECTS, _SETTINGS = "model.keras", "objects", "settings.json"


@dataclass(frozen=True)
class Job:
    """One fit, as its ranks see it.

    Attributes:
        model: The `.keras` archive; empty once it lies at `model_path`.
        objects: (custom objects, callbacks), by cloudpickle. It comes in the Spark closure, like all of the user's code,
            and never over a socket of ours.
        config, timeouts: The settings.
        seed_states: States of the model's random generators, as `seed_variables` orders them; may be empty.
        trainable: Whether each of the model's weights is trained, in their order; empty for a model that is not built.
        iterations: Steps that the optimizer has taken.
        keras_settings: Those of Keras itself, which loading and training go by.
        precision: Types of the weights and of what is computed with them, as `precision_of` says it; likewise empty.
        checkpoint: How often the state is saved; None where it is not.
        model_path: Where the archive lies, on the rank's side.
    """

    model: bytes
    objects: bytes
    config: FitConfig
    timeouts: Timeouts
    seed_states: list[list[int]]
    trainable: list[bool]
    iterations: int
    keras_settings: KerasSettings
    precision: list[str]
    checkpoint: Checkpoint | None = None
    model_path: Path = Path(_MODEL)

    def files(self) -> dict[str, bytes]:
        """File name -> content, for the agent to lay down."""
        settings = {
            "config": self.config.to_json(),
            "timeouts": dataclasses.asdict(self.timeouts),
            "seed_states": self.seed_states,
            "trainable": self.trainable,
            "iterations": self.iterations,
            "keras_settings": dataclasses.asdict(self.keras_settings),
            "precision": self.precision,
            "checkpoint": None if self.checkpoint is None else self.checkpoint.to_json(),
        }
        return {_MODEL: self.model, _OBJECTS: self.objects, _SETTINGS: json.dumps(settings).encode()}

    @classmethod
    def read(cls, folder: Path) -> Job:
        settings = json.loads((folder / _SETTINGS).read_bytes())
        return cls(
            model=b"",
            objects=(folder / _OBJECTS).read_bytes(),
            config=FitConfig.from_json(settings["config"]),
            timeouts=Timeouts(**settings["timeouts"]),
            seed_states=settings["seed_states"],
            trainable=settings["trainable"],
            iterations=settings["iterations"],
            keras_settings=KerasSettings(**settings["keras_settings"]),
            precision=settings["precision"],
            checkpoint=None if settings["checkpoint"] is None else Checkpoint.from_json(settings["checkpoint"]),
            model_path=folder / _MODEL,
        )


def make_job(
    model: keras.Model,
    custom_objects: Mapping[str, Any],
    callbacks: Sequence[keras.callbacks.Callback],
    config: FitConfig,
    timeouts: Timeouts,
    checkpoint: Checkpoint | None = None,
) -> Job:
    """Pack a fit.

    Raises:
        ConfigError: The model, a custom object or a callback cannot be sent to another machine.
    """
    if model.jit_compile and not ours.COMPILES_CALLS:
        log.info("the ranks train without jit_compile: compiled code would know no way out to the other ranks")
    seeds = [variable.numpy().tolist() for variable in seed_variables(model)]
    archive, code = model_and_code(model, custom_objects)
    objects = pickle_objects((code, [_unbound(c) for c in callbacks]))
    trainable = [bool(weight.trainable) for weight in model.weights]
    iterations, precision = int(model.optimizer.iterations.numpy()), precision_of(model)
    settings = KerasSettings.of(model)
    return Job(archive, objects, config, timeouts, seeds, trainable, iterations, settings, precision, checkpoint)


def load_job(job: Job) -> tuple[keras.Model, list[keras.callbacks.Callback]]:
    """The model, compiled, and the callbacks, from where the job was read. Keras's settings are the driver's from here on.

    Raises:
        ConfigError: Keras cannot load the model here.
    """
    job.keras_settings.set()
    custom_objects, callbacks = cloudpickle.loads(job.objects)
    return load_model(job.model_path, custom_objects), callbacks


def check_arrival(model: keras.Model, job: Job) -> None:
    """Make sure that the model that was loaded trains the weights that the user's trains, from where it had come.

    Raises:
        ConfigError: It does not. Keras's archive keeps `trainable` only where a layer's config has it, and where other
            weights are trained it drops the optimizer's state.
    """
    different = [w.path for w, flag in zip(model.weights, job.trainable, strict=False) if bool(w.trainable) != flag]
    if different:
        raise ConfigError(
            f"`trainable` of {different[:5]} was set after the model was made, and its class does not save that, so the "
            "ranks would train other weights. Set it in the constructor of the model, or use a functional model."
        )
    other = [
        f"{weight.path} ({here}, there {there})"
        for weight, here, there in zip(model.weights, precision_of(model), job.precision, strict=False)
        if here != there
    ]
    if other:
        raise ConfigError(
            f"layers arrived on the executors with other types than they have on the driver: {'; '.join(other[:3])}. They were "
            f"made under another policy than that of the model, {model.dtype_policy.name!r}: set one for all with "
            "keras.config.set_dtype_policy before the model is made, or give these layers theirs as dtype=..."
        )
    iterations = int(model.optimizer.iterations.numpy())
    if iterations != job.iterations:
        raise ConfigError(
            f"the optimizer has taken {job.iterations} steps, but arrived on the executors with {iterations}: Keras could "
            "not restore its state. Compile the model again to start with a new state."
        )


def precision_of(model: keras.Model) -> list[str]:
    """Of each of the model's weights, in their order: its type, and the policy of its layer."""
    policies = {
        id(weight): layer.dtype_policy.name
        for layer in model._flatten_layers()
        for weight in (*layer._trainable_variables, *layer._non_trainable_variables)
    }
    return [f"{weight.dtype} in {policies.get(id(weight), model.dtype_policy.name)}" for weight in model.weights]


def pickle_objects(objects: Any) -> bytes:
    """The user's own code and objects, for the Spark closure.

    Raises:
        ConfigError: They hold something that lives on this machine only: a lock, a file, a Spark session.
    """
    try:
        return cloudpickle.dumps(objects)
    except Exception as error:  # pickling runs the user's code, so anything can come
        raise ConfigError(
            f"{_unsendable(objects)!r} cannot be sent to the executors: {type(error).__name__}: {error}. It holds something "
            "that exists on the driver only, such as an open file, a lock or a Spark session."
        ) from error


def _unsendable(objects: Any) -> Any:
    """The first of the user's objects that cannot be pickled."""
    for part in keras.tree.flatten(objects):
        try:
            cloudpickle.dumps(part)
        except Exception:  # noqa: BLE001 - as above
            return part
    return objects


def seed_variables(model: keras.Model) -> list[keras.Variable]:
    """The states of the model's random generators (dropout, noise, augmentation), in an order that is the same everywhere."""
    weights = {id(variable) for variable in model.weights}
    return [variable for variable in model.variables if id(variable) not in weights]


def _unbound(callback: keras.callbacks.Callback) -> keras.callbacks.Callback:
    """A copy without the model of an earlier fit, which would travel along."""
    unbound = copy.copy(callback)
    unbound._model = None
    return unbound
