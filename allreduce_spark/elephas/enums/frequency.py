"""`Frequency`: how often asynchronous workers come together."""

from __future__ import annotations

from enum import Enum

__all__ = ["Frequency"]


class Frequency(str, Enum):
    """After every batch, or after every epoch."""

    EPOCH = "epoch"
    BATCH = "batch"
