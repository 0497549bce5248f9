"""Several trained models as one: an ensemble is a Keras model like any other, to save, to evaluate and to predict with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import keras

from allreduce_spark.errors import ConfigError
from allreduce_spark.training.models.model_bytes import custom_objects_of

__all__ = ["Method", "ensemble_of"]

Method = Literal["average", "vote"]


def ensemble_of(models: Sequence[keras.Model], method: Method = "average") -> keras.Model:
    """Make one model of several that take the same inputs and give the same outputs, compiled like the first of them.

    Each output is combined by itself. All layers are Keras's own, so that a saved ensemble loads where this library is not.

    A vote of `method="vote"` is for the class that a member finds most probable, the first of those that are equally so; of an
    output with a single unit, the probability of class 1 of two, it is for that class where it is above 0.5. The prediction of
    the ensemble is each class's share of the votes, so a tie stays visible as equal shares. Who takes the `argmax` of them, as
    Keras's accuracy does, decides for the lowest of the classes; a share of 0.5 of a single unit is not above 0.5 either,
    which is class 0. Votes have no gradient: such an ensemble cannot learn any more.

    Args:
        models: Built and compiled, functional or Sequential, best first. The ensemble shares their weights; they stay as
            they are otherwise.
        method: "average" for the mean of their predictions, "vote" for the shares of their votes, which is for classifiers.

    Raises:
        ConfigError: There is no model among them, or their inputs or outputs differ, or they give nothing to vote with.
    """
    if method not in get_args(Method):
        raise ConfigError(f"method must be 'average' or 'vote', got {method!r}.")
    _check_members(models)
    if method == "vote":
        _check_voters(models)
    best = models[0]
    inputs = keras.tree.map_structure(
        lambda tensor: keras.Input(batch_shape=tensor.shape, dtype=tensor.dtype, name=tensor.name), _ends(best)[0]
    )
    # Uncompiled, or each would take its optimizer's state along; and named anew, because the names of layers must differ.
    members = [keras.Model(*_ends(model), name=f"member_{number}") for number, model in enumerate(models)]
    outputs = keras.tree.map_structure(
        lambda output, *predictions: _combine(predictions, method, _layer_of(output).name),
        _ends(best)[1],
        *(member(inputs) for member in members),
    )
    ensemble = keras.Model(inputs, outputs, name="ensemble")
    with keras.saving.custom_object_scope(custom_objects_of(best)):
        ensemble.compile_from_config(best.get_compile_config())
    ensemble.optimizer.build(ensemble.trainable_variables)  # or its state would be missing where the ensemble is saved
    return ensemble


def _combine(predictions: Sequence[Any], method: Method, name: str) -> Any:
    """Combine the predictions for one output, in a layer with the name that the losses and metrics know it by."""
    if method == "vote":
        predictions = [_vote(prediction) for prediction in predictions]
    if len(predictions) == 1:
        return keras.layers.Identity(name=name)(predictions[0])
    return keras.layers.Average(name=name)(list(predictions))


def _vote(prediction: Any) -> Any:
    """Probabilities of shape (..., classes) -> 1 for the class that is voted for, 0 for the others; the same shape."""
    classes = prediction.shape[-1]
    if classes == 1:
        return keras.ops.cast(keras.ops.greater(prediction, 0.5), prediction.dtype)
    return keras.ops.one_hot(keras.ops.argmax(prediction, axis=-1), classes, dtype=prediction.dtype)


def _check_members(models: Sequence[keras.Model]) -> None:
    if not models:
        raise ConfigError("an ensemble needs at least one model, got none.")
    if len(set(map(id, models))) < len(models):
        raise ConfigError("a model is twice among the members of the ensemble: it would count twice.")
    for model in models:
        if not isinstance(model, keras.Model) or not getattr(model, "inputs", None) or not model.compiled:
            raise ConfigError(
                f"{model!r} cannot be a member of an ensemble: it takes compiled functional or Sequential models that are "
                "built, because only they know their inputs."
            )
        for end, first, other in zip(("inputs", "outputs"), _ends(models[0]), _ends(model), strict=True):
            if _kind(first) != _kind(other):
                raise ConfigError(f"the {end} of the members of an ensemble differ: {_kind(first)} and {_kind(other)}.")


def _ends(model: keras.Model) -> tuple[Any, Any]:
    """(inputs, outputs): symbolic tensors, in the structure of the model's arguments and of its results."""
    if isinstance(model, keras.Sequential):
        return model.inputs[0], model.outputs[0]
    return model.input, model.output


def _layer_of(output: Any) -> Any:
    return output._keras_history.operation


def _kind(tensors: Any) -> Any:
    return keras.tree.map_structure(lambda tensor: f"{tensor.dtype}{tuple(tensor.shape)}", tensors)


def _check_voters(models: Sequence[keras.Model]) -> None:
    for model in models:
        for output in model.outputs:
            layer = _layer_of(output)
            if output.shape[-1] == 1 and getattr(layer, "activation", None) is keras.activations.linear:
                raise ConfigError(
                    f"the output {layer.name!r} is a single linear unit: that is no probability to vote with. Use "
                    "method='average', or give the model a sigmoid at its end."
                )
