"""A driver as a process of its own, to be killed or stopped: a rendezvous for two ranks.

The only argument is JSON: `key`; `host`, where it listens; `timeouts`; `stops_itself`, whether it does so when the first piece
of the result comes. It prints its port, and at the end what became of the fit.
"""

from __future__ import annotations

import json
import os
import signal
import sys

from allreduce_spark.config import Timeouts
from allreduce_spark.rendezvous.controller import Hooks
from allreduce_spark.rendezvous.server import Rendezvous


def say(line: object) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> None:
    fields = json.loads(sys.argv[1])
    pieces: list[int] = []

    def keep(rank: int, piece: bytes) -> None:
        if fields["stops_itself"] and not pieces:
            os.kill(os.getpid(), signal.SIGSTOP)
        pieces.append(len(piece))

    hooks = Hooks(approve=lambda joins: {"spec": None}, on_result=keep)
    rendezvous = Rendezvous(2, bytes.fromhex(fields["key"]), Timeouts(**fields["timeouts"]), hooks)
    say(rendezvous.start(fields["host"])[1])
    while not rendezvous.wait(60):
        pass
    rendezvous.close()
    say(f"{sum(pieces)} bytes, {rendezvous.failure}")


if __name__ == "__main__":
    main()
