"""What a checkpoint is a checkpoint of, and whether a fit may go on from it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from allreduce_spark.errors import CheckpointError

__all__ = ["Difference", "Fingerprint", "differences"]


@dataclass(frozen=True)
class Fingerprint:
    """What must be the same for a fit to go on as if nothing had happened. All values come from the caller.

    Attributes:
        model: SHA-256 of the architecture.
        layers, parameters: How many the model has; they make a difference of `model` easier to understand.
        optimizer: The optimizer's name and settings, as JSON: `{"class_name": ..., "config": {...}}`.
        loss, metrics: What the model was compiled with, for people.
        callbacks: The classes of the user's callbacks.
        data_schema: What a row looks like, sample weights among it: `RowSpec.to_json()`. The values in the rows are not known.
        rows: Training rows per shard.
        validation_rows: Rows to validate on, of all shards.
        seed: Of everything random.
        shuffle: Whether each epoch has its own order of rows.
        global_batch_size: Rows per step, of all shards together.
        class_weight: From class index to weight, as JSON.
        sync_every: Steps between combinations, or "epoch".
    """

    model: str
    layers: int
    parameters: int
    optimizer: str
    loss: str
    metrics: str
    callbacks: tuple[str, ...]
    data_schema: str
    rows: tuple[int, ...]
    validation_rows: int
    seed: int
    shuffle: bool
    global_batch_size: int
    class_weight: str
    sync_every: int | str

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values; `from_json` is the way back."""
        return {**dataclasses.asdict(self), "rows": list(self.rows), "callbacks": list(self.callbacks)}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Fingerprint:
        """What `to_json` returned.

        Raises:
            CheckpointError: It is something else.
        """
        try:
            lists = {"rows": tuple(map(int, fields["rows"])), "callbacks": tuple(map(str, fields["callbacks"]))}
            return cls(**{**fields, **lists})
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"a checkpoint's fingerprint cannot be understood: {error!r}") from error


@dataclass(frozen=True)
class Difference:
    """What is not as it was when the checkpoint was saved.

    Attributes:
        text: What differs, with both values.
        forbids: Whether the fit cannot go on from the checkpoint; otherwise it may, but not as if nothing had happened.
    """

    text: str
    forbids: bool


# Field -> (words, whether a difference forbids to go on within an epoch).
_MAY_BE_MEANT = {
    "seed": ("the seed", True),
    "shuffle": ("shuffle", True),
    "global_batch_size": ("the global batch size", True),
    "metrics": ("the metrics", True),
    "loss": ("the loss", False),
    "class_weight": ("class_weight", False),
    "sync_every": ("sync_every", False),
    "validation_rows": ("the rows to validate on", False),
}


def differences(saved: Fingerprint, now: Fingerprint, *, mid_epoch: bool) -> list[Difference]:
    """How two fingerprints differ, what forbids to go on first.

    Another model, other columns and another kind of optimizer have no use for the saved numbers. Within an epoch, other rows,
    another batch size or another order of the rows would train some rows twice and others never, and other metrics cannot go
    on with what the saved ones have counted; between epochs they may be meant. So may another loss, other weights of classes
    and other callbacks, at any time. The settings of the optimizer come from the checkpoint, so those of now have no effect.

    Args:
        saved: Of the checkpoint.
        now: Of the fit that is to go on.
        mid_epoch: Whether the checkpoint was taken within an epoch.
    """
    found = []
    if saved.model != now.model:
        found.append(Difference(f"the model: saved with {_model(saved)}, now {_model(now)}", True))
    found += _optimizer_differences(saved.optimizer, now.optimizer)
    if saved.data_schema != now.data_schema:
        found.append(Difference(f"the data: saved with rows of {saved.data_schema}, now {now.data_schema}", True))
    if saved.rows != now.rows:
        found.append(Difference(f"the rows: saved with {_rows(saved.rows)}, now {_rows(now.rows)}", mid_epoch))
    for name, (words, forbids_within) in _MAY_BE_MEANT.items():
        if getattr(saved, name) != getattr(now, name):
            text = f"{words}: saved with {getattr(saved, name)}, now {getattr(now, name)}"
            found.append(Difference(text, forbids_within and mid_epoch))
    if saved.callbacks != now.callbacks:
        before, after = ([*fingerprint.callbacks] for fingerprint in (saved, now))
        found.append(
            Difference(
                f"the callbacks: saved with {before}, now {after}; where the class has changed, it starts anew", False
            )
        )
    return sorted(found, key=lambda difference: not difference.forbids)


def _optimizer_differences(saved: str, now: str) -> list[Difference]:
    if saved == now:
        return []
    before, after = json.loads(saved), json.loads(now)
    if before["class_name"] != after["class_name"]:
        return [Difference(f"the optimizer: saved with {before['class_name']}, now {after['class_name']}", True)]
    settings = sorted({*before["config"], *after["config"]})
    changed = [name for name in settings if before["config"].get(name) != after["config"].get(name)]
    return [
        Difference(
            f"the optimizer's {name}: saved with {before['config'].get(name)!r}, now {after['config'].get(name)!r}",
            False,
        )
        for name in changed
    ]


def _model(fingerprint: Fingerprint) -> str:
    return (
        f"{fingerprint.layers} layers and {fingerprint.parameters:,} parameters (architecture {fingerprint.model[:12]})"
    )


def _rows(rows: tuple[int, ...]) -> str:
    shards = f"{len(rows)} shards" if len(rows) != 1 else "one shard"
    shown = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
    return f"{sum(rows)} in {shards} ({shown})"
