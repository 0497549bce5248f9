"""The driver's part of checkpoints: make one exist once all its shares are there, and say what ranks go on from.

Its methods are called in the thread of the rendezvous and never wait: what touches the store is done by a thread of its own.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

from allreduce_spark.checkpoint.fingerprint import Fingerprint
from allreduce_spark.checkpoint.manifest import File, Manifest
from allreduce_spark.checkpoint.patience import within
from allreduce_spark.checkpoint.store import Store
from allreduce_spark.config import Checkpoint, Timeouts
from allreduce_spark.errors import CheckpointError

__all__ = ["Coordinator"]

log = logging.getLogger(__name__)

TRIES = 2  # of one local checkpoint without a newer one: it may be what ranks fail of


class Coordinator:
    """Of one fit, over all its generations and barrier stages.

    Args:
        settings: Which checkpoints are kept.
        store: Where they are kept; None where they stay on the disks of the agents.
        model: The archive of the untrained model, as it lies in the store.
        resumed: What the fit goes on from.
        timeout_s: How long the store is waited for.
    """

    def __init__(
        self,
        settings: Checkpoint,
        store: Store | None = None,
        *,
        model: File | None = None,
        resumed: Manifest | None = None,
        timeout_s: float = Timeouts.checkpoint_s,
    ) -> None:
        self._settings, self._store, self._model = settings, store, model
        self._newest = resumed
        self._number = resumed.number if resumed else 0
        self._fingerprint: dict[str, Any] = {}
        self._num_shards = 0
        self._shares: dict[str, dict[int, File]] = {}
        self._num_ranks = 0
        self._tried: dict[str, int] = {}
        self._lock = threading.Lock()  # for what the thread below has learnt
        self._timeout_s = timeout_s
        self._work: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        # A daemon: a store that hangs is not to keep the driver from its end, as the threads of an executor do.
        self._thread = threading.Thread(target=self._do_work, name="allreduce-spark-checkpoints", daemon=True)
        self._thread.start()

    @property
    def newest(self) -> Manifest | None:
        """The last checkpoint in the store that is known to be complete."""
        with self._lock:
            return self._newest

    @property
    def has_begun(self) -> bool:
        """Whether a barrier stage has come to `begin`."""
        return bool(self._fingerprint)

    def begin(self, fingerprint: Fingerprint) -> None:
        """Before the ranks of a barrier stage start, once all rows are known: they may go on from `newest`.

        What is later than that does not count any more, and is forgotten before anything else is put into the store.

        Args:
            fingerprint: What the checkpoints of this fit are checkpoints of.
        """
        self._fingerprint, self._num_shards = fingerprint.to_json(), len(fingerprint.rows)
        newest = self.newest
        if self._store is not None and newest is not None:
            self._work.put(partial(_forget_later, self._store, newest.id))

    def resume(self, saved: Sequence[Collection[str]]) -> dict[str, Any] | None:
        """What a new generation goes on from; what ranks of earlier ones say after this is not listened to.

        Args:
            saved: Per rank, the ids of the checkpoints of which its share lies on its agent's disk.

        Returns:
            `{"id": ...}` of a checkpoint that all agents have; or that and "shares", from number to place in the store; None
            for the beginning.
        """
        self._shares, self._num_ranks = {}, len(saved)
        usable = [id_ for id_ in set.intersection(*map(set, saved)) if self._tried.get(id_, 0) < TRIES]
        local, stored = max(usable, default=""), self.newest
        if local and (stored is None or local >= stored.id):
            self._tried[local] = self._tried.get(local, 0) + 1
            return {"id": local}
        if stored is None or self._store is None:
            return None
        places = {index: self._store.place(stored.id, share.name) for index, share in enumerate(stored.shares)}
        return {"id": stored.id, "shares": places}

    def note(self, rank: int, fields: dict[str, Any]) -> None:
        """A rank's share of a checkpoint is in the store, or could not be brought there."""
        id_ = str(fields["id"])
        if "cause" in fields:
            log.warning("checkpoint %s is given up, and training goes on: %s", id_, fields["cause"])
            self._shares.pop(id_, None)
            return
        self._tried.clear()
        if self._store is None:
            return
        shares = self._shares.setdefault(id_, {})
        shares[rank] = File(str(fields["name"]), int(fields["bytes"]), str(fields["checksum"]))
        if len(shares) == self._num_ranks:
            del self._shares[id_]
            self._number += 1
            manifest = Manifest(
                epoch=int(fields["epoch"]),
                step=int(fields["step"]),
                number=self._number,
                num_shards=self._num_shards,
                shares=tuple(shares[index] for index in range(self._num_ranks)),
                model=self._model,
                saved_at=time.time(),
                fingerprint=self._fingerprint,
                logs=dict(fields["logs"]),
                settings=self._settings,
            )
            self._work.put(partial(self._commit, self._store, manifest))

    def fall_back(self) -> None:
        """Before another barrier stage: make sure that the newest checkpoint is whole, or go back to the one before.

        Raises:
            ConfigError: The store cannot be read, or does not answer.
        """
        if self._store is not None:
            newest = within(self._timeout_s, self._store.path, self._store.latest, self._work.put)
            with self._lock:
                self._newest = newest

    def close(self) -> None:
        """Wait until everything that was noted is in the store."""
        self._work.put(None)
        self._thread.join(self._timeout_s)
        if self._thread.is_alive():
            log.warning(
                "the last checkpoint has not come to its store within %g s, and may be missing there. "
                "Setting: Timeouts.checkpoint_s",
                self._timeout_s,
            )

    def _do_work(self) -> None:
        while work := self._work.get():
            work()

    def _commit(self, store: Store, manifest: Manifest) -> None:
        try:
            store.commit(manifest)
            with self._lock:
                self._newest = manifest
            store.prune(self._settings)
        except CheckpointError as error:
            log.warning("checkpoint %s: %s. Training goes on.", manifest.id, error)
        except Exception:
            log.exception("checkpoint %s could not be kept. Training goes on.", manifest.id)


def _forget_later(store: Store, newest: str) -> None:
    try:
        store.forget_later(newest)
    except Exception:
        log.exception("%s: what is later than checkpoint %s is still there. Training goes on.", store.path, newest)
