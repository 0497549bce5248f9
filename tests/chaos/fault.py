"""What a fault is: something that is done to a fit, and what is expected of the fit then."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from scene import Scene, Settings

__all__ = ["FAULTS", "Fault", "fault"]


@dataclass(frozen=True)
class Fault:
    """One way in which a fit may be disturbed.

    Attributes:
        strike: Does it; called when the driver has been started.
        place: Name of the place where it runs.
        settings: Of the fit.
        error: What a fit that cannot succeed has to say; None where it must come to its end.
        said: What the log has to say in any case.
        needs: Programs of the system that it takes, beside what the place does.
        limit_s: When the driver has not ended by then, it hangs.
        around: A context to be entered with the scene, before the driver is started.
    """

    strike: Callable[[Scene], None]
    place: str = "local"
    settings: Settings = field(default_factory=Settings)
    error: str | None = None
    said: str | None = None
    needs: tuple[str, ...] = ()
    limit_s: float = 150.0
    around: Callable[[Scene], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext

    @property
    def name(self) -> str:
        return self.strike.__name__.replace("_", "-")


FAULTS: dict[str, Fault] = {}


def fault(**about: Any) -> Callable[[Callable[[Scene], None]], Callable[[Scene], None]]:
    """Enter a function into `FAULTS`; `about` is as in `Fault`."""

    def enter(strike: Callable[[Scene], None]) -> Callable[[Scene], None]:
        entry = Fault(strike, **about)
        FAULTS[entry.name] = entry
        return strike

    return enter
