"""Work on a store, by a thread that may hang: a file system that does not answer holds nobody up for longer than is allowed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

from allreduce_spark.errors import ConfigError

__all__ = ["within"]

T = TypeVar("T")


def _in_thread(work: Callable[[], None]) -> None:
    # A daemon: a store that hangs is not to keep the process from its end, as the threads of an executor do.
    threading.Thread(target=work, name="allreduce-spark-store", daemon=True).start()


def within(
    timeout_s: float,
    path: str,
    work: Callable[[], T],
    start: Callable[[Callable[[], None]], object] = _in_thread,
) -> T:
    """What `work` returns, or raises.

    Args:
        timeout_s: How long it is waited for.
        path: Of the store, for the error.
        start: Has another thread call what it is given.

    Raises:
        ConfigError: It has not come to its end in time. It may come to it yet.
    """
    answer: Future[T] = Future()

    def settle() -> None:
        try:
            answer.set_result(work())
        except BaseException as error:  # noqa: BLE001  whoever waits gets it
            answer.set_exception(error)

    start(settle)
    if not wait([answer], timeout_s).done:
        raise ConfigError(
            f"the store of the checkpoints, {path!r}, has not answered for {timeout_s:g} s. Setting: Timeouts.checkpoint_s"
        )
    return answer.result()
