"""`SparkModel`: fit, evaluate and predict of a Keras model on all the rows that Spark holds."""

from __future__ import annotations

import contextlib
import logging
import os
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pyspark import RDD
from pyspark.resource import ResourceProfile
from pyspark.sql import DataFrame

from allreduce_spark.config import (
    Checkpoint,
    FitConfig,
    Recovery,
    Timeouts,
    check_num_ranks,
    check_ranks_per_gpu,
    check_sync_every,
)
from allreduce_spark.errors import ConfigError
from allreduce_spark.rendezvous.protocol import Phase
from allreduce_spark.spark.engine import Fit, engine_for
from allreduce_spark.spark.files import load_model_at, save_model
from allreduce_spark.spark.inference import concatenate
from allreduce_spark.spark.progress import Display, verbosity_of
from allreduce_spark.spark.recovery import Safety, check_min_ranks, check_resume
from allreduce_spark.spark.resources import check_resources
from allreduce_spark.spark.shards import columns_of
from allreduce_spark.training.checks import check_backends, check_callbacks, check_classes, check_model
from allreduce_spark.training.inference import result_of
from allreduce_spark.training.models.layout import layer_model
from allreduce_spark.training.scoring import PackedModel, pack

if TYPE_CHECKING:
    import keras
    from typing_extensions import Self

__all__ = ["SparkModel"]

log = logging.getLogger(__name__)


class SparkModel:
    """A compiled Keras model that is trained by several ranks on Spark, exactly as one process would train it.

    Each rank holds the whole model and a part of the rows; after each batch the ranks combine their gradients by all-reduce.
    Fitting changes the Keras model that was passed in, weights and optimizer state, as `keras.Model.fit` does.

    The session may be one of Spark Connect: then data are its DataFrames, or arrays, and epochs are logged on the executor of
    rank 0 instead of being shown here. Weights and optimizer state together must be less than spark.driver.maxResultSize of its
    server.

    Args:
        model: Compiled. It may be unbuilt; then the first fit builds it.
        num_ranks: How many ranks train together; each takes one slot (`spark.task.cpus` cores) of the application. None takes
            all slots.
        sync_every: How many steps the ranks take between two moments at which they combine what they have learnt. 1, the
            default, is exact: the gradients of every step are averaged, and all ranks are one. A larger number k lets each
            rank take k steps on its own rows and then averages weights and optimizer state, weighted by the rows that each
            has trained on ("local SGD", Stich 2019, arXiv:1805.09767); "epoch" does so once an epoch. That needs less
            network, and gives other, usually somewhat worse, weights than one process.
        backend: What the ranks reduce by. "mpi": MPICH, which is installed with this library. "horovod": Horovod, with Gloo
            between the hosts and NCCL between GPUs where it was built for them; "horovod-mpi": the same with MPI in the place
            of Gloo; both need Keras to run on TensorFlow. `allreduce-spark install-horovod` installs it. "auto": "horovod"
            where every rank has a GPU, and a Horovod with NCCL is there, else "mpi". The weights are the same but for the
            rounding of sums.
        resources: What each task asks of Spark, such as a GPU (`TaskResourceRequests().cpus(4).resource("gpu", 1)`); None for
            what the application's settings say. It holds for fit, evaluate and predict, and is not saved. Standalone
            clusters, YARN and Kubernetes have such profiles, local mode has not; they may ask for no executors of their own.
        ranks_per_gpu: How many ranks may share a GPU; not saved. A rank uses the GPU that Spark gave to its task. Where tasks
            ask for none, and the machine has some that Keras can use, it uses the one of its local rank.
        custom_objects: Classes and functions, by name, that Keras needs to load the model. Those that are registered with
            Keras, or are found in the model, need not be named.
        timeouts: Deadlines of all that a fit waits for.

    Raises:
        ConfigError: The model is not compiled, num_ranks or ranks_per_gpu is no positive integer, there is no such backend, or
            not for the library that Keras computes with, sync_every makes no sense, or no cluster has such resources.

    Example:
        >>> spark_model = SparkModel(model, num_ranks=2)            # doctest: +SKIP
        >>> history = spark_model.fit((x, y), epochs=5)             # doctest: +SKIP
        >>> spark_model.evaluate((x_test, y_test))                  # doctest: +SKIP
        {'loss': 0.08, 'accuracy': 0.97}
    """

    def __init__(
        self,
        model: keras.Model,
        num_ranks: int | None = None,
        *,
        sync_every: int | str = 1,
        backend: str = "mpi",
        resources: ResourceProfile | None = None,
        ranks_per_gpu: int = 1,
        custom_objects: dict[str, Any] | None = None,
        timeouts: Timeouts | None = None,
    ) -> None:
        self.model = check_model(model)
        self.num_ranks = None if num_ranks is None else check_num_ranks(num_ranks)
        self.sync_every = check_sync_every(sync_every)
        self.backend = check_backends(backend)
        self.resources = check_resources(resources)
        self.ranks_per_gpu = check_ranks_per_gpu(ranks_per_gpu)
        self.timeouts = timeouts or Timeouts()
        self._custom_objects = dict(custom_objects or {})

    def fit(
        self,
        data: Any,
        *,
        epochs: int = 1,
        batch_size: int = 32,
        verbose: int | str = "auto",
        callbacks: Sequence[keras.callbacks.Callback] | None = None,
        validation_split: float = 0.0,
        validation_data: Any = None,
        shuffle: bool = True,
        class_weight: dict[int, float] | None = None,
        initial_epoch: int = 0,
        validation_batch_size: int | None = None,
        validation_freq: int = 1,
        features_col: str | Sequence[str] = "features",
        label_col: str | Sequence[str] = "label",
        weight_col: str | None = None,
        seed: int | None = None,
        checkpoint: Checkpoint | None = None,
        resume: str = "never",
        max_restarts: int = 3,
        min_ranks: int | None = None,
    ) -> keras.callbacks.History:
        """Train the model; names and meanings are those of `keras.Model.fit`.

        Args:
            data: Arrays `(x, y)` or `(x, y, sample_weight)`, an RDD of such pairs for single rows, or a DataFrame. x and y
                may be dicts or tuples of arrays, for models with several inputs or outputs.
            epochs, initial_epoch: As in Keras.
            batch_size: Rows per rank per step; the global batch has `batch_size * num_ranks` rows.
            verbose: 1 for a progress bar, 2 for a line per epoch, 0 for silence, "auto" for a bar on a terminal or in a
                notebook and lines elsewhere.
            callbacks: Keras callbacks. Copies of them run on every rank and see the same logs at the end of an epoch (those of
                a batch are the rank's own); what they remember does not come back. Those that write files
                (ModelCheckpoint, CSVLogger, TensorBoard, and callbacks with `root_only = True`) run on rank 0 only, and
                write on its machine.
            validation_split: Share of the rows to hold out: the last rows of each shard.
            validation_data: Rows to validate on, in any of the forms of `data`.
            shuffle: Whether each epoch has its own order of rows.
            class_weight: From class index to the weight of its rows in the loss.
            validation_batch_size, validation_freq: As in Keras; per rank, and a number of epochs.
            features_col, label_col, weight_col: Columns of a DataFrame. Several feature columns are a dict of inputs.
            seed: Of the order of rows and of all randomness in the ranks. None draws one with `random`, which
                `keras.utils.set_random_seed` seeds.
            checkpoint: When the state of the training is saved, and where. None saves it now and then, on the disks of the
                executors alone: enough for ranks that die, not for machines that are lost, after which the fit begins anew.
            resume: "auto" goes on from the newest whole checkpoint in `checkpoint.path`, if there is one, as if nothing had
                happened; "never" refuses a folder that has any. A checkpoint of another fit is refused, and where the fit can
                go on with what has changed, the log names it.
            max_restarts: How often in a row ranks are started again, after the death of a rank or the loss of a machine,
                without having come further than before. 0 gives up at once.
            min_ranks: Train with as few ranks as this if there are no slots for more, until there are. The rows of each global
                batch stay the same: every rank takes more of them. None asks for all ranks at the start, and goes on with as
                many as there are when machines are lost. Not more than `num_ranks`; where that is None, the fit waits for so
                many slots, and takes all that there are then.

        Returns:
            The history of this fit. Metrics are those of all ranks' rows.

        Raises:
            ConfigError, DataError: Something about the arguments or the rows cannot work; no rank has started.
            RankFailedError: A rank failed; says which one was first, and why.
            CancelledError: The Spark job was cancelled.
        """
        recovery = Recovery(max_restarts, min_ranks)
        asks_to_resume = check_resume(checkpoint, resume)
        users = check_callbacks([] if callbacks is None else callbacks)
        columns = columns_of(features_col, label_col, weight_col)
        if validation_split and validation_data is not None:
            raise ConfigError("validation_split and validation_data are both given; choose one")
        config = FitConfig(
            epochs=epochs,
            batch_size=batch_size,
            initial_epoch=initial_epoch,
            validation_split=validation_split,
            validation_batch_size=validation_batch_size,
            validation_freq=validation_freq,
            shuffle=shuffle,
            class_weight=class_weight,
            sync_every=self.sync_every,
            seed=0 if seed is None else seed,
        )
        with contextlib.closing(Display(verbosity_of(verbose), epochs, self.num_ranks)) as display:
            engine = engine_for(data, validation_data, resources=self.resources)
            resumed = None
            if checkpoint is not None and asks_to_resume:
                resumed = engine.newest_checkpoint(checkpoint, self.timeouts)
            if seed is None:
                seed = random.randrange(2**32) if resumed is None else resumed.fingerprint["seed"]
            display.show_phase(Phase.SLOTS)
            wanted = self.num_ranks or (resumed.num_shards if resumed else None)
            check_min_ranks(min_ranks, wanted)
            num_ranks = engine.check_slots(wanted, self.timeouts, min_ranks)
            for part in (data, validation_data):
                if isinstance(part, (tuple, list)) and len(part) > 1:
                    check_classes(self.model, part[1])
            fit = Fit(
                self.model,
                data,
                validation_data,
                columns,
                num_ranks,
                replace(config, seed=seed),
                self.timeouts,
                users,
                self._custom_objects,
                Safety(recovery, checkpoint or Checkpoint(), resumed),
                self.backend,
                self.ranks_per_gpu,
            )
            return engine.fit(fit, display)

    def evaluate(
        self,
        data: Any,
        *,
        batch_size: int = 32,
        features_col: str | Sequence[str] = "features",
        label_col: str | Sequence[str] = "label",
        weight_col: str | None = None,
    ) -> dict[str, Any]:
        """Loss and metrics over all rows of `data`, computed where they are.

        Not an average over partitions: metric states are combined, so AUC, mean IoU and the like are exact.

        Args:
            data: As for `fit`.
            batch_size: Rows per batch.
            features_col, label_col, weight_col: As for `fit`.

        Returns:
            Name -> value, "loss" first. A metric that gives one number per class, such as F1Score, is an array.

        Raises:
            ConfigError: There is no Spark session, or the model has no weights yet.
            DataError: There are no rows, or they do not fit the model.
        """
        columns = columns_of(features_col, label_col, weight_col)
        packed = self._packed(self.model, batch_size)
        return result_of(
            self.model, engine_for(data, resources=self.resources).evaluate(packed, batch_size, data, columns)
        )

    def predict(self, data: Any, *, batch_size: int = 32, features_col: str | Sequence[str] = "features") -> Any:
        """The model's predictions for all rows, in the order of `data`, brought to the driver.

        Args:
            data: As for `fit`; labels are not needed and not looked at. An array is x itself. An RDD may also hold single x
                that are no tuples.
            batch_size: Rows per batch.
            features_col: As for `fit`.

        Returns:
            An array of shape (rows, ...), or arrays in the structure of the model's outputs.

        Raises:
            ConfigError, DataError: As in `evaluate`.
        """
        return self._outputs_of(self.model, data, batch_size, features_col)

    def extract_features(
        self, data: Any, layer: str, *, batch_size: int = 32, features_col: str | Sequence[str] = "features"
    ) -> Any:
        """The output of a named layer for all rows, in the order of `data`, brought to the driver.

        What other models learn from: the layers before it turn rows into features that are worth more.

        Args:
            data: As for `predict`.
            layer: Name of a layer of a functional or Sequential model.
            batch_size: Rows per batch.
            features_col: As for `fit`.

        Returns:
            An array of shape (rows, ...).

        Raises:
            ConfigError: There is no such layer, or the model is neither functional nor Sequential; also as in `evaluate`.
            DataError: As in `evaluate`.
        """
        return self._outputs_of(layer_model(self._built_model(), layer), data, batch_size, features_col)

    def _outputs_of(self, model: keras.Model, data: Any, batch_size: int, features_col: str | Sequence[str]) -> Any:
        """The outputs of `model` for all rows, in their order."""
        columns = columns_of(features_col, (), None)
        packed = self._packed(model, batch_size)
        return concatenate(
            engine_for(data, resources=self.resources).predict(packed, batch_size, _without_labels(data), columns)
        )

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the model, with its weights, optimizer state and the settings of this object, to one file.

        Args:
            path: Ends in `.keras`, or in `.h5` for Keras's older format. A local path, or a URI of any file system that pyarrow
                knows: `s3://bucket/digits.keras`, `hdfs://namenode:8020/...`, `gs://...`. The file appears when it is
                complete.
            overwrite: Whether to replace a file that is there.

        Raises:
            ConfigError: The file exists, cannot be written, or Keras cannot save this model in this format.
        """
        save_model(path, self.model, type(self).__name__, self._settings(), overwrite=overwrite)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, custom_objects: dict[str, Any] | None = None, safe_mode: bool = True
    ) -> Self:
        """Read what `save` wrote, or any file that Keras wrote of a compiled model. Training goes on where it was.

        Args:
            path: As for `save`.
            custom_objects: As for the constructor.
            safe_mode: Refuse layers that hold Python bytecode (Lambda). Pass False only if you trust the author of the file.

        Raises:
            ConfigError: The file is not there, is no model file, is damaged, comes from a newer version, or needs code that
                is not here.
        """
        saved = load_model_at(path, custom_objects, safe_mode=safe_mode)
        settings = {name: saved.settings[name] for name in cls._SETTINGS if name in saved.settings}
        return cls(saved.model, custom_objects=custom_objects, **settings)

    _SETTINGS = ("num_ranks", "sync_every", "backend")

    def _settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._SETTINGS}

    def _packed(self, model: keras.Model, batch_size: int) -> PackedModel:
        FitConfig(batch_size=batch_size)  # checks it
        self._built_model()
        return pack(model, self._custom_objects)

    def _built_model(self) -> keras.Model:
        if not self.model.built:
            raise ConfigError(
                "the model has no weights yet, and each partition would draw its own: fit it first, or build it with "
                "model.build(shape) or keras.Input."
            )
        return self.model


def _without_labels(data: Any) -> Any:
    if isinstance(data, RDD):
        return data.map(lambda row: (row[0],) if isinstance(row, tuple) else (row,))
    if isinstance(data, DataFrame):
        return data
    if isinstance(data, tuple):
        return data[:1]
    return (data,)
