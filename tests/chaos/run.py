"""Chaos: fits on real Spark, real ranks and real MPI, each disturbed by one fault, which nobody may notice in the result.

`make chaos` runs all faults three times; `python tests/chaos/run.py --list` names them. A trial is right if the fit ends in
time, with the weights of an undisturbed run (to the bit, unless the number of ranks has changed), no checkpoint that was ever
complete is lost, and no process, shared memory or folder is left.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import disks
import killed
import networks
import stopped
from checks import leftovers, longest_pause, orphaned_segments, violations
from fault import FAULTS, Fault
from places import PLACES, why_not
from scene import Scene, Settings

from allreduce_spark.config import BACKENDS

LOG_LINES = 40
FAMILIES = (killed, stopped, networks, disks)  # each enters its faults into FAULTS when it is imported


@dataclass(frozen=True)
class Outcome:
    """Of one trial.

    Attributes:
        wrong: What is; empty where all is well.
        pause_s: The longest time without a step.
        seconds: That the trial took.
    """

    wrong: tuple[str, ...]
    pause_s: float | None
    seconds: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Run trials; returns the exit code: 1 if anything was wrong."""
    options = _parser().parse_args(arguments)
    if options.list:
        for name, fault in FAULTS.items():
            print(f"{name:45} {fault.place:11} {(fault.strike.__doc__ or '').strip()}")
        return 0
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-")))
        folder.mkdir(parents=True, exist_ok=True)
        return run_faults(
            options.faults or list(FAULTS), options.repeats, options.seed, options.backend, folder.resolve()
        )


def run_faults(names: Sequence[str], repeats: int, seed: int, backend: str, folder: Path) -> int:
    """Run each fault so many times; prints a line per trial and a table, and returns the exit code."""
    outcomes: dict[str, list[Outcome]] = {}
    for name in names:
        fault = FAULTS[name]
        if reason := why_not(fault.place, fault.needs):
            print(f"skip  {name}: {reason}", flush=True)
            continue
        for number in range(repeats):
            own_seed = zlib.crc32(f"{seed} {name} {number}".encode())
            reference = _reference(folder, fault, backend)
            outcome = run_trial(fault, folder / f"{name}-{number}", reference, own_seed, backend)
            outcomes.setdefault(name, []).append(outcome)
            pause = "" if outcome.pause_s is None else f"pause {outcome.pause_s:5.1f} s"
            print(
                f"{'FAIL' if outcome.wrong else 'ok':4}  {name:45} #{number}  {pause:14}  {outcome.seconds:5.1f} s",
                flush=True,
            )
            for wrong in outcome.wrong:
                print(f"      {wrong}", flush=True)
    _print_table(outcomes)
    return int(any(outcome.wrong for each in outcomes.values() for outcome in each))


def run_trial(fault: Fault, folder: Path, reference: Path, seed: int, backend: str) -> Outcome:
    """One fit and one fault. The folder of a trial in which something was wrong stays, the log of its driver among all else."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    began, before = time.monotonic(), orphaned_segments()
    wrong: list[str] = []
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(PLACES[fault.place](folder))
        scene = Scene(folder, place, fault.settings, seed, backend)
        stack.enter_context(fault.around(scene))
        stack.callback(scene.close)
        scene.start()
        try:
            fault.strike(scene)
        except (TimeoutError, AssertionError, OSError) as error:
            wrong.append(f"the fault could not be done: {type(error).__name__}: {error}")
        exit_code = scene.wait_for_the_end(max(fault.limit_s - (time.monotonic() - began), 5))
        wrong += violations(scene, exit_code, fault.error, fault.said, reference)
        wrong += leftovers(scene, before) if exit_code is not None else []
    outcome = Outcome(tuple(wrong), longest_pause(scene), time.monotonic() - began)
    if wrong:
        print("\n".join(scene.log.read_text(errors="replace").splitlines()[-LOG_LINES:]), file=sys.stderr, flush=True)
    else:
        shutil.rmtree(folder)
    return outcome


def _reference(folder: Path, fault: Fault, backend: str) -> Path:
    """The weights of the undisturbed run; made when they are first asked for."""
    kept = folder / f"undisturbed-{backend}-{'elastic' if fault.settings.elastic else 'fixed'}.npz"
    if not kept.exists():
        own = folder / "undisturbed"
        shutil.rmtree(own, ignore_errors=True)
        own.mkdir()
        with PLACES["local"](own) as place:
            scene = Scene(own, place, Settings(pace_s=0.0, elastic=fault.settings.elastic), 0, backend)
            try:
                scene.start()
                if scene.wait_for_the_end(180) != 0:
                    raise SystemExit(f"the undisturbed run failed:\n{scene.log.read_text(errors='replace')}")
            finally:
                scene.close()
        (own / "weights.npz").replace(kept)
    return kept


def _print_table(outcomes: dict[str, list[Outcome]]) -> None:
    print(f"\n{'fault':45} {'trials':>6} {'right':>6} {'median pause':>13} {'longest':>8}")
    for name, each in outcomes.items():
        pauses = [outcome.pause_s for outcome in each if outcome.pause_s is not None] or [0.0]
        right = sum(not outcome.wrong for outcome in each)
        print(f"{name:45} {len(each):6} {right:6} {statistics.median(pauses):11.1f} s {max(pauses):6.1f} s")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of when and whom the faults hit; default 0")
    parser.add_argument("--faults", nargs="+", choices=FAULTS, metavar="NAME", help="only these; default all")
    parser.add_argument("--repeats", type=int, default=3, help="trials of each; default 3")
    parser.add_argument("--backend", default="mpi", choices=BACKENDS, help="what ranks reduce by; default mpi")
    parser.add_argument("--folder", type=Path, help="where trials have their folders, and the undisturbed run stays")
    parser.add_argument("--list", action="store_true", help="name the faults and end")
    return parser


if __name__ == "__main__":
    sys.exit(main())
