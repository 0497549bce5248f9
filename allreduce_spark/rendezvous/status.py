"""The status page: where a rank is, in a few bytes of shared memory that its agent can read at any time.

The rank writes its phase, epoch and step there at every step, which costs it less than a microsecond. The agent puts them
into its heartbeats, and still finds them after the rank was killed. (A message a step would cost more, and the last one
would be lost.)
"""

from __future__ import annotations

import mmap
import os
import struct
from pathlib import Path

from allreduce_spark.rendezvous.protocol import Phase

__all__ = ["StatusPage"]

_PLACE = struct.Struct("=qqq")
_WAITING = struct.Struct("=qq")  # whether it waits for the others now, and how long it has in all, in microseconds
_WISH = struct.Struct("=q")
_BYTES = _PLACE.size + _WAITING.size + _WISH.size
_PHASES = list(Phase)


class StatusPage:
    """Phase, epoch and step of one rank, whether it waits for others, and what is wished of it, in a file that both map.

    A reader may see the values of two neighbouring steps mixed; that is good enough for people and deadlines.
    """

    def __init__(self, path: Path) -> None:
        """Map the page at `path`; make it first where there is none."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(descriptor, _BYTES)
            self._page = mmap.mmap(descriptor, _BYTES)
        finally:
            os.close(descriptor)

    def write(self, phase: Phase, epoch: int = 0, step: int = 0) -> None:
        _PLACE.pack_into(self._page, 0, _PHASES.index(phase), epoch, step)

    def read(self) -> tuple[Phase, int, int]:
        phase, epoch, step = _PLACE.unpack_from(self._page)
        return _PHASES[phase], epoch, step

    def write_waiting(self, is_waiting: bool, waited_s: float) -> None:
        """Whether the rank is in a collective now, and how long it has been in collectives in all."""
        _WAITING.pack_into(self._page, _PLACE.size, is_waiting, int(1e6 * waited_s))

    def read_waiting(self) -> tuple[bool, float]:
        is_waiting, waited_us = _WAITING.unpack_from(self._page, _PLACE.size)
        return bool(is_waiting), waited_us / 1e6

    def ask_to_regroup(self, wish: bool = True) -> None:
        """The driver wants the ranks to end at the next end of an epoch, because it has slots for more of them."""
        _WISH.pack_into(self._page, _PLACE.size + _WAITING.size, wish)

    @property
    def is_to_regroup(self) -> bool:
        return bool(_WISH.unpack_from(self._page, _PLACE.size + _WAITING.size)[0])

    def close(self) -> None:
        self._page.close()
