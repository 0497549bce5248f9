"""What every Python process of a trial runs at its start: places to stop at, a clock that can be shifted, a way past the proxy.

Python imports this file because its folder is on PYTHONPATH. A fault that must hit a process in the midst of something asks, by
`hold.json` in the folder of the trial, for the process to stop there and say so: then it can be hit without a race.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import json
import os
import sys
import time
from pathlib import Path

FOLDER = Path(os.environ["CHAOS_FOLDER"]) if "CHAOS_FOLDER" in os.environ else None
ANY = DRIVER = -1
HOLD_S = 60.0  # the longest that a process stops for somebody who does not come

_hold = json.loads((FOLDER / "hold.json").read_text()) if FOLDER and (FOLDER / "hold.json").exists() else {}
_passed = 0


def hold(point, rank):
    """Stop here if this is the place, and if nobody has stopped before; go on when the file `released` is there."""
    global _passed
    if (point, rank) != (_hold.get("point"), _hold.get("rank")):
        return
    _passed += 1
    if _passed <= _hold["after"]:
        return
    said = FOLDER / f"held.{os.getpid()}"
    said.write_text(str(os.getpid()))
    try:
        os.link(said, FOLDER / "held")  # complete from the moment it can be seen, and made once
    except FileExistsError:
        return
    deadline = time.monotonic() + HOLD_S
    while not (FOLDER / "released").exists() and time.monotonic() < deadline:
        time.sleep(0.01)


def before(owner, name, deed):
    """Have `deed` called with the arguments of a function before it."""
    original = getattr(owner, name)

    def replacement(*arguments, **named):
        arguments = deed(*arguments, **named) or arguments
        return original(*arguments, **named)

    setattr(owner, name, replacement)


def hold_in_shares(module):
    def half_of_it(path, header, data, *, durable):
        if _hold.get("point") == "write":
            path.write_bytes(header + bytes(data[: len(data) // 2]))
            hold("write", int(os.environ["PMI_RANK"]))

    before(module, "_write", half_of_it)


def hold_in_broadcast(module):
    for name in {"MPICommunicator", "HorovodCommunicator"} & vars(module).keys():
        before(getattr(module, name), "broadcast", lambda self, *_, **__: hold("broadcast", self.rank))


def hold_in_result(module):
    before(module, "write_result", lambda *_: hold("result", 0))


def hold_in_relay(module):
    before(module.Relay, "_send_result", lambda self: hold("upload", self._number))


def hold_in_spool(module):
    before(module.ShardWriter, "write", lambda *_: hold("spool", ANY))


def hold_in_store(module):
    before(module.Store, "commit", lambda *_: hold("commit", DRIVER))


def hold_in_stage(module):
    before(module, "run_stage", lambda *_: hold("stage", DRIVER))


def pass_by_proxy(module):
    """Write down where the driver listens, and connect to the proxy instead where there is one."""

    def go_round(self, address, *others):
        with contextlib.suppress(FileExistsError):
            said = FOLDER / f"driver-address.{os.getpid()}"
            said.write_text(json.dumps(address))
            os.replace(said, FOLDER / "driver-address")
        proxy = FOLDER / "proxy"
        return (self, ("127.0.0.1", int(proxy.read_text())), *others) if proxy.exists() else None

    before(module.Connection, "__init__", go_round)


DEEDS = {
    "allreduce_spark.checkpoint.shares": hold_in_shares,
    "allreduce_spark.checkpoint.store": hold_in_store,
    "allreduce_spark.communicator.horovod": hold_in_broadcast,
    "allreduce_spark.communicator.mpi": hold_in_broadcast,
    "allreduce_spark.training.rank": hold_in_result,
    "allreduce_spark.launch.relay": hold_in_relay,
    "allreduce_spark.data.spool": hold_in_spool,
    "allreduce_spark.spark.ranks": hold_in_stage,
    "allreduce_spark.rendezvous.client": pass_by_proxy,
}


class AfterImport(importlib.abc.MetaPathFinder):
    """Does what there is to do with a module once it has been imported."""

    def find_spec(self, name, path, target=None):
        spec = importlib.machinery.PathFinder.find_spec(name, path, target) if name in DEEDS else None
        if spec is not None and spec.loader is not None:
            original = spec.loader.exec_module

            def exec_module(module):
                original(module)
                DEEDS[name](module)

            spec.loader.exec_module = exec_module
        return spec


def shift_the_clock(file):
    """Let `time.time` be off by the seconds that the file holds. Clocks that only count are not touched."""
    true_time = time.time

    def shifted():
        return true_time() + float(file.read_text() or 0)

    time.time = shifted


if FOLDER is not None:
    sys.meta_path.insert(0, AfterImport())
    if (FOLDER / "clock").exists():
        shift_the_clock(FOLDER / "clock")
