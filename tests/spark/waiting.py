"""Waiting for what others bring about; for tests that look at processes, files and Spark while something happens."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

__all__ = ["wait_until"]

T = TypeVar("T")


def wait_until(is_so: Callable[[], T], what: str, limit_s: float) -> T:
    """What `is_so` returns once that is true."""
    deadline = time.monotonic() + limit_s
    while not (value := is_so()):
        assert time.monotonic() < deadline, f"not within {limit_s:g} s: {what}"
        time.sleep(0.05)
    return value
