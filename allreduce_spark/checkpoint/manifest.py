"""The manifest of a checkpoint: written last, it makes the checkpoint exist; and which checkpoints are kept."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from xxhash import xxh3_128

from allreduce_spark.config import Checkpoint
from allreduce_spark.errors import CheckpointError, ConfigError

__all__ = ["Checksum", "File", "Manifest", "checkpoint_id", "is_checkpoint_id", "kept", "share_name"]

FORMAT, FORMAT_VERSION = "allreduce_spark.checkpoint", 1
# It finds what disks and networks damage, not who meant harm. SHA-256 took more of a core than all else in a checkpoint.
Checksum = xxh3_128
_ID = re.compile(r"\d{6}-\d{8}")
# What Keras's own callbacks take for better when it is larger, and what else has such a name.
_LARGER_IS_BETTER = re.compile(r"acc|auc|precision|recall|f1|fbeta|fmeasure|score|similarity|iou|r2", re.IGNORECASE)


def checkpoint_id(epoch: int, step: int) -> str:
    """The id of a checkpoint from which `step` of `epoch` is the next: its folder's name. Ids sort in the order of training.

    >>> checkpoint_id(3, 250)
    '000003-00000250'
    """
    return f"{epoch:06d}-{step:08d}"


def is_checkpoint_id(name: str) -> bool:
    return _ID.fullmatch(name) is not None


def share_name(index: int, launch: int) -> str:
    """The name of a share in a checkpoint's folder.

    The launch of the rank is part of it, a number that no other launch has, not even one of another driver: so a late upload
    for a rank that is no more never touches a complete checkpoint.
    """
    return f"share-{index}-{launch:x}.safetensors"


@dataclass(frozen=True)
class File:
    """A file of a checkpoint: its name in the folder, its length, and the XXH3 of its content in 32 hexadecimal digits."""

    name: str
    bytes: int
    checksum: str


@dataclass(frozen=True)
class Manifest:
    """What a complete checkpoint consists of.

    Attributes:
        epoch, step: The next optimizer step to take.
        number: How manieth checkpoint of the fit this is, from 1.
        num_shards: Shards of the fit.
        shares: One for each rank, in their order.
        model: The archive of the untrained model, which all checkpoints of a fit share; None where there is none.
        saved_at: Seconds since 1970.
        fingerprint: `Fingerprint.to_json()`.
        logs: Of the epoch that ends here; empty within an epoch.
        settings: The fit's `Checkpoint`, by which these are kept.
    """

    epoch: int
    step: int
    number: int
    num_shards: int
    shares: tuple[File, ...]
    model: File | None
    saved_at: float
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    logs: Mapping[str, Any] = field(default_factory=dict)
    settings: Checkpoint = field(default_factory=Checkpoint)

    @property
    def id(self) -> str:
        return checkpoint_id(self.epoch, self.step)

    @property
    def bytes(self) -> int:
        """Of its own files."""
        return sum(share.bytes for share in self.shares)

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values; `from_json` is the way back."""
        fields = {**dataclasses.asdict(self), "settings": self.settings.to_json()}
        return {"format": FORMAT, "version": FORMAT_VERSION, "id": self.id, **fields}

    @classmethod
    def from_json(cls, fields: Any) -> Manifest:
        """What `to_json` returned.

        Raises:
            CheckpointError: It is something else.
            ConfigError: It was written by a newer version.
        """
        try:
            if fields["format"] != FORMAT:
                raise CheckpointError(
                    f"the manifest is not one of ours: its format is {fields['format']!r}, not {FORMAT!r}"
                )
            version = int(fields["version"])
            if version <= FORMAT_VERSION:
                return cls._from_fields(fields)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the manifest is damaged ({error!r})") from error
        raise ConfigError(
            f"a checkpoint was written by a newer version of allreduce-spark (format {version}; this one reads up to "
            f"{FORMAT_VERSION}): update allreduce-spark."
        )

    @classmethod
    def _from_fields(cls, fields: Mapping[str, Any]) -> Manifest:
        plain = {
            key: fields[key] for key in ("epoch", "step", "number", "num_shards", "saved_at", "fingerprint", "logs")
        }
        shares = tuple(File(**file) for file in fields["shares"])
        model = None if fields["model"] is None else File(**fields["model"])
        manifest = cls(**plain, shares=shares, model=model, settings=Checkpoint.from_json(fields["settings"]))
        if manifest.id != fields["id"] or not all(map(_is_plain, (*shares, *((model,) if model else ())))):
            raise ValueError("its fields contradict each other")
        return manifest


def _is_plain(file: File) -> bool:
    # The names come from a file that anybody may have written: they must not lead out of the folder.
    return "/" not in file.name and not file.name.startswith(".") and file.bytes >= 0 and len(file.checksum) == 32


def kept(manifests: Sequence[Manifest], settings: Checkpoint) -> dict[str, str]:
    """Which checkpoints are kept, and why.

    The newest always is; then come the best, the last `keep`, and every `keep_every`-th, newer before older, as far as
    `max_bytes` reaches.

    Args:
        manifests: All complete ones, oldest first.

    Returns:
        The reasons by id, oldest first.
    """
    reasons: dict[str, list[str]] = {}
    wanted: list[Manifest] = []

    def want(manifest: Manifest, reason: str) -> None:
        if manifest.id not in reasons:
            wanted.append(manifest)
        reasons.setdefault(manifest.id, []).append(reason)

    newest_first = manifests[::-1]
    for manifest in newest_first[:1]:
        want(manifest, "newest")
    best = _best(manifests, settings)
    if best is not None:
        want(best, f"best {settings.keep_best}")
    for manifest in newest_first[: settings.keep]:
        want(manifest, f"last {settings.keep}")
    for manifest in newest_first:
        if settings.keep_every is not None and manifest.number % settings.keep_every == 0:
            want(manifest, f"every {settings.keep_every}")

    room = math.inf if settings.max_bytes is None else settings.max_bytes
    fitting: set[str] = set()
    for manifest in wanted:
        if not fitting or manifest.bytes <= room:
            fitting.add(manifest.id)
            room -= manifest.bytes
    return {manifest.id: ", ".join(reasons[manifest.id]) for manifest in manifests if manifest.id in fitting}


def _best(manifests: Sequence[Manifest], settings: Checkpoint) -> Manifest | None:
    name = settings.keep_best
    known = [manifest for manifest in manifests if _is_number(manifest.logs.get(name or ""))]
    if name is None or not known:
        return None
    larger = settings.best_mode == "max" or (
        settings.best_mode == "auto" and _LARGER_IS_BETTER.search(name) is not None
    )
    return (max if larger else min)(known, key=lambda manifest: float(manifest.logs[name]))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
