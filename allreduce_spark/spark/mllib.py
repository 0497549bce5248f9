"""`SparkMLlibModel`: a `SparkModel` for what pyspark.mllib holds, LabeledPoints, vectors and matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from pyspark import RDD
from pyspark.ml.linalg import Matrix as NewMatrix
from pyspark.ml.linalg import Vector as NewVector
from pyspark.mllib.linalg import Matrix, Vector
from pyspark.mllib.regression import LabeledPoint

from allreduce_spark.config import FitConfig
from allreduce_spark.data.spec import LeafSpec, RowSpec
from allreduce_spark.errors import ConfigError, DataError
from allreduce_spark.spark.adapters import from_matrix, from_vector, lp_to_simple_rdd
from allreduce_spark.spark.adapters.labels import check_num_classes
from allreduce_spark.spark.adapters.pairs import pairs_of_points
from allreduce_spark.spark.model import SparkModel
from allreduce_spark.training.checks import check_inputs
from allreduce_spark.training.models.heads import takes_indices

if TYPE_CHECKING:
    import keras

__all__ = ["SparkMLlibModel"]


class SparkMLlibModel(SparkModel):
    """A compiled Keras model that is trained on an RDD of LabeledPoints.

    Constructor, `save` and `load` are those of `SparkModel`. The model has one input, a vector, and one output.

    Example:
        >>> points = to_labeled_point(sc, x, classes)                       # doctest: +SKIP
        >>> mllib_model = SparkMLlibModel(model, num_ranks=2)               # doctest: +SKIP
        >>> history = mllib_model.fit(points, categorical=True, epochs=5)   # doctest: +SKIP
        >>> mllib_model.predict(Vectors.dense(x[0])).argmax()               # doctest: +SKIP
        2
    """

    def fit(  # type: ignore[override]  # LabeledPoints instead of any data
        self,
        labeled_points: RDD[LabeledPoint],
        *,
        categorical: bool = False,
        num_classes: int | None = None,
        validation_data: Any = None,
        **settings: Any,
    ) -> keras.callbacks.History:
        """Train the model.

        Args:
            labeled_points: Dense or sparse, with vectors of one length.
            categorical: Whether the labels are classes that the loss wants as one-hot vectors (categorical_crossentropy).
            num_classes: How many classes there are. None takes the width of the model's output, and where the model is not
                built yet the largest label + 1. Labels that are no class are refused where `categorical` is set or the
                loss is sparse_categorical_crossentropy.
            validation_data: LabeledPoints, too, or any other form that `SparkModel.fit` takes.
            **settings: All other keyword arguments of `SparkModel.fit`, with the same meaning: epochs, batch_size, verbose,
                callbacks, validation_split, shuffle, class_weight, seed, ...

        Returns:
            As `SparkModel.fit`.

        Raises:
            DataError: The data is no RDD of LabeledPoints, a vector does not fit the model, or a label is NaN or no class.
                No rank has started.
            ConfigError: num_classes does not fit the model. All else is as in `SparkModel.fit`.
        """
        pairs = self._pairs(labeled_points, categorical, num_classes)
        if isinstance(validation_data, RDD):
            validation_data = self._pairs(validation_data, categorical, num_classes)
        return super().fit(pairs, validation_data=validation_data, **settings)

    def evaluate(  # type: ignore[override]
        self,
        labeled_points: RDD[LabeledPoint],
        *,
        categorical: bool = False,
        num_classes: int | None = None,
        batch_size: int = 32,
        **settings: Any,
    ) -> dict[str, Any]:
        """Loss and metrics over all rows, as `SparkModel.evaluate`; `categorical` and `num_classes` are those of `fit`."""
        pairs = self._pairs(labeled_points, categorical, num_classes)
        return super().evaluate(pairs, batch_size=batch_size, **settings)

    def predict(self, data: Any, *, batch_size: int = 32, **settings: Any) -> Any:
        """The model's predictions.

        Args:
            data: A vector or a matrix (one row of features per row) of pyspark.mllib or pyspark.ml, dense or sparse; those
                are computed here on the driver. Or an RDD of such vectors or of LabeledPoints, whose labels are not looked
                at, in one Spark job. All else goes to `SparkModel.predict`.
            batch_size: Rows per batch.
            **settings: All other keyword arguments of `SparkModel.predict`.

        Returns:
            Of a vector the outputs of that row, an array of shape (...); else an array of shape (rows, ...), in the order of
            the rows. Of a model with several outputs the same in their structure.

        Raises:
            DataError: A vector does not fit the model, or an RDD holds something else.
            ConfigError: The model has no weights yet.
        """
        if isinstance(data, (Vector, NewVector)):
            outputs = self._predict_here(from_vector(data)[np.newaxis], batch_size)
            return _map_arrays(lambda array: array[0], outputs)
        if isinstance(data, (Matrix, NewMatrix)):
            return self._predict_here(from_matrix(data), batch_size)
        if isinstance(data, RDD):
            data = data.mapPartitionsWithIndex(_vectors)
        return super().predict(data, batch_size=batch_size, **settings)

    def _predict_here(self, rows: np.ndarray, batch_size: int) -> Any:
        """Predictions of rows of shape (rows, length), without Spark."""
        FitConfig(batch_size=batch_size)  # checks it
        if not self.model.built:
            raise ConfigError("the model has no weights yet: fit it first, or build it with keras.Input.")
        if len(rows) == 0:
            raise DataError("the matrix has no rows")
        check_inputs(self.model, RowSpec(LeafSpec("x", rows.dtype.name, rows.shape[1:])))
        return self.model.predict(rows, batch_size=batch_size, verbose=0)

    def _pairs(self, points: Any, categorical: bool, num_classes: int | None) -> RDD[tuple[np.ndarray, Any]]:
        """Pairs (x, y) for this model; labels that are classes are checked as they are read."""
        check_num_classes(num_classes)
        width = _output_width(self.model)
        are_classes = categorical or takes_indices(self.model.loss)
        if num_classes is not None and width is not None and num_classes != width and are_classes:
            raise ConfigError(f"num_classes is {num_classes}, but the output of the model has the width {width}.")
        classes = num_classes or width
        if categorical:
            return lp_to_simple_rdd(points, categorical=True, num_classes=classes)
        return pairs_of_points(points, classes if are_classes else None)


def _vectors(partition: int, rows: Iterable[Any]) -> Iterator[np.ndarray]:
    for row, value in enumerate(rows):
        vector = value.features if isinstance(value, LabeledPoint) else value
        if not isinstance(vector, (Vector, NewVector)):
            raise DataError(
                f"in row {row} of partition {partition}, there is a {type(value)}; expected a vector of pyspark.mllib.linalg "
                "or pyspark.ml.linalg, or a LabeledPoint"
            )
        yield vector.toArray()


def _output_width(model: keras.Model) -> int | None:
    """The last dimension of the only output; None where the model is not built, or has several."""
    outputs = getattr(model, "outputs", None) or []
    return outputs[0].shape[-1] if len(outputs) == 1 and len(outputs[0].shape) > 1 else None


def _map_arrays(function: Callable[[np.ndarray], Any], outputs: Any) -> Any:
    if isinstance(outputs, dict):
        return {name: _map_arrays(function, output) for name, output in outputs.items()}
    if isinstance(outputs, (list, tuple)):
        return type(outputs)(_map_arrays(function, output) for output in outputs)
    return function(outputs)
