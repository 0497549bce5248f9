"""Fits that run at once in one driver take turns: a barrier stage starts all its ranks at once or none.

Two threads that both submit a stage for all slots (`CrossValidator(parallelism=2)`, a search) would else have one of them wait
inside Spark, where `start_s` takes it for a cluster that does not answer.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterator

__all__ = ["hold_slots"]

LOOK_EVERY_S = 0.5  # executors come and go without telling

_changed = threading.Condition()
_waiting: deque[object] = deque()
_held = 0
_kind: Hashable = None


@contextlib.contextmanager
def hold_slots(num_ranks: int, count: Callable[[], int], kind: Hashable = None) -> Iterator[None]:
    """Wait until `num_ranks` slots are not in use by another fit of this process, first come, first served, and hold them.

    There is no deadline of its own: whoever is waited for has one for everything it does.

    Args:
        num_ranks: How many slots. More than there are do not wait for more than all other fits to end.
        count: How many slots the application has now.
        kind: What a slot is. Fits whose slots are of different kinds (of another resource profile) do not run side by side:
            how many of both there are at once, nobody counts.
    """
    global _held, _kind
    ticket = object()
    with _changed:
        _waiting.append(ticket)
        try:
            while _waiting[0] is not ticket or (_held and (kind != _kind or _held + num_ranks > count())):
                _changed.wait(LOOK_EVERY_S)
            _held += num_ranks
            _kind = kind
        finally:
            _waiting.remove(ticket)
            _changed.notify_all()
    try:
        yield
    finally:
        with _changed:
            _held -= num_ranks
            _changed.notify_all()
