"""The rank process: `python -m allreduce_spark.training`, started by an agent. Reports every failure to it, then ends."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import faulthandler
import os
import signal
import socket
import sys
import traceback
from pathlib import Path

from allreduce_spark.errors import AllReduceSparkError, CollectiveError
from allreduce_spark.rendezvous.client import Channel

PR_SET_PDEATHSIG = 1
CAUSE_CHARACTERS = 20_000


def main() -> None:
    parser = argparse.ArgumentParser(description="One rank. Not for people: the agent starts it.")
    for name in ("channel", "parent", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    arguments = parser.parse_args()
    _die_with(arguments.parent)
    faulthandler.enable()
    channel = Channel(socket.socket(fileno=arguments.channel))
    try:
        # Here, not above: that this takes seconds is why the process is started early, and it may fail.
        from allreduce_spark.training.rank import run_rank

        run_rank(channel, arguments.folder, arguments.threads)
    except BaseException as error:  # noqa: BLE001  # everything is reported, and ends the process
        traceback.print_exc()
        with contextlib.suppress(OSError):
            channel.send("failed", error=type(error).__name__, cause=_cause(error), consequence=_is_consequence(error))
        code = 1
    else:
        code = 0
    sys.stdout.flush()
    sys.stderr.flush()
    # MPI and TensorFlow both have exit handlers that may wait for other ranks. All that matters is done.
    os._exit(code)


def _die_with(parent: int) -> None:
    """Let the kernel kill this process when its parent dies, whatever the parent dies of."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # It died before we asked.


def _cause(error: BaseException) -> str:
    if isinstance(error, ImportError) and not isinstance(error, AllReduceSparkError):
        return (
            f"{type(error).__name__}: {error}. The executors need TensorFlow and Keras 3: install "
            f"'allreduce-spark[tensorflow]' or [tensorflow-cpu] for {sys.executable} on {socket.gethostname()}."
        )
    if isinstance(error, AllReduceSparkError):
        return str(error)
    return f"{type(error).__name__}: {error}\n{''.join(traceback.format_exception(error))}"[-CAUSE_CHARACTERS:]


def _is_consequence(error: BaseException) -> bool:
    """Whether another rank's failure may be behind this one; TensorFlow wraps what the all-reduce raises in the graph."""
    return (
        isinstance(error, CollectiveError) or "CollectiveError" in str(error) or "CollectiveTimeoutError" in str(error)
    )


if __name__ == "__main__":
    main()
