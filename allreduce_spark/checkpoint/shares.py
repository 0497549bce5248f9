"""One rank's share of a checkpoint as a safetensors file: written off the critical path, read as views of the mapped file.

The training step pays for one copy into memory that was touched before; checksum and disk are for a thread. Files of earlier
shares are written over instead of new ones made, because new pages cost several times what the copy costs. A share has its name
only while it is complete.

Types that safetensors' numpy side may not know (bfloat16, float8, complex) travel as the bytes they are, with one more axis;
their names are in the header beside. Nothing in such a file is code.
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import json
import mmap
import os
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from allreduce_spark.errors import CheckpointError, ConfigError

__all__ = ["Saved", "Share", "ShareWriter", "deal", "held", "read_share"]

FORMAT, FORMAT_VERSION = "allreduce_spark.share", 1
PIECE_BYTES = 4 << 20
ALIGNMENT = 64
_SPARE = "spare-"
_CODES = {
    "bool": "BOOL",
    "int8": "I8",
    "uint8": "U8",
    "int16": "I16",
    "uint16": "U16",
    "int32": "I32",
    "uint32": "U32",
    "int64": "I64",
    "uint64": "U64",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
}
_DTYPES = {code: np.dtype(name).newbyteorder("<") for name, code in _CODES.items()}

Array = npt.NDArray[Any]


class Saved(NamedTuple):
    """A share that is complete on the local disk."""

    path: Path
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Share:
    """What a share file holds.

    Attributes:
        tensors: Read-only views of the mapped file, by name. Their bytes stay as they are while somebody has them.
        about: What `ShareWriter.copy` was given.
    """

    tensors: Mapping[str, Array]
    about: dict[str, Any]


@dataclass(frozen=True)
class _Layout:
    """Where each tensor is among the bytes behind the header.

    Attributes:
        key: Names, types and shapes that it is for.
        entries: The header's entries, in the order of the offsets.
        dtypes: Of tensors that travel as plain bytes: the names of their types.
        staged: Memory for the bytes of all tensors.
        views: For each tensor, its place in that memory.
    """

    key: tuple[tuple[str, np.dtype[Any], tuple[int, ...]], ...]
    entries: dict[str, dict[str, Any]]
    dtypes: dict[str, str]
    staged: memoryview
    views: dict[str, Array]


class ShareWriter:
    """Writes the shares of one rank, one after the other.

    `copy` is for the training step; `finish`, for a thread, must have returned or raised before the next `copy`. The newest
    `keep` complete shares stay in the folder. An older one's file is written over, unless somebody holds it (`held`).

    Args:
        folder: Private to this machine, and on one file system. Made where it is missing.
        rank: Whose shares these are.
        resumed: The id of the checkpoint that this rank goes on from. Its share, and earlier ones, count among the newest; later
            ones, which were not complete on all ranks, are removed. None: all are removed.
        keep: How many complete ones stay. With two, and ranks that wait for each other's `finish`, there is always one that all
            ranks have.
        durable: Whether `finish` waits until the disk has it all (fsync).
    """

    def __init__(
        self, folder: Path, rank: int, *, resumed: str | None = None, keep: int = 2, durable: bool = False
    ) -> None:
        self._folder, self._name, self._keep, self._durable = folder, f"share-{rank}.safetensors", keep, durable
        self._layout: _Layout | None = None
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
            self._layout = _lay_out(key)
        for name, view in self._layout.views.items():
            np.copyto(view, tensors[name])
        try:
            text = json.dumps(dict(about))
        except TypeError as error:
            raise ConfigError(f"what a checkpoint holds beside its tensors must be plain values: {error}") from error
        self._staged = checkpoint, _header(self._layout, text), self._layout.staged

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
            sha256 = _write(partial, header, staged, durable=self._durable)
            os.replace(partial, path)
        except OSError as error:
            partial.unlink(missing_ok=True)  # a full disk wants it back
            raise CheckpointError(f"{str(path)!r} cannot be written: {error}") from error
        self._own.add(path)
        self._published = [*(other for other in self._published if other != path), path]
        while len(self._published) > self._keep:
            self._retire(self._published.pop(0))
        return Saved(path, len(header) + staged.nbytes, sha256)

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


def read_share(path: Path) -> Share:
    """Map a share file.

    Raises:
        ConfigError: It is no share, is damaged or cut off, or is of a newer version.
        CheckpointError: It cannot be read at all.
    """
    try:
        with path.open("rb") as file:
            head = file.read(8)
            if len(head) < 8 or head[:1] == b"\x80" or head[:4] == b"PK\x03\x04":
                raise ConfigError(f"{str(path)!r} is no share of a checkpoint: {_what_it_is(head)}.")
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        # The format's own library makes sure that offsets, shapes and length fit each other.
        with safe_open(path, framework="numpy"):
            pass
    except SafetensorError as error:
        raise ConfigError(f"{str(path)!r} is damaged, or was not written to its end: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{str(path)!r} cannot be read: {error}") from error
    start = 8 + int.from_bytes(head, "little")
    entries = json.loads(mapped[8:start])
    metadata = entries.pop("__metadata__", {})
    if metadata.get("format") != FORMAT:
        raise ConfigError(
            f"{str(path)!r} is a safetensors file, but no share of a checkpoint: its header does not say so."
        )
    try:
        if int(metadata["version"]) > FORMAT_VERSION:
            raise ConfigError(
                f"{str(path)!r} was written by a newer version of allreduce-spark (share format {metadata['version']}; this "
                f"one reads up to {FORMAT_VERSION}): update allreduce-spark."
            )
        dtypes = json.loads(metadata["dtypes"])
        tensors = {name: _view(mapped, start, entry, dtypes.get(name)) for name, entry in entries.items()}
        return Share(tensors, dict(json.loads(metadata["about"])))
    except ConfigError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{str(path)!r} is damaged: its header cannot be understood ({error!r}).") from error


def _lay_out(key: tuple[tuple[str, np.dtype[Any], tuple[int, ...]], ...]) -> _Layout:
    # The widest types first: then every tensor begins at a multiple of its type's width, with no gap, which the format forbids.
    entries: dict[str, dict[str, Any]] = {}
    dtypes: dict[str, str] = {}
    offset = 0
    for name, dtype, shape in sorted(key, key=lambda item: (-item[1].itemsize, item[0])):
        size = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        code, stored = _CODES.get(dtype.name), list(shape)
        if code is None:
            _check_plain(name, dtype)
            code, stored, dtypes[name] = "U8", [*shape, dtype.itemsize], dtype.name
        entries[name] = {"dtype": code, "shape": stored, "data_offsets": [offset, offset + size]}
        offset += size
    memory = mmap.mmap(-1, max(offset, 1))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(
            mmap.MADV_HUGEPAGE
        )  # the first copy has to make the pages: large ones take a quarter of the time
    views = {}
    for name, dtype, shape in key:
        begin, end = entries[name]["data_offsets"]
        views[name] = np.frombuffer(memory, np.uint8, end - begin, begin).view(dtype.newbyteorder("<")).reshape(shape)
    return _Layout(key, entries, dtypes, memoryview(memory)[:offset], views)


def _check_plain(name: str, dtype: np.dtype[Any]) -> None:
    if dtype.kind not in "fcV" or dtype.fields is not None or dtype.hasobject:
        raise ConfigError(
            f"{name!r} cannot be in a checkpoint: its type is {dtype}, and tensors are numbers or booleans."
        )


def _header(layout: _Layout, about: str) -> bytes:
    metadata = {"format": FORMAT, "version": str(FORMAT_VERSION), "dtypes": json.dumps(layout.dtypes), "about": about}
    text = json.dumps({"__metadata__": metadata, **layout.entries}).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _write(path: Path, header: bytes, data: memoryview, *, durable: bool) -> str:
    """Write a file, over an old one where there is one; return its SHA-256."""
    digest = hashlib.sha256()
    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "wb", buffering=0) as file:
        for piece in (memoryview(header), *(data[at : at + PIECE_BYTES] for at in range(0, len(data), PIECE_BYTES))):
            digest.update(piece)
            while piece:
                piece = piece[file.write(piece) :]
        file.truncate()
        if durable:
            os.fsync(file.fileno())
    return digest.hexdigest()


def _view(mapped: mmap.mmap, start: int, entry: dict[str, Any], dtype_name: str | None) -> Array:
    begin, end = entry["data_offsets"]
    if dtype_name is None:
        dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
    else:
        dtype, shape = _plain_dtype(dtype_name), entry["shape"][:-1]
    return np.frombuffer(mapped, np.uint8, end - begin, start + begin).view(dtype).reshape(shape)


def _plain_dtype(name: str) -> np.dtype[Any]:
    with contextlib.suppress(ImportError):
        import ml_dtypes  # noqa: F401 - numpy then knows bfloat16 and its like; it comes with TensorFlow
    dtype = np.dtype(name)
    _check_plain(name, dtype)
    return dtype


def _what_it_is(head: bytes) -> str:
    if len(head) < 8:
        return "it is empty" if not head else "it was not written to its end"
    if head[:1] == b"\x80":
        return "it is a pickle, which could run any code while it is read, so it is not loaded"
    return "it is a zip archive, such as a Keras model or a checkpoint of another library"
