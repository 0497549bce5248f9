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

_PAGE = struct.Struct("=qqq")
_PHASES = list(Phase)


class StatusPage:
    """Phase, epoch and step of one rank, in a file that agent and rank both map.

    A reader may see the values of two neighbouring steps mixed; that is good enough for people and deadlines.
    """

    def __init__(self, path: Path) -> None:
        """Map the page at `path`; make it first where there is none."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(descriptor, _PAGE.size)
            self._page = mmap.mmap(descriptor, _PAGE.size)
        finally:
            os.close(descriptor)

    def write(self, phase: Phase, epoch: int = 0, step: int = 0) -> None:
        _PAGE.pack_into(self._page, 0, _PHASES.index(phase), epoch, step)

    def read(self) -> tuple[Phase, int, int]:
        phase, epoch, step = _PAGE.unpack_from(self._page)
        return _PHASES[phase], epoch, step

    def close(self) -> None:
        self._page.close()
