"""Reading version numbers."""

from __future__ import annotations

__all__ = ["get_minor_version"]


def get_minor_version(version_string: str) -> int:
    """The second number of a version.

    >>> get_minor_version("2.19.1")
    19
    """
    return int(version_string.split(".")[1])
