"""Keras model <-> bytes, and the trained state back: Keras's own `.keras` archive one way, safetensors the other. No pickle.

Custom classes and functions (layers, losses, metrics, optimizers) are referred to by name in the archive. The code behind
the names travels beside it: `model_and_code` gives both.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import tempfile
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from allreduce_spark.errors import ConfigError

__all__ = [
    "compile_arguments",
    "custom_objects_of",
    "keras_lock",
    "load_model",
    "load_state",
    "model_and_code",
    "model_from_bytes",
    "model_to_bytes",
    "numpy_dtype",
    "read_about",
    "save_keras",
    "save_state",
]

# Keras saves and loads through state that all threads share; fits may run at once (`CrossValidator(parallelism=2)`).
keras_lock = threading.RLock()


def model_and_code(model: keras.Model, custom_objects: Mapping[str, Any] | None = None) -> tuple[bytes, dict[str, Any]]:
    """What `load_model` needs elsewhere: the archive, and the code by the names that the archive holds.

    Args:
        custom_objects: More code by name, or other code than the model itself shows.

    Raises:
        ConfigError: As `model_to_bytes` and `custom_objects_of`.
    """
    archive = model_to_bytes(model)
    return archive, {**_registered_code(archive), **custom_objects_of(model), **(custom_objects or {})}


def model_to_bytes(model: keras.Model) -> bytes:
    """The model with weights, compile settings and optimizer state, as a `.keras` archive.

    Raises:
        ConfigError: Keras cannot save the model; the message is Keras's own.
    """
    with tempfile.TemporaryDirectory(prefix="allreduce_spark-") as folder:
        path = Path(folder) / "model.keras"
        try:
            save_keras(model, path)
        except Exception as error:
            raise ConfigError(
                f"Keras cannot save the model {model.name!r}, so it cannot be sent to the ranks: {error}. Custom layers and "
                "models need a get_config method (see keras.saving)."
            ) from error
        return path.read_bytes()


def save_keras(model: keras.Model, path: Path) -> None:
    """`model.save`, from any thread. What Keras raises passes through."""
    with keras_lock, _whole_configs(model), warnings.catch_warnings():
        # Unbuilt models are fine: whoever loads them builds them from the data.
        warnings.filterwarnings("ignore", message=".*not yet been built.*")
        _put_in_optimizer(model)
        if model.compiled and model.built and model.optimizer is not None and not model.optimizer.built:
            # As the first step would: whoever loads the model would else miss its state, with a warning.
            model.optimizer.build(model.trainable_variables)
        model.save(path)
        _put_in_optimizer(model)


def _put_in_optimizer(model: keras.Model) -> None:
    """Let the archive have the optimizer that the model has, and whoever loads it put none around it.

    What `compile` was given may be another one: with the policy mixed_float16 Keras puts a `LossScaleOptimizer` around it, if
    `auto_scale_loss` does not forbid that, which the archive forgets. And saving as .h5 takes it out altogether.
    """
    if model.compiled:
        arguments = compile_arguments(model)
        arguments["optimizer"] = model.optimizer
        if model.dtype_policy.name == "mixed_float16" and not _scales_loss(model.optimizer):
            arguments["auto_scale_loss"] = False


def _scales_loss(optimizer: keras.optimizers.Optimizer | None) -> bool:
    return optimizer is None or isinstance(optimizer, keras.optimizers.LossScaleOptimizer)


@contextlib.contextmanager
def _whole_configs(model: keras.Model) -> Iterator[None]:
    """Mend what Keras forgets in `get_config`: `Huber(delta=0.5)` would come back with delta 1, a cosine without its axis."""
    mended = []
    for part in _parts_of_compile(model):
        forgotten = _forgotten_settings(part)
        if forgotten and "get_config" not in vars(part):
            part.get_config = partial(_merged, part.get_config, forgotten)
            mended.append(part)
    try:
        yield
    finally:
        for part in mended:
            del part.get_config


def _forgotten_settings(part: Any) -> dict[str, Any]:
    """The arguments of a loss or metric of Keras's that its config does not hold, though its constructor takes them."""
    if not _is_builtin(type(part)) or not getattr(part, "_fn_kwargs", None):
        return {}
    config, taken = part.get_config(), inspect.signature(type(part).__init__).parameters
    return {name: value for name, value in part._fn_kwargs.items() if name in taken and name not in config}


def _merged(get_config: Callable[[], dict[str, Any]], more: Mapping[str, Any]) -> dict[str, Any]:
    return {**get_config(), **more}


def load_model(path: Path, custom_objects: Mapping[str, Any]) -> keras.Model:
    """Load what `model_to_bytes` made, compiled.

    Lambda layers are allowed: the bytes come from the user's own driver, over the same way as the user's own code.

    Raises:
        ConfigError: Keras cannot load the model, or cannot compile it as it was.
    """
    try:
        with keras_lock, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = keras.saving.load_model(path, custom_objects=dict(custom_objects), compile=True, safe_mode=False)
    except Exception as error:
        raise ConfigError(
            f"the model cannot be loaded on the executors: {type(error).__name__}: {error}. Register custom classes and "
            "functions with @keras.saving.register_keras_serializable(), or pass custom_objects to SparkModel."
        ) from error
    if not model.compiled:
        reasons = "; ".join(str(warning.message) for warning in caught) or "no reason given"
        raise ConfigError(f"the model arrived on the executors without its compile settings: {reasons}")
    return model


def model_from_bytes(archive: bytes, custom_objects: Mapping[str, Any]) -> keras.Model:
    """Load what `model_to_bytes` returned, compiled.

    Raises:
        ConfigError: As `load_model`.
    """
    with tempfile.TemporaryDirectory(prefix="allreduce_spark-") as folder:
        path = Path(folder) / "model.keras"
        path.write_bytes(archive)
        return load_model(path, custom_objects)


def _registered_code(archive: bytes) -> dict[str, Any]:
    """What is registered with Keras in this process and may be asked for: all that the archive names or the script defines.

    Not the whole register: it also holds what any imported package has put there, which executors need not have.
    """
    with zipfile.ZipFile(io.BytesIO(archive)) as file:
        config = file.read("config.json").decode()
    registered = keras.saving.get_custom_objects().items()
    return {name: code for name, code in registered if json.dumps(name) in config or _module_of(code) == "__main__"}


def custom_objects_of(model: keras.Model) -> dict[str, Any]:
    """The classes and functions, by name, that are seen in the model and its compile settings, and that are not Keras's own.

    Raises:
        ConfigError: Two of them have one name.
    """
    found: dict[str, Any] = {}
    for code in map(_code_of, _parts_of_compile(model)):
        if not _is_builtin(code) and found.setdefault(code.__name__, code) != code:
            raise ConfigError(
                f"the model was compiled with two different things that are both called {code.__name__!r} (defined in "
                f"{code.__module__}). Keras finds them again by name, so one would be taken for the other: rename one."
            )
    for code in map(_code_of, _parts_of_layers(model)):
        if not _is_builtin(code):
            found.setdefault(code.__name__, code)
    return found


def _code_of(used: Any) -> Any:
    """The function or class that Keras will look for by name."""
    return used if callable(used) and hasattr(used, "__name__") and not isinstance(used, keras.Layer) else type(used)


def _parts_of_layers(model: keras.Model) -> Iterator[Any]:
    for layer in model._flatten_layers():
        yield layer
        yield from (value for value in vars(layer).values() if _may_be_custom(value))


def _parts_of_compile(model: keras.Model) -> Iterator[Any]:
    """Loss, metrics and optimizer, with the functions and schedules in them; nothing of a model that is not compiled."""
    if not model.compiled:
        return
    compiled = compile_arguments(model)
    parts = [model.optimizer, *(compiled.get(key) for key in ("loss", "metrics", "weighted_metrics"))]
    yield from (part for part in keras.tree.flatten(parts) if part is not None and not isinstance(part, str))
    inner = getattr(model.optimizer, "inner_optimizer", None)
    schedule = getattr(inner or model.optimizer, "_learning_rate", None)
    yield from (part for part in (inner, schedule) if part is not None)
    for part in keras.tree.flatten(parts):
        yield from (value for value in (getattr(part, "fn", None), getattr(part, "_fn", None)) if callable(value))


def compile_arguments(model: keras.Model) -> dict[str, Any]:
    """What the model was compiled with, as it was given; empty where it is not compiled."""
    compiled = getattr(model, "_compile_config", None)
    return compiled.config if compiled is not None else {}


def _may_be_custom(value: object) -> bool:
    keras_parts = (keras.initializers.Initializer, keras.regularizers.Regularizer, keras.constraints.Constraint)
    return isinstance(value, keras_parts) or (callable(value) and hasattr(value, "__name__") and not _is_builtin(value))


def _is_builtin(code: Any) -> bool:
    package = _module_of(code).split(".")[0]
    return package in ("keras", "tensorflow", "builtins", "numpy", "ml_dtypes") or code.__name__ == "<lambda>"


def _module_of(code: Any) -> str:
    return getattr(code, "__module__", None) or "builtins"


def save_state(model: keras.Model, path: Path, about: Mapping[str, Any]) -> None:
    """Write all variables of model and optimizer, and `about` as JSON, to a safetensors file."""
    arrays, dtypes = {}, {}
    for name, variable in _named_variables(model):
        array = np.asarray(variable.numpy())  # a number where the variable is a scalar
        dtypes[name] = variable.dtype
        # Types of which safetensors' numpy side knows nothing (bfloat16, float8) travel as the bytes they are.
        arrays[name] = array if array.dtype.kind in "fiub" else array.view(np.dtype(f"u{array.dtype.itemsize}"))
    save_file(arrays, path, metadata={"about": json.dumps(dict(about)), "dtypes": json.dumps(dtypes)})


def read_about(path: Path) -> dict[str, Any]:
    """What `save_state` was given as `about`."""
    with safe_open(path, framework="numpy") as file:
        return dict(json.loads(file.metadata()["about"]))


def load_state(model: keras.Model, path: Path) -> None:
    """Assign what `save_state` wrote to the variables of `model` and its optimizer, which must be built.

    Raises:
        ConfigError: The file belongs to a model with other variables.
    """
    with safe_open(path, framework="numpy") as file:
        dtypes = json.loads(file.metadata()["dtypes"])
        variables = dict(_named_variables(model))
        if list(variables) != list(dtypes):
            missing, surplus = sorted(set(dtypes) - set(variables)), sorted(set(variables) - set(dtypes))
            raise ConfigError(f"the trained state is of another model: it lacks {surplus} and has {missing} beside")
        for name, variable in variables.items():
            array = file.get_tensor(name)
            if array.dtype.name != dtypes[name]:
                array = array.view(numpy_dtype(dtypes[name]))
            if tuple(variable.shape) != array.shape:
                raise ConfigError(
                    f"{variable.path} has shape {tuple(variable.shape)}, but was trained as {array.shape}"
                )
            variable.assign(array)


def _named_variables(model: keras.Model) -> Iterator[tuple[str, keras.Variable]]:
    # By position: paths need not be unique, and the same model code makes variables in the same order.
    for index, variable in enumerate(model.variables):
        yield f"model/{index:05d}", variable
    for index, variable in enumerate(model.optimizer.variables):
        yield f"optimizer/{index:05d}", variable


def numpy_dtype(name: str) -> np.dtype:
    """A type by its name, bfloat16 and the like among them."""
    import ml_dtypes

    return np.dtype(getattr(ml_dtypes, name)) if hasattr(ml_dtypes, name) else np.dtype(name)
