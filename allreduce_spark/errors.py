"""Every exception that allreduce_spark raises on purpose.

    AllReduceSparkError
    ├── ConfigError (ValueError)              a setting or an argument cannot work; raised before any rank starts
    │   └── MissingDependencyError (ImportError)  a package or program that this needs is not installed
    ├── DataError (ValueError)                a row, a column or a label cannot be trained on
    ├── RendezvousError                       the driver and the agents could not meet
    │   ├── AuthenticationError               the other end does not hold the key of this fit
    │   ├── ProtocolError                     the other end sent bytes that are no frame of ours
    │   └── RendezvousTimeoutError (TimeoutError)  somebody did not come in time
    ├── CollectiveError                       an all-reduce, broadcast, allgather or barrier failed
    │   └── CollectiveTimeoutError (TimeoutError)  the other ranks did not come in time
    ├── RankFailedError                       a rank or its agent died or raised; names the first one that did
    ├── CheckpointError (OSError)             a checkpoint could not be written or read; training can go on
    ├── SearchError                           a hyper-parameter search has found nothing
    └── CancelledError                        the Spark job of a fit was cancelled

Catching `AllReduceSparkError` catches them all; the built-in class in brackets is a second base, for callers who expect it.
"""

from __future__ import annotations

__all__ = [
    "AllReduceSparkError",
    "AuthenticationError",
    "CancelledError",
    "CheckpointError",
    "CollectiveError",
    "CollectiveTimeoutError",
    "ConfigError",
    "DataError",
    "MissingDependencyError",
    "ProtocolError",
    "RankFailedError",
    "RendezvousError",
    "RendezvousTimeoutError",
    "SearchError",
]


class AllReduceSparkError(Exception):
    """The base of all errors that this library raises on purpose."""


class ConfigError(AllReduceSparkError, ValueError):
    """A setting or an argument cannot work. Raised on the driver before any rank starts, wherever it can be known there."""


class MissingDependencyError(ConfigError, ImportError):
    """A package or a program that the call needs is not installed; the message says how to install it."""


class DataError(AllReduceSparkError, ValueError):
    """A row, a column or a label cannot be trained on; the message names partition, row and both shapes."""


class RendezvousError(AllReduceSparkError, RuntimeError):
    """The driver and the agents could not meet, or lost each other."""


class AuthenticationError(RendezvousError):
    """The other end of a control connection does not hold the key of this fit."""


class ProtocolError(RendezvousError):
    """The other end of a control connection sent bytes that are no frame of ours."""


class RendezvousTimeoutError(RendezvousError, TimeoutError):
    """Somebody did not come in time; the message says who waited for whom, in which phase, how long, and the setting."""


class CollectiveError(AllReduceSparkError, RuntimeError):
    """An all-reduce, broadcast, allgather or barrier failed. The communicator cannot be used any more."""


class CollectiveTimeoutError(CollectiveError, TimeoutError):
    """The other ranks did not come to a collective in time. The communicator cannot be used any more."""


class RankFailedError(AllReduceSparkError, RuntimeError):
    """A rank, or the agent that looks after it, died or raised an exception.

    Attributes:
        rank: The rank that failed first, or None where it is not known.
        host: Its host.
        phase: What it was doing: one of the words of `allreduce_spark.rendezvous.protocol.Phase`.
        epoch, step: The epoch, and the step of that epoch, it was at; both count from 0. None before the first step.
        cause: What happened, in one line or as the rank's traceback.
        log_tail: The last lines that the rank printed, oldest first.
    """

    def __init__(
        self,
        cause: str,
        *,
        rank: int | None = None,
        host: str | None = None,
        phase: str | None = None,
        epoch: int | None = None,
        step: int | None = None,
        log_tail: tuple[str, ...] = (),
    ) -> None:
        self.cause, self.log_tail = cause, log_tail
        self.rank, self.host, self.phase, self.epoch, self.step = rank, host, phase, epoch, step
        where = "the fit failed" if rank is None else f"rank {rank}{f' on {host}' if host else ''} failed first"
        when = f" in phase '{phase}'" if phase else ""
        when += f" at epoch {epoch}, step {step}" if step is not None else ""
        log = "\nlast lines of its log:\n" + "\n".join(f"  | {line}" for line in log_tail) if log_tail else ""
        super().__init__(f"{where}{when}: {cause}{log}")


class CheckpointError(AllReduceSparkError, OSError):
    """A checkpoint could not be written or read: the disk is full, the store cannot be reached, a file is damaged.

    Whoever saves warns and trains on: the checkpoints from before are untouched.
    """


class SearchError(AllReduceSparkError, RuntimeError):
    """No trial of a hyper-parameter search was complete; the message says what became of them."""


class CancelledError(AllReduceSparkError, RuntimeError):
    """The Spark job of a fit was cancelled from outside, for example by `SparkContext.cancelJobGroup`."""
