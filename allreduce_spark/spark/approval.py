"""What the driver makes sure of when all shards are on disk and no rank has started: rows that suit the model, GPUs enough."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from allreduce_spark.checkpoint.coordinator import Coordinator
from allreduce_spark.checkpoint.fingerprint import Fingerprint
from allreduce_spark.config import FitConfig
from allreduce_spark.data.spec import RowSpec, common_spec
from allreduce_spark.errors import ConfigError, DataError
from allreduce_spark.rendezvous.group import Join, shards_of
from allreduce_spark.spark.recovery import check_resumable
from allreduce_spark.training.backends import KERAS_BACKEND
from allreduce_spark.training.batches import validation_rows_of
from allreduce_spark.training.checks import check_inputs, check_labels

if TYPE_CHECKING:
    import keras

__all__ = ["approve", "approve_fit", "approve_function", "check_gpus", "choose_backend"]

log = logging.getLogger(__name__)


def approve_fit(
    joins: Sequence[Join],
    *,
    model: keras.Model,
    config: FitConfig,
    fingerprint: Fingerprint,
    with_validation_data: bool,
    coordinator: Coordinator,
    of_this_fit: bool,
    backend: str,
    ranks_per_gpu: int,
) -> dict[str, Any]:
    """Make sure that the ranks of a barrier stage may start, and tell the coordinator what its checkpoints are of.

    Args:
        joins, model, config, with_validation_data: As for `approve`.
        fingerprint: What the fit is a fit of, but for its rows.
        coordinator: Of the fit.
        of_this_fit: Whether an earlier barrier stage of the fit had come so far.
        backend: What the ranks are to reduce by, as `config.BACKENDS` names it.
        ranks_per_gpu: How many ranks may share a GPU.

    Returns:
        What every rank is told.

    Raises:
        ConfigError, DataError: They may not start.
    """
    check_gpus(joins, ranks_per_gpu, gpus_per_rank=1)
    approved = approve(joins, model=model, config=config, with_validation_data=with_validation_data)
    fingerprint = _with_rows(fingerprint, config, joins, approved["spec"])
    if coordinator.newest:
        check_resumable(coordinator.newest, fingerprint, of_this_fit=of_this_fit)
    coordinator.begin(fingerprint)
    return {**approved, "backend": choose_backend(backend, joins)}


def approve_function(joins: Sequence[Join], *, backend: str, ranks_per_gpu: int) -> dict[str, Any]:
    """The same for ranks that call a function of the user's; where Spark gives a task several GPUs, it sees them all.

    Raises:
        ConfigError: They may not start.
    """
    check_gpus(joins, ranks_per_gpu)
    return {"backend": choose_backend(backend, joins)}


def approve(
    joins: Sequence[Join], *, model: keras.Model, config: FitConfig, with_validation_data: bool
) -> dict[str, str | None]:
    """Agree on what the rows of all shards look like.

    Args:
        joins: What the agents told of their shards, in rank order.
        model: The user's, as it is on the driver.
        config: The settings of the fit.
        with_validation_data: Whether the user gave rows to validate on.

    Returns:
        "spec" and "validation_spec", as JSON, for every rank: one with an empty shard must know them too.

    Raises:
        DataError: There are no rows to train or to validate on, or the rows differ, or do not fit the model.
        ConfigError: The settings do not go with such rows.
    """
    shards = shards_of(joins)
    rows = tuple(shard.rows for shard in shards)
    _check_counts(rows, sum(shard.validation_rows for shard in shards) if with_validation_data else None, config)
    spec = _agreed_spec({shard.shard: shard.spec for shard in shards})
    validation_spec = _agreed_spec({shard.shard: shard.validation_spec for shard in shards})
    assert spec is not None  # there are rows
    check_labels(model, spec)
    check_inputs(model, spec)
    if config.class_weight is not None and spec.sample_weight is not None:
        raise ConfigError(
            "class_weight and sample weights are both given, and Keras takes only one of them: leave one out."
        )
    if validation_spec is not None:
        try:
            check_labels(model, validation_spec)
            check_inputs(model, validation_spec)
        except DataError as error:
            raise DataError(f"validation_data: {error}") from error
    return {"spec": spec.to_json(), "validation_spec": validation_spec.to_json() if validation_spec else None}


def check_gpus(joins: Sequence[Join], ranks_per_gpu: int, *, gpus_per_rank: int | None = None) -> None:
    """Make sure that no more ranks share a GPU than may, and warn where only some ranks have one.

    Args:
        joins: In rank order.
        ranks_per_gpu: How many ranks may share one.
        gpus_per_rank: How many a rank has a use for; None for any number.

    Raises:
        ConfigError: A GPU has more ranks, or a rank has more GPUs.
    """
    for join in joins:
        if gpus_per_rank is not None and len(join.gpus) > gpus_per_rank:
            raise ConfigError(
                f"Spark gives each task {len(join.gpus)} GPUs ({', '.join(join.gpus)} to rank {join.rank} on {join.host}), and "
                "a rank trains on one: set spark.task.resource.gpu.amount (or the request in resources) to 1."
            )
    for (_, gpu), sharing in _ranks_by_gpu(joins).items():
        if len(sharing) > ranks_per_gpu:
            ranks = ", ".join(str(join.rank) for join in sharing)
            raise ConfigError(
                f"the ranks {ranks} would share GPU {gpu} on {sharing[0].host}, and ranks_per_gpu={ranks_per_gpu}. Start fewer "
                "ranks; or let Spark give each task a GPU of its own (spark.task.resource.gpu.amount=1, and workers that do "
                f"not both offer one GPU); or allow it with ranks_per_gpu={len(sharing)}. To train on processors, set "
                'CUDA_VISIBLE_DEVICES to "" where the executors start.'
            )
    without = [join.rank for join in joins if not join.gpus]
    if 0 < len(without) < len(joins):
        log.warning(
            "the ranks %s have no GPU, the others have: all wait for the slowest at each step. One of the hosts may lack "
            "GPUs, or the libraries of CUDA: allreduce-spark doctor, there, says which",
            ", ".join(map(str, without)),
        )


def choose_backend(wanted: str, joins: Sequence[Join]) -> str:
    """What all ranks are to reduce by, where "auto" leaves it to what the agents have found on their machines.

    Raises:
        ConfigError: Horovod would use NCCL, which takes one GPU for each rank, neither shared nor missing.
    """
    ready = KERAS_BACKEND == "tensorflow" and all(join.nccl for join in joins)
    shared = any(len(sharing) > 1 for sharing in _ranks_by_gpu(joins).values())
    if wanted == "auto":
        return "horovod" if ready and not shared else "mpi"
    if wanted != "mpi" and any(join.nccl for join in joins) and (shared or not ready):
        lacking = ", ".join(str(join.rank) for join in joins if not join.nccl)
        what = f"the ranks {lacking} have none that it can use" if lacking else "here ranks share one"
        raise ConfigError(
            f"backend={wanted!r} reduces by NCCL, which needs a GPU of its own for each rank, and {what}: take backend='mpi', "
            "or start as many ranks as there are GPUs."
        )
    return wanted


def _ranks_by_gpu(joins: Sequence[Join]) -> dict[tuple[str, str], list[Join]]:
    """Who uses which GPU: (host, name) -> the ranks. GPUs with names of their own are the same also in another container."""
    users = defaultdict(list)
    for join in joins:
        for gpu in join.gpus:
            users["" if gpu.startswith(("GPU-", "MIG-")) else join.host_key, gpu].append(join)
    return users


def _with_rows(fit: Fingerprint, config: FitConfig, joins: Sequence[Join], spec: str | None) -> Fingerprint:
    """What a fit is a fit of, once all shards are on disk.

    Args:
        fit: The same before its rows were known.
        spec: What they look like, as JSON.
    """
    shards = shards_of(joins)
    rows = tuple(shard.rows for shard in shards)
    held_out = validation_rows_of(rows, config.validation_split)
    return replace(
        fit,
        data_schema=spec or "",
        rows=tuple(all_ - some for all_, some in zip(rows, held_out, strict=True)),
        validation_rows=sum(held_out) + sum(shard.validation_rows for shard in shards),
        global_batch_size=config.batch_size * len(rows),
    )


def _check_counts(rows: tuple[int, ...], validation_rows: int | None, config: FitConfig) -> None:
    total = sum(rows)
    if total == 0:
        raise DataError("the training data has no rows.")
    if validation_rows == 0:
        raise DataError("the validation data has no rows: leave validation_data out, or see why it is empty.")
    if config.validation_split and sum(validation_rows_of(rows, config.validation_split)) in (0, total):
        kind = "train on" if total - int(total * (1 - config.validation_split)) else "validate on"
        raise DataError(f"validation_split={config.validation_split} of {total} rows leaves none to {kind}.")


def _agreed_spec(specs: dict[int, str | None]) -> RowSpec | None:
    """The spec of all shards that have rows, by number; None where none has."""
    agreed: tuple[RowSpec, str] | None = None
    for shard, text in specs.items():
        if text is not None:
            spec, name = RowSpec.from_json(text), f"the rows of rank {shard}"
            agreed = (common_spec(agreed[0], spec, (agreed[1], name)) if agreed else spec, name)
    return agreed[0] if agreed else None
