"""`SparkModel` and its kin as Elephas has them, over `allreduce_spark.SparkModel`.

Without a parameter server, Elephas's modes mean this, and what a word stands for is exact, not approximate:

    synchronous                      one step of all ranks together after every batch, as one process would train
    asynchronous, hogwild: "batch"   the same: no rank ever computes on weights that are out of date
    asynchronous, hogwild: "epoch"   every rank takes steps of its own for an epoch; then weights and optimizer state are
                                     averaged over the ranks (`sync_every="epoch"`)

`batch_size` counts rows per worker, as in Elephas. More workers than the application has slots would wait for each other for
ever in a barrier stage: then there are as many ranks as slots, and a warning says so.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pyspark import RDD
from pyspark.mllib.linalg import Matrix, Vector
from pyspark.mllib.regression import LabeledPoint

from allreduce_spark.elephas.cluster import ranks_for
from allreduce_spark.elephas.enums.frequency import Frequency
from allreduce_spark.elephas.enums.modes import Mode
from allreduce_spark.elephas.eras import read_arguments, sync_every_of
from allreduce_spark.elephas.gone import Gone, tell_about_modes, tell_about_optimizers
from allreduce_spark.elephas.parts import parts_of, split, split_one, split_pair
from allreduce_spark.elephas.utils.serialization import model_to_dict
from allreduce_spark.errors import ConfigError
from allreduce_spark.spark import mllib
from allreduce_spark.spark import model as native
from allreduce_spark.spark.adapters import to_matrix, to_vector
from allreduce_spark.spark.cluster import active_context
from allreduce_spark.spark.files import load_model_at
from allreduce_spark.spark.hadoop import fetch_hadoop_file, put_hadoop_file
from allreduce_spark.training.checks import check_model

if TYPE_CHECKING:
    import keras
    from typing_extensions import Self

__all__ = [
    "AsynchronousSparkModel",
    "SparkHFModel",
    "SparkMLlibModel",
    "SparkModel",
    "load_spark_model",
    "save_and_zip_model",
]


class SparkModel(native.SparkModel):
    """A compiled Keras model that is trained on an RDD of pairs (x, y).

    Args:
        model: Compiled.
        num_workers: How many ranks train together; None for as many as there are slots.
        custom_objects: Classes and functions, by name, that Keras needs to load the model.
        batch_size: Rows per rank per step, where `fit` is not told.
        *args, **kwargs: The arguments of older versions, `mode` and `frequency` among them: see `eras.py`. What is not
            known is kept, and written into files.

    Raises:
        ConfigError: The model is not compiled, or a word is none of Elephas's.
    """

    _asynchronous = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        arguments = read_arguments(args, kwargs, asynchronous=self._asynchronous)
        if not getattr(arguments.model, "compiled", True):
            raise ConfigError("Compile your Keras model before initializing an Elephas model with it")
        super().__init__(arguments.model, custom_objects=arguments.custom_objects)
        self.num_workers, self.batch_size = arguments.num_workers, arguments.batch_size
        self.mode, self.frequency = arguments.mode, arguments.frequency
        self.custom_objects, self.kwargs = arguments.custom_objects, arguments.recorded
        self.training_histories: list[dict[str, Any]] = []
        if arguments.optimizer is not None:
            tell_about_optimizers()

    @property
    def master_network(self) -> keras.Model:
        """The Keras model, with the weights and the optimizer state of the last fit."""
        return self.model

    @master_network.setter
    def master_network(self, network: keras.Model) -> None:
        self.model = check_model(network)

    @property
    def weights(self) -> list[np.ndarray]:
        """The weights of the Keras model."""
        return list(self.model.get_weights())

    @property
    def serialized_model(self) -> dict[str, Any]:
        """The Keras model as `utils.serialization.model_to_dict` gives it."""
        return model_to_dict(self.model)

    @property
    def master_optimizer(self) -> keras.optimizers.Optimizer:
        """The optimizer that the model was compiled with."""
        return self.model.optimizer

    @property
    def master_loss(self) -> Any:
        """The loss that the model was compiled with."""
        return self.model.loss

    @property
    def master_metrics(self) -> list[Any]:
        """The metrics that the model was compiled with."""
        compiled = self.model._compile_metrics
        return list(compiled._user_metrics or []) if compiled is not None else []

    def get_network(self) -> keras.Model:
        """`master_network`."""
        return self.model

    def set_network(self, network: keras.Model) -> None:
        """Set `master_network`."""
        self.master_network = network

    def get_config(self) -> dict[str, Any]:
        """What is written into files beside the model."""
        return {"num_workers": self.num_workers, "batch_size": self.batch_size, **self.kwargs}

    def fit(self, rdd: Any, **kwargs: Any) -> keras.callbacks.History:  # type: ignore[override]  # it is Elephas's
        """Train the model.

        Args:
            rdd: Pairs (x, y) for single rows; or any other data of `allreduce_spark.SparkModel.fit`. Where the model has
                several inputs (outputs) and x (y) is one array, it is cut into equal parts along its first axis.
            **kwargs: Those of `allreduce_spark.SparkModel.fit`, with Keras's meanings; `nb_epoch` is `epochs`.

        Returns:
            The history, which is also appended to `training_histories`.
        """
        self.num_ranks = ranks_for(self.num_workers or None, self.timeouts)
        self.sync_every = sync_every_of(Mode(self.mode), Frequency(self.frequency))
        if self.mode != Mode.SYNCHRONOUS:
            tell_about_modes()
        if "nb_epoch" in kwargs:
            kwargs["epochs"] = kwargs.pop("nb_epoch")
        parts = parts_of(self.model)
        if isinstance(rdd, RDD) and max(parts) > 1:
            rdd = rdd.map(partial(split_pair, *parts))
        history = super().fit(rdd, **{"batch_size": self.batch_size, **kwargs})
        self.training_histories.append(history.history)
        return history

    def train(
        self,
        rdd: Any,
        nb_epoch: int = 10,
        batch_size: int = 32,
        verbose: int = 0,
        validation_split: float = 0.1,
        **kwargs: Any,
    ) -> keras.callbacks.History:
        """`fit` by the name, and with the defaults, of Elephas 0.1 to 0.3."""
        self.num_workers = kwargs.pop("num_workers", self.num_workers)
        settings = {
            "epochs": nb_epoch,
            "batch_size": batch_size,
            "verbose": verbose,
            "validation_split": validation_split,
        }
        return self.fit(rdd, **{**settings, **kwargs})

    train_rdd = train

    def predict(self, data: Any, **kwargs: Any) -> Any:
        """The model's predictions for all rows, in their order.

        Args:
            data: An array of shape (rows, ...), or an RDD of x for single rows; cut into parts as in `fit`.
            **kwargs: `batch_size`.

        Returns:
            A list of arrays, one for each row. Of a model with several outputs, its arrays of shape (rows, ...).
        """
        inputs, _ = parts_of(self.model)
        if not isinstance(data, RDD):
            data = (split(inputs, np.asarray(data), 1),)
        elif inputs > 1:
            data = data.map(partial(split_one, inputs))
        predictions = super().predict(data, **{"batch_size": self.batch_size, **kwargs})
        return list(predictions) if isinstance(predictions, np.ndarray) else predictions

    def predict_classes(self, data: Any) -> np.ndarray:
        """The class of each row: the place of the largest output, or whether the only one is above one half.

        Returns:
            int64; shape (rows,), or (rows, 1) where the model has one output.
        """
        outputs = np.asarray(self.predict(data))
        return outputs.argmax(axis=-1) if outputs.shape[-1] > 1 else (outputs > 0.5).astype("int64")

    def evaluate(  # type: ignore[override]  # it is Elephas's
        self,
        x_test: Any,
        y_test: Any,
        *,
        batch_size: int = 32,
        verbose: int | str = 0,
        sample_weight: Any = None,
        return_dict: bool = False,
    ) -> Any:
        """Loss and metrics over all rows, exact for every metric.

        Args:
            x_test, y_test, sample_weight: Arrays of shape (rows, ...); cut into parts as in `fit`.
            batch_size: Rows per batch.
            verbose: Not used.
            return_dict: Return the values by name.

        Returns:
            [loss, *metrics] in Keras's order; the loss alone where there are no metrics.
        """
        inputs, outputs = parts_of(self.model)
        weights = () if sample_weight is None else (np.asarray(sample_weight),)
        data = (split(inputs, np.asarray(x_test), 1), split(outputs, np.asarray(y_test), 1), *weights)
        values = native.SparkModel.evaluate(self, data, batch_size=batch_size)
        return values if return_dict else self.model._flatten_metrics_in_order(values)

    def save(self, file_name: str, overwrite: bool = False, to_hadoop: bool = False) -> None:  # type: ignore[override]
        """Save the model, with `get_config()` beside it.

        Args:
            file_name: Ends in `.h5` or `.keras`. A path, or the URI of any file system that pyarrow knows.
            overwrite: Replace a file that is there.
            to_hadoop: The path is one of a Hadoop file system as Spark knows it: without a scheme, of its default one.

        Raises:
            ConfigError: The name is wrong, the file exists, or the model cannot be saved.
        """
        if not to_hadoop:
            super().save(file_name, overwrite=overwrite)
            return
        with tempfile.TemporaryDirectory(prefix="allreduce_spark-") as folder:
            local = Path(folder) / file_name.rpartition("/")[2]
            super().save(local)
            put_hadoop_file(active_context(), local, file_name, overwrite=overwrite)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, custom_objects: dict[str, Any] | None = None, safe_mode: bool = True
    ) -> Self:
        """As `allreduce_spark.SparkModel.load`; `load_spark_model` knows the class by itself."""
        saved = load_model_at(path, custom_objects, safe_mode=safe_mode)
        return cls(saved.model, **{"custom_objects": custom_objects, **saved.settings})

    def _settings(self) -> dict[str, Any]:
        return self.get_config()


class AsynchronousSparkModel(SparkModel):
    """A `SparkModel` whose mode is asynchronous unless it is told otherwise.

    Args:
        model, num_workers, custom_objects, batch_size: As for `SparkModel`.
        mode: "asynchronous" or "hogwild".
        frequency: "epoch" or "batch".
        parameter_server_mode, port: Taken and not used.
    """

    _asynchronous = True


class SparkMLlibModel(SparkModel, mllib.SparkMLlibModel):  # type: ignore[misc]  # Elephas's signatures
    """A `SparkModel` for RDDs of LabeledPoints, and for MLlib's vectors and matrices."""

    def fit(  # type: ignore[override]
        self,
        labeled_points: RDD[LabeledPoint],
        epochs: int = 10,
        batch_size: int = 32,
        verbose: int = 0,
        validation_split: float = 0.1,
        categorical: bool = False,
        nb_classes: int | None = None,
        **kwargs: Any,
    ) -> keras.callbacks.History:
        """Train the model.

        Args:
            labeled_points: Rows with a vector and a label.
            epochs, batch_size, verbose, validation_split, **kwargs: As for `SparkModel.fit`.
            categorical: Turn labels into one-hot vectors.
            nb_classes: Their length; None for the width of the model's output.
        """
        settings = {
            "epochs": epochs,
            "batch_size": batch_size,
            "verbose": verbose,
            "validation_split": validation_split,
        }
        classes = {"categorical": categorical, "num_classes": nb_classes or None}
        return super().fit(labeled_points, **{**settings, **classes, **kwargs})

    def predict(self, mllib_data: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Predict for a Matrix, whose rows are rows of features, or for a Vector, which is one row.

        Returns:
            A Matrix for a Matrix, a Vector for a Vector; for an array or an RDD what `SparkModel.predict` returns.
        """
        if isinstance(mllib_data, Matrix):
            return to_matrix(mllib.SparkMLlibModel.predict(self, mllib_data, **kwargs))
        if isinstance(mllib_data, Vector):
            return to_vector(mllib.SparkMLlibModel.predict(self, mllib_data, **kwargs))
        return super().predict(mllib_data, **kwargs)


class SparkHFModel(Gone):
    """Models of Hugging Face, in Elephas 6 alone."""

    _instead = "Hugging Face's TensorFlow models are made for Keras 2. Use a model of Keras 3 with SparkModel."


def load_spark_model(
    file_name: str, from_hadoop: bool = False, custom_objects: Mapping[str, Any] | None = None
) -> SparkModel:
    """Load what `save` wrote, here or in Elephas 0.4 to 7.3.

    Args:
        file_name: A path or URI, as for `SparkModel.save`.
        from_hadoop: As `to_hadoop`.
        custom_objects: Classes and functions, by name, that Keras needs to load the model.

    Returns:
        An object of the class that was saved.

    Raises:
        ConfigError: There is no such file, or it holds something else.
    """
    with tempfile.TemporaryDirectory(prefix="allreduce_spark-") as folder:
        path = fetch_hadoop_file(active_context(), file_name, Path(folder)) if from_hadoop else file_name
        file = load_model_at(path, custom_objects, safe_mode=True)
    kinds: dict[str | None, type[SparkModel]] = {
        kind.__name__: kind for kind in (SparkModel, AsynchronousSparkModel, SparkMLlibModel)
    }
    if file.class_name not in kinds:
        raise ConfigError(
            f"{file_name!r} holds {file.class_name or 'a plain Keras model'}, expected one of {sorted(map(str, kinds))}. Load "
            "estimators with load_ml_estimator, transformers with load_ml_transformer, and Keras models with "
            "keras.saving.load_model."
        )
    return kinds[file.class_name](file.model, **{"custom_objects": custom_objects, **file.settings})


def save_and_zip_model(model: Any, temp_dir: str) -> str:
    """Save a model that has `save_pretrained` into a folder, and return the path of a zip file of that folder."""
    model.save_pretrained(temp_dir)
    return shutil.make_archive(temp_dir, "zip", temp_dir)
