"""One rank's share of a checkpoint as a safetensors file: written off the critical path, read as views of the mapped file.

The training step pays for one copy into memory that was touched before; checksum and disk are for a thread. Files of earlier
shares are written over instead of new ones made, because new pages cost several times what the copy costs. A share has its name
only while it is complete.
"""

from __future__ import annotations

import contextlib
import heapq
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from allreduce_spark.checkpoint.manifest import Checksum
from allreduce_spark.checkpoint.share_format import Array, Layout, Share, header_of, lay_out, read_share
from allreduce_spark.errors import CheckpointError, ConfigError

__all__ = ["LOCAL_FOLDER", "Saved", "Share", "ShareWriter", "deal", "held", "local_shares", "read_share"]

PIECE_BYTES = 4 << 20
LOCAL_FOLDER = "checkpoints"  # of an agent's scratch folder
_SPARE = "spare-"


class Saved(NamedTuple):
    """A share that is complete on the local disk."""

    path: Path
    bytes: int
    checksum: str


class ShareWriter:
    """Writes the shares of one rank, one after the other.

    `copy` is for the training step; `finish`, for a thread, must have returned or raised before the next `copy`. The newest
    `keep` complete shares stay in the folder. An older one's file is written over, unless somebody holds it (`held`).

    Args:
        folder: Private to this machine, and on one file system. Made where it is missing.
        rank: Whose shares these are.
        resumed: The id of the checkpoint that this rank goes on from. Its share and earlier ones count among the newest; those
            that are later were not complete on all ranks, and are removed. None: all are removed.
        keep: How many complete ones stay. With two, and ranks that wait for each other's `finish`, there is always one that all
            ranks have.
        durable: Whether `finish` waits until the disk has it all (fsync).
    """

    def __init__(
        self, folder: Path, rank: int, *, resumed: str | None = None, keep: int = 2, durable: bool = False
    ) -> None:
        self._folder, self._name, self._keep, self._durable = folder, f"share-{rank}.safetensors", keep, durable
        self._layout: Layout | None = None
        self._staged: tuple[str, bytes, memoryview] | None = None  # (id, header, the tensors' bytes)
        self._spare: Path | None = None
        self._own: set[Path] = (
            set()
        )  # only these are ever written over: others may be mapped by whoever resumed from them
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for left in folder.glob(f"{_SPARE}*.{self._name}"):
            left.unlink()
        self._published: list[Path] = []
        for path in sorted(folder.glob(f"*.{self._name}")):
            if resumed is not None and path.name <= f"{resumed}.{self._name}":
                self._published.append(path)
            else:
                path.unlink()

    def copy(self, checkpoint: str, tensors: Mapping[str, Array], about: Mapping[str, Any]) -> None:
        """Take a copy of everything: what the caller changes afterwards is not in the share.

        Args:
            checkpoint: The id of the checkpoint.
            tensors: Numbers or booleans of any shape, by name.
            about: JSON values.

        Raises:
            ConfigError: A tensor is neither numbers nor booleans, or `about` is not JSON.
        """
        if self._staged is not None:
            raise RuntimeError("the share before is not finished")
        key = tuple((name, array.dtype, array.shape) for name, array in tensors.items())
        if self._layout is None or self._layout.key != key:
            self._layout = lay_out(key)
        for name, view in self._layout.views.items():
            np.copyto(view, tensors[name])
        try:
            text = json.dumps(dict(about))
        except TypeError as error:
            raise ConfigError(f"what a checkpoint holds beside its tensors must be plain values: {error}") from error
        self._staged = checkpoint, header_of(self._layout, text), self._layout.staged

    def finish(self) -> Saved:
        """Write down what was copied last, and give it its name.

        Raises:
            CheckpointError: It cannot be written. Complete shares from before are untouched, and `copy` may be called again.
        """
        if self._staged is None:
            raise RuntimeError("nothing was copied")
        (name, header, staged), self._staged = self._staged, None
        partial = self._spare or self._folder / f"{_SPARE}{secrets.token_hex(4)}.{self._name}"
        self._spare = None
        path = self._folder / f"{name}.{self._name}"
        try:
            checksum = _write(partial, header, staged, durable=self._durable)
            os.replace(partial, path)
        except OSError as error:
            partial.unlink(missing_ok=True)  # a full disk wants it back
            raise CheckpointError(f"{str(path)!r} cannot be written: {error}") from error
        self._own.add(path)
        self._published = [*(other for other in self._published if other != path), path]
        while len(self._published) > self._keep:
            self._retire(self._published.pop(0))
        return Saved(path, len(header) + staged.nbytes, checksum)

    def _retire(self, path: Path) -> None:
        """Make the file of an old share the one to write over next, if nobody else can be reading it."""
        spare = self._folder / f"{_SPARE}{secrets.token_hex(4)}.{self._name}"
        with contextlib.suppress(FileNotFoundError):  # whoever cleans up the folder may have been here first
            os.rename(path, spare)  # from here on nobody can get another link, so the count is final
            if path in self._own and self._spare is None and spare.stat().st_nlink == 1:
                self._spare = spare
            else:
                spare.unlink()
        self._own.discard(path)


def local_shares(folder: Path, rank: int) -> dict[str, Path]:
    """The complete shares of a rank that lie in the folder of its `ShareWriter`, by the ids of their checkpoints."""
    return {path.name.partition(".")[0]: path for path in folder.glob(f"[0-9]*.share-{rank}.safetensors")}


@contextlib.contextmanager
def held(path: Path) -> Iterator[Path]:
    """Another name for a share; under it, it stays as it is however many shares the rank writes meanwhile.

    For whoever reads a share of a living `ShareWriter`, to upload it for instance.

    Raises:
        CheckpointError: The share has been given up for newer ones.
    """
    link = path.with_name(f"held-{secrets.token_hex(4)}-{path.name.rpartition('.share-')[2]}")
    try:
        os.link(path, link)
    except OSError as error:
        raise CheckpointError(f"{str(path)!r} cannot be held: {error}") from error
    try:
        yield link
    finally:
        link.unlink(missing_ok=True)


def deal(sizes: Mapping[str, int], world_size: int) -> list[list[str]]:
    """Which rank writes which of the tensors that all have: about as many bytes each, the same answer on every rank.

    The largest first, each to the rank with the fewest bytes so far: at most 4/3 of the best possible (Graham 1969, "Bounds on
    multiprocessing timing anomalies").

    Args:
        sizes: Bytes by name.
        world_size: Number of ranks.

    Returns:
        The names for each rank.

    >>> deal({"a": 4, "b": 1, "c": 3, "d": 2}, 2)
    [['a', 'b'], ['c', 'd']]
    """
    dealt: list[list[str]] = [[] for _ in range(world_size)]
    loads = [(0, rank) for rank in range(world_size)]
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        load, rank = loads[0]
        dealt[rank].append(name)
        heapq.heapreplace(loads, (load + sizes[name], rank))
    return dealt


def _write(path: Path, header: bytes, data: memoryview, *, durable: bool) -> str:
    """Write a file, over an old one where there is one; return its checksum."""
    digest = Checksum()
    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "wb", buffering=0) as file:
        for piece in (memoryview(header), *(data[at : at + PIECE_BYTES] for at in range(0, len(data), PIECE_BYTES))):
            digest.update(piece)
            while piece:
                piece = piece[file.write(piece) :]
        file.truncate()
        if durable:
            os.fsync(file.fileno())
    return digest.hexdigest()
