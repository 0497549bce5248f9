"""Going on from a checkpoint: each share is read once, by one rank, which gives the others what all need of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from allreduce_spark.checkpoint.files import fetch_file
from allreduce_spark.checkpoint.shares import Share, read_share
from allreduce_spark.communicator.base import Communicator
from allreduce_spark.errors import CheckpointError
from allreduce_spark.training.models.model_bytes import numpy_dtype
from allreduce_spark.training.state import METRICS, Position, SavedState

__all__ = ["Resume", "read_saved_state"]


@dataclass(frozen=True)
class Resume:
    """Where a rank goes on.

    Attributes:
        id: Of the checkpoint.
        shares: By their number, the shares that this rank may read: paths or URIs. Share i is read by rank i % world_size.
    """

    id: str
    shares: Mapping[int, str]

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Resume:
        return cls(fields["id"], {int(number): place for number, place in fields["shares"].items()})


def read_saved_state(resume: Resume, communicator: Communicator, folder: Path) -> SavedState:
    """Read a checkpoint that any number of ranks may have written. All ranks must call.

    Args:
        folder: For copies of shares that are not on this machine.

    Raises:
        CheckpointError: A share is missing, or is not of this checkpoint.
        ConfigError: A share cannot be read.
    """
    rank, world_size = communicator.rank, communicator.world_size
    numbers = sorted(number for number in resume.shares if number % world_size == rank)
    mine = {number: read_share(fetch_file(resume.shares[number], folder)) for number in numbers}
    if not rank and 0 not in mine:
        raise CheckpointError(f"share 0 of the checkpoint {resume.id} is not where rank 0 could read it.")
    root_about = _send_json(mine[0].about if not rank else None, communicator, 0)
    written_by, position = int(root_about["world_size"]), Position(root_about["epoch"], root_about["step"])
    for number in range(rank, written_by, world_size):
        _check(number, mine.get(number), position, resume.id)

    changed = written_by != world_size
    shared: dict[str, np.ndarray] = {}
    of_others: list[dict[str, np.ndarray]] = []
    for number in range(written_by):
        names = [
            name
            for name in (mine[number].tensors if number in mine and number % world_size == rank else ())
            # Metrics of ranks that are no more must not be lost, and new ranks remember what the root does.
            if name.startswith("shared/") or (changed and (number == 0 or name.startswith(METRICS)))
        ]
        tensors = _send(mine.get(number), names, communicator, number % world_size)
        shared |= {name: tensor for name, tensor in tensors.items() if name.startswith("shared/")}
        of_others.append({name: tensor for name, tensor in tensors.items() if not name.startswith("shared/")})

    is_mine = rank in mine
    own = mine[rank].tensors if is_mine else of_others[0]
    metrics = [_metrics(each) for each in (of_others if changed else [own])]
    return SavedState(position, written_by, shared, own, is_mine, mine[rank].about if is_mine else root_about, metrics)


def _check(number: int, share: Share | None, position: Position, name: str) -> None:
    if share is None:
        raise CheckpointError(f"share {number} of the checkpoint {name} is missing.")
    if (share.about["epoch"], share.about["step"]) != (position.epoch, position.step):
        raise CheckpointError(
            f"share {number} is of epoch {share.about['epoch']}, step {share.about['step']}, and not of the checkpoint {name}, "
            f"whose share 0 is of epoch {position.epoch}, step {position.step}."
        )


def _metrics(tensors: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    return [tensors[name] for name in (f"{METRICS}{index}" for index in range(len(tensors))) if name in tensors]


def _send(share: Share | None, names: list[str], communicator: Communicator, root: int) -> dict[str, np.ndarray]:
    """Give all ranks the tensors of `names` from the root's share."""
    is_root = communicator.rank == root
    tensors = {name: share.tensors[name] for name in names} if is_root and share else {}
    about = [[name, tensor.dtype.name, tensor.shape] for name, tensor in tensors.items()]
    received = {}
    for name, dtype, shape in _send_json(about if is_root else None, communicator, root):
        tensor = np.array(tensors[name]) if is_root else np.empty(shape, numpy_dtype(dtype))
        communicator.broadcast(tensor.reshape(-1).view(np.uint8), root)
        received[name] = tensor
    return received


def _send_json(value: Any, communicator: Communicator, root: int) -> Any:
    data = np.frombuffer(json.dumps(value).encode(), np.uint8).copy()
    length = np.array([data.size], np.int64)
    communicator.broadcast(length, root)
    if communicator.rank != root:
        data = np.empty(int(length[0]), np.uint8)
    communicator.broadcast(data, root)
    return json.loads(data.tobytes())
