"""The warm process: `python -m allreduce_spark.training`, started by an agent. It imports Keras, and what Keras computes with,
then forks ranks.

A rank reports every failure to its agent, that of the import included, then ends.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
import os
import signal
import socket
import sys
import traceback
from pathlib import Path

from allreduce_spark.errors import AllReduceSparkError, CollectiveError
from allreduce_spark.rendezvous import pmi
from allreduce_spark.rendezvous.client import Channel
from allreduce_spark.training.forking import die_with, fork_ranks

CAUSE_CHARACTERS = 20_000


def main() -> None:
    parser = argparse.ArgumentParser(description="Forks ranks. Not for people: the agent starts it.")
    for name in ("control", "parent", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    arguments = parser.parse_args()
    die_with(arguments.parent)
    _print_stacks_when_asked()
    failure = None
    try:
        # Here, not above: that this takes seconds is why it is done ahead, and it may fail.
        from allreduce_spark.training.rank import run_rank
    except BaseException as error:  # noqa: BLE001  # each rank reports it
        failure = error
    gc.freeze()  # What was imported stays: a rank that looks through it for garbage would copy every page of it.

    request = fork_ranks(socket.socket(fileno=arguments.control))
    # From here on this is a rank.
    os.environ.update(pmi.environment(request.rank, request.num_ranks, request.pmi))
    channel = Channel(socket.socket(fileno=request.channel))
    try:
        if failure is not None:
            raise failure
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


def _print_stacks_when_asked() -> None:
    """Print the Python stacks of all threads upon a crash, and upon SIGUSR1, which does no harm then. Ranks inherit this."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])  # blocked until now, because it would have killed


def _cause(error: BaseException) -> str:
    if isinstance(error, AllReduceSparkError):
        return str(error)
    if isinstance(error, ImportError):
        return f"{type(error).__name__}: {error}. {_way_to_module(error)}"
    hint = ""
    if "unsupported operations when trying to compile graph" in str(error):
        hint = "XLA knows no way out of its graph to the other ranks: compile the model with jit_compile=False.\n"
    stack = "".join(traceback.format_exception(error))
    return hint + f"{type(error).__name__}: {error}\n{stack}"[-CAUSE_CHARACTERS:]


def _way_to_module(error: ImportError) -> str:
    python = f"{sys.executable} on {socket.gethostname()}"
    keras_backend = os.environ.get("KERAS_BACKEND", "tensorflow")  # as on the driver: the agent sees to it
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] not in (keras_backend, "keras"):
        return (
            f"The ranks run {python}: install it there. Modules of your own travel with spark-submit --py-files, or with "
            "SparkContext.addPyFile (with Spark Connect: SparkSession.addArtifacts(path, pyfile=True))."
        )
    smaller = " or [tensorflow-cpu]" if keras_backend == "tensorflow" else ""
    extras = f"'allreduce-spark[{keras_backend}]'{smaller}"
    return f"The executors need Keras 3 and {keras_backend}, as on the driver: install {extras} for {python}."


def _is_consequence(error: BaseException) -> bool:
    """Whether another rank's failure may be behind this one; TensorFlow wraps what the all-reduce raises in the graph."""
    return (
        isinstance(error, CollectiveError) or "CollectiveError" in str(error) or "CollectiveTimeoutError" in str(error)
    )


if __name__ == "__main__":
    main()
