"""What a check of the doctor returns."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

__all__ = ["Result", "Status", "fail", "ok", "warn"]


class Status(str, Enum):
    """All is well, or it works with a drawback (WARN), or training on this machine will not work (FAIL)."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Result:
    """What a check found.

    Attributes:
        status: Whether something should, or must, be done.
        found: What is there, in a few words.
        advice: What to do about it; empty where all is well.
    """

    status: Status
    found: str
    advice: str = ""


def ok(found: str) -> Result:
    return Result(Status.OK, found)


def warn(found: str, advice: str) -> Result:
    return Result(Status.WARN, found, advice)


def fail(found: str, advice: str) -> Result:
    return Result(Status.FAIL, found, advice)
