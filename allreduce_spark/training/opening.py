"""Opening a rank's communicator, by the backend that the driver has chosen."""

from __future__ import annotations

import os
import socket

from allreduce_spark.communicator.base import Communicator
from allreduce_spark.rendezvous.gloo_store import serve_gloo
from allreduce_spark.world import World

__all__ = ["open_communicator"]


def open_communicator(backend: str, world: World, timeout_s: float, collective_s: float) -> Communicator:
    """Find the other ranks, over the connection that `PMI_FD` names, and open the communicator of all.

    Args:
        backend: "mpi", "horovod" or "horovod-mpi".
        world: This rank's place.
        timeout_s: Seconds to wait for the other ranks to come.
        collective_s: Seconds that a collective in a compiled graph waits for them.

    Raises:
        AllReduceSparkError: What `open_mpi` or `open_horovod` raise; the backend's library is missing.
    """
    # Not above: neither library may be loaded before a rank has been forked.
    if backend == "mpi":
        from allreduce_spark.communicator.mpi import open_mpi

        return open_mpi(world, timeout_s)
    from allreduce_spark.communicator.horovod import open_horovod

    if backend == "horovod-mpi":
        return open_horovod(world, timeout_s, controller="mpi", collective_s=collective_s)
    with socket.socket(fileno=os.dup(int(os.environ["PMI_FD"]))) as connection:
        connection.settimeout(timeout_s)
        with serve_gloo(connection) as store:
            return open_horovod(world, timeout_s, gloo_store=store, collective_s=collective_s)
