"""What a rank prints, on its way to the driver: so much per heartbeat, for one that prints without end must not flood it."""

from __future__ import annotations

import time

__all__ = ["Output"]

LINES_PER_BEAT = 500


class Output:
    """Lines that are to be sent, and how many were left out because they were too many.

    Args:
        beat_s: How long it takes until there is room again.
    """

    def __init__(self, beat_s: float) -> None:
        self._beat_s, self._beat_at = beat_s, time.monotonic()
        self._lines: list[str] = []
        self._room, self._left_out = LINES_PER_BEAT, 0

    def add(self, lines: list[str]) -> None:
        """Keep as many of these lines as there is room for."""
        kept = lines[: self._room]
        self._lines += kept
        self._room -= len(kept)
        self._left_out += len(lines) - len(kept)

    def take(self, *, last: bool = False) -> str:
        """What is to be sent now; "" where it is nothing.

        Args:
            last: Whether what was left out is to be told even before there is room again.
        """
        now = time.monotonic()
        if last or now - self._beat_at >= self._beat_s:
            if self._left_out:
                self._lines.append(f"({self._left_out} lines are left out here)")
            self._room, self._left_out, self._beat_at = LINES_PER_BEAT, 0, now
        text, self._lines = "\n".join(self._lines), []
        return text
