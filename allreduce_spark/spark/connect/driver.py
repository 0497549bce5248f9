"""The driver of a barrier stage under Spark Connect: `python -m allreduce_spark.spark.connect.driver`, beside rank 0's agent.

It is what `SparkModel.fit` is elsewhere while a stage runs: rendezvous, approval of the rows, coordinator of the checkpoints. A
process of its own, because a Spark worker that imports TensorFlow for seconds cannot answer heartbeats meanwhile, and because
it must not end when its task is told to. It logs to the executor's stderr, progress as well.

What came of the stage is for the task to answer. One that is stuck does not: then the process kills it, which loses the stage.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from allreduce_spark.checkpoint.coordinator import Coordinator
from allreduce_spark.checkpoint.fingerprint import Fingerprint
from allreduce_spark.checkpoint.manifest import Manifest
from allreduce_spark.config import Checkpoint, Recovery, Timeouts
from allreduce_spark.rendezvous.controller import failure_on_driver
from allreduce_spark.rendezvous.group import Failure, Join
from allreduce_spark.rendezvous.protocol import Phase
from allreduce_spark.rendezvous.recovery import Restarts, place_of
from allreduce_spark.rendezvous.server import Rendezvous
from allreduce_spark.spark.hosting import EachEpochOnce, rendezvous_for
from allreduce_spark.spark.recovery import Safety, coordinate
from allreduce_spark.training.forking import die_with

__all__ = ["END", "OUTCOME", "Order", "Outcome", "end_task"]

log = logging.getLogger("allreduce_spark.driver")

OUTCOME, END, _ORDER = "outcome.json", "end", "order.json"
POLL_S = 0.05

Approve = Callable[[Sequence[Join]], dict[str, Any]]


@dataclass(frozen=True)
class Order:
    """What the client has decided about a barrier stage.

    Attributes:
        num_ranks, num_shards: Of the stage; of the whole fit.
        timeouts: Deadlines.
        backend: What the ranks are to reduce by, as `config.BACKENDS` names it.
        max_restarts: How often in a row ranks may be started again within the stage.
        checkpoint: Which checkpoints are kept, and where.
        resumed: `Manifest.to_json()` of what the stage goes on from; None from the beginning.
        of_this_fit: Whether that is of an earlier stage of the same fit.
        fingerprint: `Fingerprint.to_json()` of the fit, but for its rows; None for a function, which has neither.
        with_validation_data: Whether there are rows of the role "validation".
        ranks_per_gpu: How many ranks may share a GPU.
        keras_environment: See `AgentTask`; the driver's process takes it, too.
    """

    num_ranks: int
    num_shards: int
    timeouts: Timeouts
    backend: str
    max_restarts: int
    checkpoint: Checkpoint
    resumed: dict[str, Any] | None = None
    of_this_fit: bool = False
    fingerprint: dict[str, Any] | None = None
    with_validation_data: bool = False
    ranks_per_gpu: int = 1
    keras_environment: dict[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        fields = {**dataclasses.asdict(self), "checkpoint": self.checkpoint.to_json()}
        (folder / _ORDER).write_text(json.dumps(fields))

    @classmethod
    def read(cls, folder: Path) -> Order:
        fields = json.loads((folder / _ORDER).read_bytes())
        fields["timeouts"] = Timeouts(**fields["timeouts"])
        fields["checkpoint"] = Checkpoint.from_json(fields["checkpoint"])
        return cls(**fields)


@dataclass(frozen=True)
class Outcome:
    """What came of a barrier stage.

    Attributes:
        failure: The first cause; None after a success.
        stage_is_lost: Whether another stage may do better.
        place: (epoch, step) of the rank that had come furthest; (-1, -1) before the first step.
    """

    failure: Failure | None
    stage_is_lost: bool = False
    place: tuple[int, int] = (-1, -1)

    def write(self, folder: Path) -> None:
        """To the file `OUTCOME`, which is complete once it is there."""
        unfinished = folder / f"{OUTCOME}-unfinished"
        unfinished.write_text(json.dumps(dataclasses.asdict(self)))
        unfinished.rename(folder / OUTCOME)

    @classmethod
    def from_json(cls, text: bytes) -> Outcome:
        fields = json.loads(text)
        failure = fields["failure"]
        if failure is not None:
            failure = Failure(**{**failure, "log_tail": tuple(failure["log_tail"])})
        return cls(failure, fields["stage_is_lost"], tuple(fields["place"]))


def main() -> None:
    parser = argparse.ArgumentParser(description="Leads the ranks of a stage. Not for people: rank 0's task starts it.")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--parent", type=int, required=True)
    arguments = parser.parse_args()
    die_with(arguments.parent)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(name)s %(levelname)s: %(message)s")
    folder = arguments.folder
    order = Order.read(folder)
    try:
        outcome = _lead(folder, order, arguments.host)
    except BaseException as error:  # noqa: BLE001  whatever it is, the client is to hear of it
        outcome = Outcome(failure_on_driver(error))
    outcome.write(folder)
    _say_no_more()
    if outcome.failure is not None:
        end_task(arguments.parent, outcome.failure, order.timeouts.teardown_s)


def end_task(task: int, failure: Failure, after_s: float) -> None:
    """Kill the task that has not answered with a failure within `after_s`; one that has, ends this process before.

    Nobody else would: to Spark, a worker that is stopped is one that works. The failure is lost with it, but for the log; the
    client hears of a worker that has died, and so of a stage that may be tried again.
    """
    time.sleep(after_s)
    if os.getppid() == task:
        log.error(
            "rank 0's task is killed, because it has not ended within %g s after the failure of the stage: %s. "
            "Setting: Timeouts.teardown_s", after_s, failure.text,
        )  # fmt: skip
        os.kill(task, signal.SIGKILL)


def _lead(folder: Path, order: Order, host: str) -> Outcome:
    """The stage, from the first agent to the last."""
    resumed = None if order.resumed is None else Manifest.from_json(order.resumed)
    safety = Safety(Recovery(order.max_restarts), order.checkpoint, resumed)
    key = secrets.token_bytes(32)
    approvals: list[Approve] = []  # one, as soon as the model is loaded
    archive = b"" if order.fingerprint is None else (folder / "model.keras").read_bytes()
    with (
        coordinate(safety, archive, order.timeouts.checkpoint_s) as coordinator,
        rendezvous_for(
            order.num_ranks,
            key,
            order.timeouts,
            approve=lambda joins: approvals[0](joins),
            coordinator=coordinator,
            restarts=Restarts(order.max_restarts),
            results=folder,
            on_progress=EachEpochOnce(_log_progress),
            is_ready=lambda: bool(approvals),
        ) as rendezvous,
    ):
        _, port = rendezvous.start(host)
        _say(json.dumps({"port": port, "key": key.hex()}))
        threading.Thread(target=_prepare, args=(folder, order, coordinator, rendezvous, approvals), daemon=True).start()
        give_up_at = time.monotonic() + order.timeouts.import_s
        while not rendezvous.wait(POLL_S):
            if not approvals and time.monotonic() > give_up_at:
                rendezvous.fail(_not_ready(order.timeouts))
    return Outcome(rendezvous.failure, rendezvous.stage_is_lost, place_of(rendezvous.stations))


def _prepare(
    folder: Path, order: Order, coordinator: Coordinator, rendezvous: Rendezvous, approvals: list[Approve]
) -> None:
    """Load what the rows are to be compared with. Agents bring them to disk meanwhile."""
    try:
        approvals.append(_approval(folder, order, coordinator))
    except BaseException as error:  # noqa: BLE001  without it, no rank starts
        rendezvous.fail(failure_on_driver(error))


def _not_ready(timeouts: Timeouts) -> Failure:
    return Failure(
        "RendezvousTimeoutError",
        f"the driver's process beside rank 0 has not imported Keras and loaded the model within {timeouts.import_s:g} s. "
        "Setting: Timeouts.import_s",
        phase=Phase.JOIN.value,
    )


def _say(word: str) -> None:
    """The one line for the task; what is printed after it is for the log."""
    sys.stdout.write(word + "\n")
    sys.stdout.flush()
    _say_no_more()


def _say_no_more() -> None:
    """A task that still waits for the line knows then that there is none."""
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())


def _approval(folder: Path, order: Order, coordinator: Coordinator) -> Approve:
    # Here, not above: this imports TensorFlow.
    from allreduce_spark.spark.approval import approve_fit, approve_function

    if order.fingerprint is None:
        return partial(approve_function, backend=order.backend, ranks_per_gpu=order.ranks_per_gpu)
    from allreduce_spark.training.cores import use_cores
    from allreduce_spark.training.job import Job, load_job

    use_cores(1)
    job = Job.read(folder)
    model, _ = load_job(job)
    return partial(
        approve_fit,
        model=model,
        config=job.config,
        fingerprint=Fingerprint.from_json(order.fingerprint),
        with_validation_data=order.with_validation_data,
        coordinator=coordinator,
        of_this_fit=order.of_this_fit,
        backend=order.backend,
        ranks_per_gpu=order.ranks_per_gpu,
    )


def _log_progress(fields: dict[str, Any]) -> None:
    if "phase" in fields:
        log.info("phase: %s", fields["phase"])
    elif fields["epoch_done"]:
        logs = " - ".join(f"{name}: {value:.4g}" for name, value in fields["logs"].items())
        log.info("epoch %d - %d steps - %s", fields["epoch"] + 1, fields["steps"], logs)


if __name__ == "__main__":
    main()
