"""A training function of the user's own as the work of one rank: what `allreduce_spark.run` does on the executors."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cloudpickle

from allreduce_spark.communicator.base import Communicator
from allreduce_spark.config import Timeouts
from allreduce_spark.errors import ConfigError
from allreduce_spark.rendezvous.client import Channel
from allreduce_spark.rendezvous.protocol import Phase
from allreduce_spark.rendezvous.status import StatusPage
from allreduce_spark.training.backends import ours
from allreduce_spark.training.cores import use_cores
from allreduce_spark.training.settings import KerasSettings
from allreduce_spark.training.watched import WatchedCommunicator, limited_by, open_within
from allreduce_spark.world import World

__all__ = ["FunctionJob", "run_function"]

_CALL, _SETTINGS = "call", "function.json"


@dataclass(frozen=True)
class FunctionJob:
    """What every rank is given.

    Attributes:
        call: (function, positional arguments, keyword arguments), by cloudpickle. It comes in the Spark closure, like all of
            the user's code, and never over a socket of ours.
        timeouts: Deadlines.
        keras_settings: Those of Keras itself, as the driver has them.
    """

    call: bytes
    timeouts: Timeouts
    keras_settings: KerasSettings

    def files(self) -> dict[str, bytes]:
        """File name -> content, for the agent to lay down."""
        settings = {name: dataclasses.asdict(getattr(self, name)) for name in ("timeouts", "keras_settings")}
        return {_CALL: self.call, _SETTINGS: json.dumps(settings).encode()}

    @classmethod
    def read(cls, folder: Path) -> FunctionJob | None:
        """The job that lies in a scratch folder; None where there is one of another kind."""
        if not (folder / _CALL).exists():
            return None
        settings = json.loads((folder / _SETTINGS).read_bytes())
        timeouts, keras_settings = Timeouts(**settings["timeouts"]), KerasSettings(**settings["keras_settings"])
        return cls((folder / _CALL).read_bytes(), timeouts, keras_settings)


def run_function(job: FunctionJob, channel: Channel, folder: Path, threads: int) -> None:
    """Be one rank: call the function, and leave what it returns as the file `result`.

    Args:
        channel: To the agent.
        folder: The agent's scratch folder.
        threads: This rank's share of the cores.

    Raises:
        Exception: Whatever goes wrong; the caller reports it.
    """
    status = StatusPage(folder / "status")
    use_cores(threads)
    job.keras_settings.set()
    function, arguments, named = cloudpickle.loads(job.call)
    start = channel.receive(job.timeouts.start_s + job.timeouts.spool_s)
    status.write(Phase.INIT)
    world = World(**start.fields["membership"]["world"])
    opened = open_within(job.timeouts, start.fields["approved"]["backend"], world)
    communicator = _CountingCommunicator(opened, status)
    communicator.timeout_s = job.timeouts.collective_s

    with ours.within_steps():
        value = function(communicator, *arguments, **named)
    result = _pickled(value, function, world.rank)
    with limited_by("function_s"):
        communicator.barrier(timeout_s=job.timeouts.function_s)  # others may have much more to do
    status.write(Phase.RESULT)
    (folder / "result").write_bytes(result)
    status.write(Phase.TEARDOWN)
    communicator.close()
    channel.send("done")


def _pickled(value: Any, function: Callable[..., Any], rank: int) -> bytes:
    try:
        return bytes(cloudpickle.dumps(value))
    except Exception as error:  # pickling runs the user's code, so anything can come
        raise ConfigError(
            f"what {function!r} returned on rank {rank} cannot be sent to the driver: {type(error).__name__}: {error}. Return "
            "plain values or arrays: model.get_weights() rather than a model, float(loss) rather than a tensor."
        ) from error


class _CountingCommunicator(WatchedCommunicator):
    """Writes onto the status page how many collectives its rank has done: there are no other steps to see it go on by."""

    def __init__(self, communicator: Communicator, status: StatusPage) -> None:
        super().__init__(communicator, status)
        self._collectives = 0
        status.write(Phase.FUNCTION)

    def _end(self) -> None:
        super()._end()
        self._collectives += 1
        self._status.write(Phase.FUNCTION, 0, self._collectives)
