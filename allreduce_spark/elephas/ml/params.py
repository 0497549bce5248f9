"""The Params of `ElephasEstimator` and `ElephasTransformer`: one class each, with accessors that are named as in Elephas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from pyspark.ml.param import Param, Params

__all__ = [
    "HasBatchSize",
    "HasCategoricalLabels",
    "HasCustomObjects",
    "HasEpochs",
    "HasFrequency",
    "HasInferenceBatchSize",
    "HasKerasModelConfig",
    "HasKerasOptimizerConfig",
    "HasLoss",
    "HasMetrics",
    "HasMode",
    "HasNumberOfClasses",
    "HasNumberOfWorkers",
    "HasValidationSplit",
    "HasVerbosity",
]

C = TypeVar("C", bound=type[Params])
_MANDATORY = object()


def _accessors(name: str, stem: str = "", default: Any = _MANDATORY) -> Callable[[C], C]:
    """Class decorator: `set_x` and `get_x` for the Param `name`, where x is `stem` or else the name, and a default."""

    def set_value(self: Params, value: Any) -> Any:
        return self._set(**{name: value})

    def get_value(self: Params) -> Any:
        return self.getOrDefault(name)

    def decorate(cls: C) -> C:
        def initialise(self: Params) -> None:
            super(cls, self).__init__()  # type: ignore[arg-type]  # C is a class
            if default is not _MANDATORY:
                self._setDefault(**{name: default})

        for method, method_name in ((set_value, f"set_{stem or name}"), (get_value, f"get_{stem or name}")):
            method.__name__ = method_name
            setattr(cls, method_name, method)
        cls.__init__ = initialise  # type: ignore[method-assign]
        return cls

    return decorate


def _param(name: str, doc: str) -> Param[Any]:
    return Param(Params._dummy(), name, doc)


@_accessors("keras_model_config")
class HasKerasModelConfig(Params):
    """Mandatory."""

    keras_model_config = _param("keras_model_config", "the Keras model, as model.to_json() returns it")


@_accessors("mode", default="asynchronous")
class HasMode(Params):
    """See `elephas.spark_model` for what the modes mean."""

    mode = _param("mode", "'synchronous', 'asynchronous' or 'hogwild'")


@_accessors("frequency", default="epoch")
class HasFrequency(Params):
    """See `elephas.spark_model` for what the frequencies mean."""

    frequency = _param("frequency", "'epoch' or 'batch', for the asynchronous modes")


@_accessors("nb_classes", default=10)
class HasNumberOfClasses(Params):
    """Used where the labels are categorical."""

    nb_classes = _param("nb_classes", "number of classes")


@_accessors("categorical", "categorical_labels", default=True)
class HasCategoricalLabels(Params):
    """Whether labels are classes."""

    categorical = _param("categorical", "whether labels are class indices, to be turned into one-hot vectors")


@_accessors("epochs", default=10)
class HasEpochs(Params):
    """Passes over the rows."""

    epochs = _param("epochs", "passes over the rows")

    def set_nb_epoch(self, nb_epoch: int) -> Any:
        """`set_epochs`, in Elephas 0.1 to 0.3."""
        return self._set(epochs=nb_epoch)

    def get_nb_epoch(self) -> Any:
        """`get_epochs`, in Elephas 0.1 to 0.3."""
        return self.getOrDefault(self.epochs)


@_accessors("batch_size", default=32)
class HasBatchSize(Params):
    """Rows per worker and step."""

    batch_size = _param("batch_size", "rows per worker and step")


@_accessors("verbose", "verbosity", default=0)
class HasVerbosity(Params):
    """What a fit prints."""

    verbose = _param("verbose", "1 for a progress bar, 2 for a line per epoch, 0 for silence")


@_accessors("validation_split", default=0.1)
class HasValidationSplit(Params):
    """Rows to validate on."""

    validation_split = _param("validation_split", "share of the rows to validate on")


@_accessors("num_workers", default=8)
class HasNumberOfWorkers(Params):
    """How many ranks train together."""

    num_workers = _param("num_workers", "how many ranks train together; at most as many as there are slots")


@_accessors("optimizer_config", default=None)
class HasKerasOptimizerConfig(Params):
    """The optimizer."""

    optimizer_config = _param(
        "optimizer_config", "what keras.optimizers.serialize returns, or a name; None for RMSprop"
    )


@_accessors("metrics", default=["acc"])
class HasMetrics(Params):
    """The metrics."""

    metrics = _param("metrics", "list of metrics, as compile() takes them")


@_accessors("loss")
class HasLoss(Params):
    """Mandatory."""

    loss = _param("loss", "the loss, as compile() takes it")


@_accessors("custom_objects", default={})
class HasCustomObjects(Params):
    """What Keras needs to build the model."""

    custom_objects = _param("custom_objects", "classes and functions, by name, that Keras needs to build the model")


@_accessors("inference_batch_size", default=None)
class HasInferenceBatchSize(Params):
    """Rows per call of the model."""

    inference_batch_size = _param("inference_batch_size", "rows per call of the model in transform; None for a default")
