"""A driver as a process of its own, to be killed or stopped: a rendezvous for two ranks that says where it listens."""

from __future__ import annotations

import sys
import time

from allreduce_spark.config import Timeouts
from allreduce_spark.rendezvous.controller import Hooks
from allreduce_spark.rendezvous.server import Rendezvous

if __name__ == "__main__":
    hooks = Hooks(approve=lambda joins: {"spec": None})
    rendezvous = Rendezvous(2, bytes.fromhex(sys.argv[1]), Timeouts(heartbeat_s=0.1), hooks)
    sys.stdout.write(f"{rendezvous.start('127.0.0.1')[1]}\n")
    sys.stdout.flush()
    time.sleep(300)
