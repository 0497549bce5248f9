"""What the driver makes sure of when all shards are on disk and no rank has started: enough rows, alike, fit for the model."""

from __future__ import annotations

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
from allreduce_spark.training.batches import validation_rows_of
from allreduce_spark.training.checks import check_inputs, check_labels

if TYPE_CHECKING:
    import keras

__all__ = ["approve", "approve_fit", "choose_backend"]


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
) -> dict[str, Any]:
    """Make sure that the ranks of a barrier stage may start, and tell the coordinator what its checkpoints are of.

    Args:
        joins, model, config, with_validation_data: As for `approve`.
        fingerprint: What the fit is a fit of, but for its rows.
        coordinator: Of the fit.
        of_this_fit: Whether an earlier barrier stage of the fit had come so far.
        backend: What the ranks are to reduce by, as `config.BACKENDS` names it.

    Returns:
        What every rank is told.

    Raises:
        ConfigError, DataError: They may not start.
    """
    approved = approve(joins, model=model, config=config, with_validation_data=with_validation_data)
    fingerprint = _with_rows(fingerprint, config, joins, approved["spec"])
    if coordinator.newest:
        check_resumable(coordinator.newest, fingerprint, of_this_fit=of_this_fit)
    coordinator.begin(fingerprint)
    return {**approved, "backend": choose_backend(backend, joins)}


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


def choose_backend(wanted: str, joins: Sequence[Join]) -> str:
    """What all ranks are to reduce by, where "auto" leaves it to what the agents have found on their machines."""
    if wanted != "auto":
        return wanted
    return "horovod" if all(join.nccl for join in joins) else "mpi"


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
