"""A driver as a process of its own, to be killed or stopped: a rendezvous for two ranks that says where it listens."""

from __future__ import annotations

import sys
import time

from allreduce_spark.config import Timeouts
from allreduce_spark.rendezvous.server import Rendezvous

if __name__ == "__main__":
    rendezvous = Rendezvous(
        2, bytes.fromhex(sys.argv[1]), Timeouts(heartbeat_s=0.1), approve=lambda joins: {"spec": None}
    )
    sys.stdout.write(f"{rendezvous.start('127.0.0.1')[1]}\n")
    sys.stdout.flush()
    time.sleep(300)
