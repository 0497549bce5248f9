"""The bytes of a share file: safetensors with a header that says what it is, so that any program can read the tensors.

Types that safetensors' numpy side may not know (bfloat16, float8, complex) travel as the bytes they are, with one more axis;
their names are in the header beside. Nothing in such a file is code.
"""

from __future__ import annotations

import contextlib
import json
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from allreduce_spark.errors import CheckpointError, ConfigError

__all__ = ["Array", "Layout", "Share", "header_of", "lay_out", "read_share"]

FORMAT, FORMAT_VERSION = "allreduce_spark.share", 1
ALIGNMENT = 64
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
class Layout:
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


def lay_out(key: tuple[tuple[str, np.dtype[Any], tuple[int, ...]], ...]) -> Layout:
    """Give each tensor its place, and make the memory for them; `key` as in `Layout`.

    Raises:
        ConfigError: A tensor is neither numbers nor booleans.
    """
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
    # The first copy has to make the pages, and large ones take a quarter of the time. Not every kernel has them.
    with contextlib.suppress(AttributeError, OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    views = {}
    for name, dtype, shape in key:
        begin, end = entries[name]["data_offsets"]
        views[name] = np.frombuffer(memory, np.uint8, end - begin, begin).view(dtype.newbyteorder("<")).reshape(shape)
    return Layout(key, entries, dtypes, memoryview(memory)[:offset], views)


def _check_plain(name: str, dtype: np.dtype[Any]) -> None:
    if dtype.kind not in "fcV" or dtype.fields is not None or dtype.hasobject:
        raise ConfigError(
            f"{name!r} cannot be in a checkpoint: its type is {dtype}, and tensors are numbers or booleans."
        )


def header_of(layout: Layout, about: str) -> bytes:
    """The bytes before the tensors; `about` is JSON."""
    metadata = {"format": FORMAT, "version": str(FORMAT_VERSION), "dtypes": json.dumps(layout.dtypes), "about": about}
    text = json.dumps({"__metadata__": metadata, **layout.entries}).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


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
