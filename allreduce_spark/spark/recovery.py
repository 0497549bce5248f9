"""What a fit goes on from, and where its checkpoints go: the driver's side, before the first rank starts."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

from allreduce_spark.checkpoint.coordinator import Coordinator
from allreduce_spark.checkpoint.fingerprint import Fingerprint, differences
from allreduce_spark.checkpoint.manifest import File, Manifest
from allreduce_spark.checkpoint.patience import within
from allreduce_spark.checkpoint.store import Store
from allreduce_spark.config import Checkpoint, Recovery
from allreduce_spark.errors import ConfigError
from allreduce_spark.launch.scratch import scratch_folder

__all__ = ["Safety", "check_min_ranks", "check_resumable", "check_resume", "coordinate", "newest_checkpoint"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Safety:
    """How a fit is kept safe.

    Attributes:
        recovery: How much misfortune it survives.
        checkpoint: When its state is saved, and where.
        resumed: What it goes on from; None from the beginning.
    """

    recovery: Recovery = field(default_factory=Recovery)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    resumed: Manifest | None = None

    @property
    def saves(self) -> Checkpoint | None:
        """The settings by which ranks save their state; None where nobody would ever read it."""
        return self.checkpoint if self.recovery.max_restarts or self.checkpoint.path else None


def check_resume(checkpoint: Checkpoint | None, resume: object) -> bool:
    """Whether the arguments `checkpoint` and `resume` of a fit ask to go on from what is there.

    Raises:
        ConfigError: They make no sense, or do not fit each other.
    """
    if checkpoint is not None and not isinstance(checkpoint, Checkpoint):
        raise ConfigError(f"checkpoint must be a Checkpoint or None, got {checkpoint!r}.")
    if resume not in ("auto", "never"):
        raise ConfigError(f"resume must be 'auto' or 'never', got {resume!r}.")
    if resume == "auto" and (checkpoint is None or checkpoint.path is None):
        raise ConfigError("resume='auto' needs a place to look at: pass checkpoint=Checkpoint(path).")
    return resume == "auto"


def check_min_ranks(min_ranks: int | None, num_ranks: int | None) -> None:
    """Make sure that a fit of `num_ranks` ranks, None for as many as there are slots, may train with as few as `min_ranks`.

    Raises:
        ConfigError: It may not, because these are more.
    """
    if min_ranks is not None and num_ranks is not None and min_ranks > num_ranks:
        raise ConfigError(
            f"min_ranks={min_ranks} is more than num_ranks={num_ranks}, the number of ranks that the fit has where there are "
            f"slots for all: lower min_ranks to {num_ranks} or less, or raise num_ranks. (Where num_ranks is not given, a fit "
            "that goes on from a checkpoint has as many as it had.)"
        )


def newest_checkpoint(path: str, timeout_s: float) -> Manifest | None:
    """The last whole checkpoint of the store at `path`; None where there is none.

    Raises:
        ConfigError: The store cannot be read, or has not answered in time.
    """
    return within(timeout_s, path, lambda: Store(path).latest())


@contextlib.contextmanager
def coordinate(safety: Safety, archive: bytes, timeout_s: float) -> Iterator[Coordinator]:
    """The coordinator of a fit; at the end everything that it was told of is in the store.

    Args:
        archive: The untrained model, as a `.keras` file.
        timeout_s: How long the store is waited for.

    Raises:
        ConfigError: The store cannot be used, does not answer, or holds the checkpoints of another fit.
    """
    path, resumed = safety.checkpoint.path, safety.resumed
    if path is None:
        coordinator = Coordinator(safety.checkpoint)
    else:
        store, model = within(timeout_s, path, partial(_open_store, path, resumed, archive))
        coordinator = Coordinator(safety.checkpoint, store, model=model, resumed=resumed, timeout_s=timeout_s)
    if resumed:
        log.info("going on from checkpoint %s of %s: epoch %d, step %d", resumed.id, path, resumed.epoch, resumed.step)
    with contextlib.closing(coordinator):
        yield coordinator


def _open_store(path: str, resumed: Manifest | None, archive: bytes) -> tuple[Store, File]:
    store = Store(path)
    store.begin(resumed.id if resumed else None)
    with scratch_folder() as folder:
        local = folder / "model.keras"
        local.write_bytes(archive)
        return store, store.put_model(local)


def check_resumable(resumed: Manifest, now: Fingerprint, *, of_this_fit: bool) -> None:
    """Make sure that the fit may go on from a checkpoint; what is only to be told is logged.

    Args:
        of_this_fit: An earlier barrier stage of the fit had come so far. Rows that are not the same when Spark makes them again
            are told, and no reason to give up.

    Raises:
        ConfigError: It may not.
    """
    saved = Fingerprint.from_json(resumed.fingerprint)
    found = differences(saved, now, mid_epoch=resumed.step > 0)
    forbidding = [difference.text for difference in found if difference.forbids and not of_this_fit]
    if forbidding:
        raise ConfigError(
            f"the fit cannot go on from checkpoint {resumed.id}, which is of another one:\n  "
            + "\n  ".join(forbidding)
            + "\nPass what was passed then, or let Checkpoint.path name a folder of its own for this fit."
        )
    for difference in found:
        log.warning("the fit goes on from checkpoint %s, but not all is as it was: %s", resumed.id, difference.text)
