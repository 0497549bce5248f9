"""What each rank says it is about to do, what a buffer must be for it, and the error where the ranks disagree.

Every implementation exchanges a `Call` of each rank before it moves any data. So ranks that disagree get an error with
both values in it, at once and on all of them, where MPI alone would crash, hang or return garbage.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final

import numpy as np

from allreduce_spark.communicator.base import ReduceOp

__all__ = [
    "CALL_BYTES",
    "Call",
    "allgather_call",
    "allreduce_call",
    "arrays_of_ranks",
    "broadcast_call",
    "disagreement",
    "name_ranks",
    "sizes_of_ranks",
]

CALL_BYTES: Final = 64
_ROWS_BYTES: Final = 8
_WORDS_BYTES: Final = CALL_BYTES - _ROWS_BYTES
_REDUCIBLE: Final = frozenset(np.dtype(name) for name in ("float32", "float64", "int32", "int64"))


@dataclass(frozen=True)
class Call:
    """One rank's next collective.

    Attributes:
        words: The collective, its option, dtype and shape, for people to read. Must be equal on all ranks.
        rows: Length of the first axis in `allgather`, where alone the ranks may differ; 0 elsewhere.
        size_bytes: Of this rank's buffer. For messages only: it is not told to the others.
    """

    words: str
    rows: int = 0
    size_bytes: int = field(default=0, compare=False)

    def __str__(self) -> str:
        return f"{self.words} ({self.size_bytes} bytes)" if self.size_bytes else self.words

    def to_bytes(self) -> bytes:
        """`CALL_BYTES` bytes: the rows, then the words; words that are too long are cut and end in their checksum."""
        return self.rows.to_bytes(_ROWS_BYTES, "little") + _packed(self.words)

    @classmethod
    def from_bytes(cls, data: bytes) -> Call:
        words = data[_ROWS_BYTES:].rstrip(b"\0").decode(errors="replace")
        return cls(words, int.from_bytes(data[:_ROWS_BYTES], "little"))


@lru_cache(maxsize=1024)
def _packed(words: str) -> bytes:
    data = words.encode()
    if len(data) > _WORDS_BYTES:
        checksum = b"...%08x" % zlib.crc32(data)
        data = data[: _WORDS_BYTES - len(checksum)] + checksum
    return data.ljust(_WORDS_BYTES, b"\0")


def allreduce_call(buffer: np.ndarray, op: ReduceOp) -> Call:
    """The call of `allreduce`; ValueError where the buffer cannot be reduced."""
    if buffer.dtype not in _REDUCIBLE:
        raise ValueError(
            f"allreduce takes float32, float64, int32 or int64 in native byte order, got {buffer.dtype}: "
            "convert the buffer, for example with buffer.astype(np.float32)"
        )
    _check_layout(buffer, "allreduce", writable=True)
    return Call(_words("allreduce", op.value, buffer.dtype, buffer.shape), size_bytes=buffer.nbytes)


def broadcast_call(buffer: np.ndarray, root: int, rank: int, world_size: int) -> Call:
    """The call of `broadcast`; ValueError where the buffer cannot be sent or overwritten, or there is no such root."""
    if not 0 <= root < world_size:
        raise ValueError(f"broadcast needs a root among the ranks 0 to {world_size - 1}, got root={root}")
    _check_layout(buffer, "broadcast", writable=rank != root)
    return Call(_words("broadcast", f"root={root}", buffer.dtype, buffer.shape), size_bytes=buffer.nbytes)


def allgather_call(buffer: np.ndarray) -> Call:
    """The call of `allgather`; ValueError where the buffer cannot be sent."""
    _check_layout(buffer, "allgather", writable=False)
    if buffer.ndim == 0:
        raise ValueError("allgather joins arrays of any length, so it needs at least one axis: use buffer.reshape(1)")
    return Call(_words("allgather", "", buffer.dtype, ("*", *buffer.shape[1:])), buffer.shape[0], buffer.nbytes)


def _check_layout(buffer: np.ndarray, collective: str, *, writable: bool) -> None:
    if buffer.dtype.hasobject:
        raise ValueError(f"{collective} sends the bytes of a buffer, but those of dtype {buffer.dtype} are pointers")
    if buffer.dtype.itemsize == 0:
        raise ValueError(f"{collective} needs a dtype of at least one byte, got {buffer.dtype!r}")
    if not buffer.flags.c_contiguous:
        raise ValueError(
            f"{collective} needs a C-contiguous buffer, got strides {buffer.strides} for shape {buffer.shape}: "
            "use numpy.ascontiguousarray, and mind that it makes a copy"
        )
    if writable and not buffer.flags.writeable:
        raise ValueError(f"{collective} writes its result into the buffer, but this one is read-only: pass a copy")


@lru_cache(maxsize=1024)
def _words(collective: str, option: str, dtype: np.dtype, shape: tuple[int | str, ...]) -> str:
    return f"{collective}({option}) {dtype} [{','.join(map(str, shape))}]"


def disagreement(calls: Sequence[Call]) -> str | None:
    """The message for ranks that do not say the same, or None where they do.

    >>> disagreement([Call("barrier()"), Call("close()"), Call("barrier()")])
    'the ranks do not agree on the next collective: rank 0, 2 called barrier(); rank 1 called close()'
    """
    ranks_by_words: dict[str, list[int]] = {}
    for rank, call in enumerate(calls):
        ranks_by_words.setdefault(call.words, []).append(rank)
    if len(ranks_by_words) == 1:
        return None
    sides = "; ".join(f"{name_ranks(ranks)} called {words}" for words, ranks in ranks_by_words.items())
    return f"the ranks do not agree on the next collective: {sides}"


def name_ranks(ranks: Sequence[int]) -> str:
    """`rank 0, 2`, and no more than a few of many."""
    listed = ", ".join(map(str, ranks[:8]))
    return f"rank {listed}" + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")


def sizes_of_ranks(calls: Sequence[Call], buffer: np.ndarray) -> list[int]:
    """How many bytes each rank brings to an `allgather`, to which this one brings `buffer`."""
    row_bytes = math.prod(buffer.shape[1:]) * buffer.itemsize
    return [call.rows * row_bytes for call in calls]


def arrays_of_ranks(gathered: np.ndarray, calls: Sequence[Call], buffer: np.ndarray) -> list[np.ndarray]:
    """What an `allgather` has brought, as one array for each rank; `gathered` are their bytes, one after the other."""
    parts = np.split(gathered, np.cumsum(sizes_of_ranks(calls, buffer))[:-1])
    shapes = [(call.rows, *buffer.shape[1:]) for call in calls]
    return [part.view(buffer.dtype).reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
