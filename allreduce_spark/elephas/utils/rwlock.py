"""`RWLock`: many readers at once, or one writer alone."""

from __future__ import annotations

import threading

__all__ = ["RWLock"]


class RWLock:
    """A lock that several readers share and a writer holds alone. Waiting writers go before new readers."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._readers = 0
        self._writing = False
        self._writers_waiting = 0

    def acquire_read(self) -> None:
        """Wait until nobody writes or waits to write."""
        with self._changed:
            self._changed.wait_for(lambda: not self._writing and not self._writers_waiting)
            self._readers += 1

    def acquire_write(self) -> None:
        """Wait until nobody reads or writes."""
        with self._changed:
            self._writers_waiting += 1
            try:
                self._changed.wait_for(lambda: not self._writing and not self._readers)
            finally:
                self._writers_waiting -= 1
            self._writing = True

    def release(self) -> None:
        """Give back what this thread holds, the reader's part or the writer's.

        Raises:
            RuntimeError: Nobody holds the lock.
        """
        with self._changed:
            if self._writing:
                self._writing = False
            elif self._readers:
                self._readers -= 1
            else:
                raise RuntimeError("release() of an RWLock that nobody holds")
            self._changed.notify_all()
