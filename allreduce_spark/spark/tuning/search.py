"""`search`: many fits of a Keras model with different settings, several at once, each on ranks of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pyspark import RDD, StorageLevel
from pyspark.resource import ResourceProfile

from allreduce_spark.config import FitConfig, Timeouts, check_num_ranks, check_ranks_per_gpu
from allreduce_spark.errors import ConfigError
from allreduce_spark.spark.cluster import active_context, check_cluster, count_slots
from allreduce_spark.spark.fit import Rows
from allreduce_spark.spark.progress import verbosity_of
from allreduce_spark.spark.resources import check_resources, register
from allreduce_spark.spark.shards import columns_of, shards_of
from allreduce_spark.spark.stage import error_of_job
from allreduce_spark.spark.tuning.display import SearchDisplay
from allreduce_spark.spark.tuning.result import SearchResult
from allreduce_spark.spark.tuning.study import Direction, Study
from allreduce_spark.spark.tuning.trial_fits import Callbacks, TrialFits
from allreduce_spark.spark.tuning.trials import SearchLimits, run_trials
from allreduce_spark.training.checks import check_backends

if TYPE_CHECKING:
    import keras
    import optuna

__all__ = ["search"]

HELD_OUT = 0.2
SMALL_IS_GOOD = ("loss", "error", "mse", "mae", "mape", "msle", "rmse", "crossentropy", "divergence")
LARGE_IS_GOOD = ("acc", "auc", "precision", "recall", "f1", "iou", "r2", "similarity")


def search(
    build_model: Callable[[dict[str, Any]], keras.Model],
    space: Mapping[str, Any],
    data: Any,
    *,
    max_trials: int,
    epochs: int | None = None,
    batch_size: int = 32,
    objective: str = "val_loss",
    direction: Direction | Literal["auto"] = "auto",
    validation_split: float | None = None,
    validation_data: Any = None,
    class_weight: dict[int, float] | None = None,
    callbacks: Callbacks | Callable[[dict[str, Any]], Callbacks] | None = None,
    features_col: str | Sequence[str] = "features",
    label_col: str | Sequence[str] = "label",
    weight_col: str | None = None,
    ranks_per_trial: int = 1,
    sync_every: int | str = 1,
    backend: str = "mpi",
    resources: ResourceProfile | None = None,
    ranks_per_gpu: int = 1,
    max_parallel: int | None = None,
    sampler: str | optuna.samplers.BaseSampler = "tpe",
    pruner: str | optuna.pruners.BasePruner | None = "asha",
    seed: int | None = None,
    timeout_s: float | None = None,
    keep_models: int = 5,
    on_failure: Literal["record", "raise"] = "record",
    custom_objects: dict[str, Any] | None = None,
    timeouts: Timeouts | None = None,
    verbose: int | str = "auto",
) -> SearchResult:
    """Find good settings for a model: build and train it with many, side by side, and keep the best.

    Each trial is a fit as `SparkModel.fit` does it, on `ranks_per_trial` ranks, and survives ranks that die as one does; as
    many run at once as there are slots for. The rows are read and converted once, before the first trial, and stay on the
    disks of the executors until the search ends.
    Trials that do clearly worse than others after the same number of epochs are given up early.

    Args:
        build_model: From a setting, name -> value, to a compiled model: a new one at each call. Runs on the driver, in the
            calling thread.
        space: Name -> what values it may take. A list is a choice among its elements; a tuple `(low, high)` is a range, of
            integers if both ends are, and `(low, high, "log")` one whose orders of magnitude are equally likely; both ends are
            part of a range. A distribution of `optuna.distributions` is what it is. The names "epochs", "batch_size" and
            "sync_every" take the place of those arguments; `build_model` sees them as well.
        data: As for `SparkModel.fit`.
        max_trials: How many settings to try.
        epochs: As for `fit`; needed unless the space has it.
        batch_size: Rows per rank per step.
        objective: Name of the metric to look at, as it is in a history. It is the one at the last epoch; with
            `EarlyStopping(restore_best_weights=True)`, at the epoch whose weights come back.
        direction: "minimize", "maximize", or "auto" to tell by the name.
        validation_split, validation_data: As for `fit`. Where neither is given and the objective is one of validation, 0.2 of
            the rows are held out.
        class_weight: As for `fit`.
        callbacks: As for `fit`; every trial has copies. Or a function from a setting to such a list: trials that write files
            need different paths.
        features_col, label_col, weight_col: As for `fit`.
        ranks_per_trial: How many ranks train a model together.
        sync_every, backend, resources, ranks_per_gpu: As for `SparkModel`. Trials that run at once know nothing of each other's
            GPUs: where there are some, let Spark assign them.
        max_parallel: How many trials run at once, at most; None for as many as have room.
        sampler: "tpe" to learn from the trials so far, "random", or a sampler of `optuna.samplers`.
        pruner: "asha" for successive halving, None to give up no trial, or a pruner of `optuna.pruners`, which is asked after
            each epoch.
        seed: Of the settings, and of each trial together with its number. With `max_parallel=1`, the same seed gives the same
            trials; more at once end in an order of their own, from which "tpe" and "asha" draw their conclusions.
        timeout_s: After so many seconds no trial is begun any more, and those that run are stopped. None for no limit.
        keep_models: How many of the best trained models are kept.
        on_failure: "record" to note the error of a trial that fails and go on, "raise" to end the search with it. What is wrong
            with the data always ends it.
        custom_objects, timeouts: As for `SparkModel`.
        verbose: 1 or "auto" for a bar with the best value, 2 for a line per trial, 0 for silence.

    Returns:
        All trials, and the best models.

    Raises:
        ConfigError: Something about the arguments cannot work, or there is no metric called `objective`.
        MissingDependencyError: optuna is not installed.
        DataError: The rows cannot be trained on.
        SearchError: No trial was complete; says why.
        CancelledError, KeyboardInterrupt: The Spark job was cancelled, or Ctrl-C. No trial runs any more then.

    Example:
        >>> result = search(build_model, {"units": [16, 64], "rate": (1e-4, 1e-1, "log")}, (x, y),
        ...                 max_trials=20, epochs=10)                        # doctest: +SKIP
        >>> result.best_params                                               # doctest: +SKIP
        {'units': 64, 'rate': 0.0031}
        >>> model = result.best_model()                                      # doctest: +SKIP
    """
    if not callable(build_model):
        raise ConfigError(f"build_model must be a function from a dict of settings to a model, got {build_model!r}.")
    try:
        inspect.signature(build_model).bind({})
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"build_model is called with one argument, a dict of settings, but cannot be: {error}. Write it as "
            "def build_model(params): ... params['name'] ..."
        ) from error
    towards = _direction_of(objective, direction)
    limits = SearchLimits(max_trials, 1 if max_parallel is None else max_parallel, timeout_s, keep_models, on_failure)
    columns = columns_of(features_col, label_col, weight_col)
    seed = random.randrange(2**32) if seed is None else seed
    config = FitConfig(
        epochs=_epochs_of(epochs, space),
        batch_size=batch_size,
        validation_split=_share_to_hold_out(objective, validation_split, validation_data),
        class_weight=class_weight,
        sync_every=sync_every,
        seed=seed,
    )
    study = Study(space, direction=towards, sampler=sampler, pruner=pruner, epochs=epochs, seed=seed)
    timeouts, backend = timeouts or Timeouts(), check_backends(backend)
    resources, ranks_per_gpu = check_resources(resources), check_ranks_per_gpu(ranks_per_gpu)
    context = active_context()
    resources = register(context, resources)
    try:
        num_ranks = check_cluster(context, check_num_ranks(ranks_per_trial), timeouts, resources)
    except ConfigError as error:
        raise ConfigError(f"ranks_per_trial: {error}") from error
    shards = shards_of(context, data, validation_data, columns, num_ranks)
    with (
        contextlib.closing(SearchDisplay(verbosity_of(verbose), max_trials, objective)) as display,
        _read_once(shards),
    ):
        room = max(1, count_slots(context, resources) // num_ranks)
        limits = dataclasses.replace(limits, max_parallel=min(room, max_parallel or room))
        fits = TrialFits(
            context=context,
            build_model=build_model,
            rows=Rows(shards, num_ranks, with_validation=validation_data is not None),
            config=config,
            callbacks=callbacks,
            objective=objective,
            custom_objects=custom_objects or {},
            timeouts=timeouts,
            backend=backend,
            resources=resources,
            ranks_per_gpu=ranks_per_gpu,
        )
        return run_trials(study, fits.begin, limits, objective=objective, direction=towards, display=display)


def _direction_of(objective: object, direction: object) -> Direction:
    if not isinstance(objective, str):
        raise ConfigError(f"objective must be the name of a metric, got {objective!r}.")
    if direction == "minimize":
        return "minimize"
    if direction == "maximize":
        return "maximize"
    if direction != "auto":
        raise ConfigError(f"direction must be 'minimize', 'maximize' or 'auto', got {direction!r}.")
    small = any(word in objective.lower() for word in SMALL_IS_GOOD)
    large = any(word in objective.lower() for word in LARGE_IS_GOOD)
    if small == large:
        raise ConfigError(
            f"whether a large {objective!r} is good or bad cannot be told by its name: say direction='minimize' or 'maximize'."
        )
    return "minimize" if small else "maximize"


def _epochs_of(epochs: int | None, space: object) -> int:
    """The argument, or where the space has the epochs, a number that stands in for them."""
    if epochs is not None:
        return epochs
    if not (isinstance(space, Mapping) and "epochs" in space):
        raise ConfigError("epochs is missing: give the number of epochs of a trial, or let the space have 'epochs'.")
    return 1


def _share_to_hold_out(objective: str, share: float | None, validation_data: Any) -> float:
    if share and validation_data is not None:
        raise ConfigError("validation_split and validation_data are both given; choose one")
    if share is None:
        return HELD_OUT if validation_data is None and objective.startswith("val_") else 0.0
    if not share and validation_data is None and objective.startswith("val_"):
        raise ConfigError(f"objective={objective!r} needs rows to validate on: leave out validation_split=0.")
    return share


@contextlib.contextmanager
def _read_once(shards: RDD[tuple[int, bytes]]) -> Iterator[None]:
    """Keep the rows on the executors' disks: all that is upstream of them in the user's Spark job runs once."""
    shards.persist(StorageLevel.DISK_ONLY)
    try:
        try:
            shards.count()  # before the first trials, which would else all begin to read
        except Exception as error:
            raise error_of_job(error) from error
        yield
    finally:
        shards.unpersist()
