"""The driver's end of the rendezvous: it listens for agents, hears them, watches their deadlines, and waits for them to leave.

`Rendezvous` runs an asyncio loop in one thread of the driver, so nothing in it needs a lock: all state belongs to that
thread. What messages mean is in `controller`, and what decides in `group`. Promises:

* Every agent that has connected gets, exactly once, either `finish` or `abort`.
* After a failure that may pass, all agents get `restart`, and their ranks form a new generation (`recovery.Restarts` decides).
* The failure that is reported is the first that is not the effect of another one (`group.first_cause`).
* Nobody is waited for without a deadline (`config.Timeouts`).

Not promised: that a barrier stage survives the loss of an agent. Then the stage is given up as a whole (`stage_is_lost`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time

from allreduce_spark.config import Timeouts
from allreduce_spark.errors import AllReduceSparkError, RendezvousError
from allreduce_spark.rendezvous.controller import Agent, Controller, Hooks, failure_on_driver
from allreduce_spark.rendezvous.gate import Gate, Guest
from allreduce_spark.rendezvous.group import Failure, Station, overdue, stalled_for_long, stragglers
from allreduce_spark.rendezvous.recovery import Restarts

__all__ = ["Rendezvous"]

log = logging.getLogger(__name__)
rank_log = logging.getLogger("allreduce_spark.rank")


class Rendezvous:
    """The meeting point of one fit.

    Args:
        num_ranks: How many agents must come.
        key: Secret of this fit, at least 32 random bytes; whoever holds it is let in.
        timeouts: Deadlines.
        hooks: What the maker decides and hears.
        restarts: How often ranks may be started again; None for never.

    Attributes:
        address: Where it listens.
    """

    def __init__(
        self, num_ranks: int, key: bytes, timeouts: Timeouts, hooks: Hooks, restarts: Restarts | None = None
    ) -> None:
        self._num_ranks, self._timeouts = num_ranks, timeouts
        self._loop = asyncio.new_event_loop()
        self._controller = Controller(num_ranks, hooks, restarts or Restarts(0), self._loop.call_later)
        self._gate = Gate(key, num_ranks, self.attend)
        self._deserted = threading.Event()
        self._deserted.set()
        self._connected = 0
        self._started_at = time.monotonic()
        self._thread = threading.Thread(target=self._loop.run_forever, name="allreduce-spark-rendezvous", daemon=True)
        self.address: tuple[str, int] | None = None

    def start(self, host: str) -> tuple[str, int]:
        """Listen on a free port of `host` and return the address.

        Raises:
            RendezvousError: Nobody can listen there.
        """
        self._started_at = time.monotonic()
        self._thread.start()
        try:
            self.address = asyncio.run_coroutine_threadsafe(self._listen(host), self._loop).result()
        except (OSError, UnicodeError) as error:  # UnicodeError: it cannot be the name of a host
            self.close()
            raise RendezvousError(
                f"the driver cannot listen on {host!r}: {error}. It is the address that executors use to reach the driver "
                "(spark.driver.bindAddress or spark.driver.host; with Spark Connect, the host of rank 0's executor, as Spark "
                "names it)."
            ) from error
        return self.address

    def wait(self, timeout_s: float) -> bool:
        """Wait until the outcome is known, `timeout_s` at most; return whether it is."""
        return self._controller.finished.wait(timeout_s)

    def begin_start(self) -> None:
        """Count `start_s` from now: until now no agent could have been started. From any thread."""
        self._started_at = time.monotonic()

    @property
    def failure(self) -> Failure | None:
        """What ended the fit, or None where it has not failed."""
        return self._controller.failure

    @property
    def stage_is_lost(self) -> bool:
        """Whether it failed because an agent is gone, so that another barrier stage may do better."""
        return self._controller.stage_is_lost

    @property
    def stations(self) -> list[Station]:
        """Where the ranks are whose agents have come, in any order. They go on moving, in the rendezvous thread."""
        return self._controller.stations

    @property
    def regroups(self) -> bool:
        """Whether the ranks have ended because more of them can go on, and not because their work is done."""
        return self._controller.regroups

    def fail(self, failure: Failure) -> None:
        """End the fit, from any thread. Only the first cause counts."""
        with contextlib.suppress(RuntimeError):  # The loop is closed: the fit is over already.
            self._loop.call_soon_threadsafe(self._controller.fail, failure)

    def regroup(self) -> None:
        """Let the ranks end with the epoch, because more of them can go on. From any thread; may be called again."""
        with contextlib.suppress(RuntimeError):  # The loop is closed: the fit is over already.
            self._loop.call_soon_threadsafe(self._controller.tell_all, "regroup")

    def wait_for_departure(self, timeout_s: float) -> bool:
        """Wait until no agent is connected, `timeout_s` at most; return whether that is so. Their ranks are dead then."""
        return self._deserted.wait(timeout_s)

    def close(self) -> None:
        """Wait for the agents to leave, `teardown_s` at most, then stop listening."""
        if self._loop.is_closed():
            return
        if not self._thread.is_alive():  # never started
            self._loop.close()
            return
        if not self.wait_for_departure(self._timeouts.teardown_s):
            log.warning("agents are still connected %.0f s after the end of the fit", self._timeouts.teardown_s)
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # Everything below runs in the rendezvous thread.

    async def _listen(self, host: str) -> tuple[str, int]:
        address = await self._gate.open(host)
        self._watcher = asyncio.create_task(self._watch())
        return address

    async def _stop(self) -> None:
        self._gate.close()
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def attend(self, guest: Guest) -> None:
        """Listen to one agent for as long as it is there. Strangers do not come so far, so nobody waits for them to go."""
        agent = Agent(guest.send)
        self._connected += 1
        self._deserted.clear()
        try:
            async for message in guest.messages():
                self._controller.hear(agent, message)
        except (OSError, AllReduceSparkError) as error:
            self._controller.lose(agent, str(error))
        except Exception as error:  # noqa: BLE001  A mistake of ours is to end the fit, not only this connection.
            self._controller.fail(failure_on_driver(error))
        else:
            self._controller.lose(agent, "its connection to the driver ended")
        finally:
            self._connected -= 1
            if not self._connected:
                self._deserted.set()

    async def _watch(self) -> None:
        interval_s, was_late = self._timeouts.heartbeat_s, False
        try:
            while not self._controller.finished.is_set():
                slept_at = time.monotonic()
                await asyncio.sleep(interval_s)
                self._controller.tell_all("heartbeat")
                # This process may have been stopped or busy itself: then what agents have said lies there unread.
                was_late = not was_late and time.monotonic() - slept_at > 2 * interval_s
                if was_late:
                    continue
                stations, now = self.stations, time.monotonic()
                for station in stalled_for_long(stations, now, self._timeouts):
                    self._warn_of(station, now)
                for text in stragglers(stations):
                    rank_log.warning(text)
                late = overdue(stations, self._num_ranks, self._started_at, now, self._timeouts)
                if late is not None:
                    self._controller.fail(late)
        except Exception as error:  # noqa: BLE001  without the watch, no deadline would hold
            self._controller.fail(failure_on_driver(error))

    def _warn_of(self, station: Station, now: float) -> None:
        """Name a rank that does not go on, and ask its agent for what the rank is doing."""
        station.warned = True
        rank_log.warning(
            "rank %d on %s has been at epoch %d, step %d for %.0f s; the others wait for it",
            station.rank, station.host, station.epoch, station.step, now - station.changed_at,
        )  # fmt: skip
        self._controller.tell(station.rank, "dump")
