"""The settings of a fit: frozen, and checked once, on the driver, before any task starts. Standard library only."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from allreduce_spark.errors import ConfigError

__all__ = [
    "BACKENDS",
    "Checkpoint",
    "FitConfig",
    "Recovery",
    "Timeouts",
    "check_backend",
    "check_num_ranks",
    "check_ranks_per_gpu",
    "check_sync_every",
]

MAX_RANKS = 4096
BACKENDS = ("mpi", "horovod", "horovod-mpi", "auto")


@dataclass(frozen=True)
class Timeouts:
    """How long each phase of a fit may take, in seconds. Every wait of the library is one of these.

    Attributes:
        slots_s: Executors that are still registering with a young Spark application. With Spark Connect also: slots for all
            ranks that are free at once.
        start_s: From when the barrier stage could start until every agent has connected to the driver. While other tasks of
            the application run, those that it takes its rows from among them, it waits for slots, for up to `spool_s`.
        spool_s: Reading and writing down all shards; includes what is upstream of them in the same stage. Before that stage:
            waiting for the tasks that it takes its rows from, or that have its slots. With Spark Connect, from the end of one
            of those that make its rows to the end of the next.
        import_s: Importing TensorFlow and loading the model, in every rank.
        init_s: Opening the communicator.
        step_s: From one optimizer step to the next (the first one compiles); also for validation and callbacks.
        function_s: For a function of the user's own (`run`), from one collective to the next.
        stall_warning_s: A rank that takes longer than this for one step is named in the log, with what its code is doing.
        collective_s: One rank waiting for the others in one collective.
        checkpoint_s: Bringing a checkpoint to its store. Training goes on meanwhile, and waits for it at the end of some epochs
            and at its own end; after so long it goes on without that checkpoint. Before a fit: opening the store.
        result_s: Bringing the weights from the root to the driver.
        teardown_s: Ending the ranks and the barrier stage once the result, or the failure, is known. With Spark Connect a task
            of rank 0 that has not told of a failure by then is killed.
        heartbeat_s: From one sign of life to the next, between driver and agents, in both directions.
        silence_s: Without a sign of life for so long, the other end is taken for dead.
    """

    slots_s: float = 30.0
    start_s: float = 120.0
    spool_s: float = 3600.0
    import_s: float = 300.0
    init_s: float = 120.0
    step_s: float = 1800.0
    function_s: float = 86400.0
    stall_warning_s: float = 60.0
    collective_s: float = 1800.0
    checkpoint_s: float = 600.0
    result_s: float = 600.0
    teardown_s: float = 20.0
    heartbeat_s: float = 1.0
    silence_s: float = 30.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ConfigError(f"Timeouts.{field.name} must be a positive number of seconds, got {value!r}.")
        if self.silence_s <= 2 * self.heartbeat_s:
            raise ConfigError(
                f"Timeouts.silence_s={self.silence_s} must be more than twice heartbeat_s={self.heartbeat_s}, "
                "or one late heartbeat ends the fit."
            )


@dataclass(frozen=True)
class Recovery:
    """How much misfortune a fit is to survive.

    Attributes:
        max_restarts: How often in a row ranks are started again without having come further than before.
        min_ranks: Train with as few ranks as this, from the start or where machines are lost, until there are slots for more.
            None: all at the start, and afterwards as many as there are.
    """

    max_restarts: int = 3
    min_ranks: int | None = None

    def __post_init__(self) -> None:
        _check_count("max_restarts", self.max_restarts, at_least=0)
        if self.min_ranks is not None:
            _check_count("min_ranks", self.min_ranks, at_least=1)


@dataclass(frozen=True)
class FitConfig:
    """What `keras.Model.fit` needs to know on every rank, with Keras's own names and meanings.

    Attributes:
        epochs: Index of the last epoch, plus one.
        batch_size: Rows per shard per step, and so per rank while there are as many ranks as shards. The global batch has
            `batch_size` times the number of shards rows, however many ranks train them.
        initial_epoch: Epoch to start at.
        validation_split: Share of the rows, 0 <= share < 1, that is held out for validation: the last rows of each shard.
        validation_batch_size: Rows per shard per validation step.
        validation_freq: Validate after every so many epochs.
        shuffle: Draw a new order of each shard's rows for every epoch, from (seed, epoch, shard).
        class_weight: From class index to the weight of its rows in the loss, or None.
        sync_every: After how many steps the ranks combine what they have learnt: 1, k > 1, or "epoch".
        seed: Seed of shuffling and of everything random in the ranks, 0 <= seed < 2**32.
    """

    epochs: int = 1
    batch_size: int = 32
    initial_epoch: int = 0
    validation_split: float = 0.0
    validation_batch_size: int | None = None
    validation_freq: int = 1
    shuffle: bool = True
    class_weight: dict[int, float] | None = None
    sync_every: int | str = 1
    seed: int = 0

    def __post_init__(self) -> None:
        _check_count("epochs", self.epochs, at_least=1)
        _check_count("batch_size", self.batch_size, at_least=1)
        _check_count("initial_epoch", self.initial_epoch, at_least=0)
        _check_count("validation_freq", self.validation_freq, at_least=1)
        _check_count("seed", self.seed, at_least=0)
        if self.seed >= 2**32:
            raise ConfigError(f"seed must be below 2**32, got {self.seed}.")
        if self.validation_batch_size is not None:
            _check_count("validation_batch_size", self.validation_batch_size, at_least=1)
        if self.initial_epoch >= self.epochs:
            raise ConfigError(
                f"initial_epoch={self.initial_epoch} leaves nothing to train: epochs={self.epochs} is the index of the "
                "epoch to stop before (as in Keras), not a number of further epochs."
            )
        split = self.validation_split
        if isinstance(split, bool) or not isinstance(split, Real) or not 0 <= split < 1:
            raise ConfigError(f"validation_split must be a share of the rows, 0 <= share < 1, got {split!r}.")
        if not isinstance(self.shuffle, bool):
            raise ConfigError(f"shuffle must be True or False, got {self.shuffle!r}.")
        if self.class_weight is not None:
            _check_class_weight(self.class_weight)
        check_sync_every(self.sync_every)

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON values; `from_json` is the way back."""
        fields = {name: _python_number(value) for name, value in dataclasses.asdict(self).items()}
        if self.class_weight is not None:
            fields["class_weight"] = sorted((int(label), float(weight)) for label, weight in self.class_weight.items())
        return fields

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> FitConfig:
        weights = fields["class_weight"]
        return cls(**{**fields, "class_weight": None if weights is None else {int(k): float(v) for k, v in weights}})


@dataclass(frozen=True)
class Checkpoint:
    """Where checkpoints of a fit are kept, how often they are taken, and which of them stay.

    Without `every_steps` and `every_s` they are taken as often as costs less than 2 % of the time. The newest complete one
    always stays, whatever the other settings say.

    Attributes:
        path: A folder, as a local path that all hosts share, or a URI that pyarrow knows. None: checkpoints are kept on the
            executors' disks alone, and end with the fit.
        every_steps: Steps from one to the next.
        every_s: Seconds from one to the next.
        keep: The last so many are kept.
        keep_every: Every so manieth is kept for ever.
        keep_best: A name of the epoch's logs, such as "val_loss": the best of the checkpoints that know it is kept.
        best_mode: Whether the best is the smallest ("min") or the largest ("max"). "auto": the largest of what Keras calls
            accuracy, AUC, precision, recall, a score or a similarity, else the smallest.
        max_bytes: All complete ones together take no more than this, unless the newest alone does. One that is being written
            comes on top.
    """

    path: str | None = None
    every_steps: int | None = None
    every_s: float | None = None
    keep: int = 3
    keep_every: int | None = None
    keep_best: str | None = None
    best_mode: str = "auto"
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.path is not None and (not isinstance(self.path, str) or not self.path):
            raise ConfigError(f"Checkpoint.path must be a path or a URI, got {self.path!r}.")
        _check_count("Checkpoint.keep", self.keep, at_least=1)
        for name in ("every_steps", "keep_every", "max_bytes"):
            if getattr(self, name) is not None:
                _check_count(f"Checkpoint.{name}", getattr(self, name), at_least=1)
        seconds = self.every_s
        if seconds is not None and (
            isinstance(seconds, bool) or not isinstance(seconds, Real) or not 0 < seconds < math.inf
        ):
            raise ConfigError(f"Checkpoint.every_s must be a positive number of seconds, got {seconds!r}.")
        if self.every_steps is not None and self.every_s is not None:
            raise ConfigError("Checkpoint needs one of every_steps and every_s, or neither; it was given both.")
        if self.keep_best is not None and (not isinstance(self.keep_best, str) or not self.keep_best):
            raise ConfigError(
                f"Checkpoint.keep_best must be a name of the epoch's logs such as 'val_loss', got {self.keep_best!r}."
            )
        if self.best_mode not in ("auto", "min", "max"):
            raise ConfigError(f"Checkpoint.best_mode must be 'auto', 'min' or 'max', got {self.best_mode!r}.")

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON values; `from_json` is the way back."""
        return {name: _python_number(value) for name, value in dataclasses.asdict(self).items()}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Checkpoint:
        return cls(**fields)


def check_num_ranks(num_ranks: object) -> int:
    """Return `num_ranks` as an int, or raise ConfigError where it is no number of ranks."""
    _check_count("num_ranks", num_ranks, at_least=1)
    count = int(num_ranks)  # type: ignore[call-overload]
    if count > MAX_RANKS:
        raise ConfigError(f"num_ranks={count} is more than this library is made for ({MAX_RANKS}).")
    return count


def check_ranks_per_gpu(ranks_per_gpu: object) -> int:
    """Return `ranks_per_gpu` as an int, or raise ConfigError where it is no number of ranks."""
    _check_count("ranks_per_gpu", ranks_per_gpu, at_least=1)
    return int(ranks_per_gpu)  # type: ignore[call-overload]


def check_backend(backend: object) -> str:
    """Return `backend`, or raise ConfigError where there is none of that name."""
    if backend not in BACKENDS:
        raise ConfigError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}.")
    return str(backend)


def check_sync_every(sync_every: object) -> int | str:
    """Return `sync_every`, or raise ConfigError where it is neither a number of steps nor "epoch"."""
    if sync_every == "epoch":
        return "epoch"
    if isinstance(sync_every, str):
        raise ConfigError(f"sync_every must be a number of steps, or 'epoch', got {sync_every!r}.")
    _check_count("sync_every", sync_every, at_least=1)
    return int(sync_every)  # type: ignore[call-overload]


def _python_number(value: Any) -> Any:
    """The Python number for a numpy one, which `json` does not know; anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def _check_count(name: str, value: object, *, at_least: int) -> None:
    # numpy integers are Integral too; bool is as well, and `epochs=True` is never meant.
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ConfigError(f"{name} must be an integer, got {value!r} of type {type(value).__name__}.")
    if value < at_least:
        raise ConfigError(f"{name} must be at least {at_least}, got {value}.")


def _check_class_weight(weights: object) -> None:
    if not isinstance(weights, dict) or not weights:
        raise ConfigError(f"class_weight must be a dict from class index to weight, got {weights!r}.")
    for label, weight in weights.items():
        if isinstance(label, bool) or not isinstance(label, Integral) or label < 0:
            raise ConfigError(f"class_weight has the key {label!r}; keys are class indices 0, 1, 2, ...")
        if isinstance(weight, bool) or not isinstance(weight, Real) or not 0 <= float(weight) < math.inf:
            raise ConfigError(f"class_weight[{label}] must be a finite number >= 0, got {weight!r}.")
