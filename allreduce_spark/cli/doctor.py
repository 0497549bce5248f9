"""What this machine has and lacks for training on Spark, and what to do about it: one small function for each thing.

No check imports pyspark, TensorFlow or MPI; the one that opens a communicator does it in processes of its own.
`--only python,java` needs nothing but the standard library, and loads in a Python that is too old for the rest: `make`
asks for both before it installs anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from allreduce_spark.cli import machine, software
from allreduce_spark.cli.result import Result, Status, fail

__all__ = ["CHECKS", "exit_code", "report", "run"]


def check_allreduce() -> Result:
    from allreduce_spark.cli import two_ranks  # loads rooms that an old Python cannot read

    return two_ranks.check_shared_memory_allreduce()


def check_allreduce_tcp() -> Result:
    from allreduce_spark.cli import two_ranks

    return two_ranks.check_tcp_allreduce()


CHECKS: dict[str, Callable[[], Result]] = {
    "python": software.check_python,
    "java": software.check_java,
    "spark": software.check_spark,
    "workers": software.check_workers,
    "tensorflow": software.check_tensorflow,
    "keras": software.check_keras,
    "mpi": software.check_mpi,
    "horovod": software.check_horovod,
    "allreduce": check_allreduce,
    "allreduce-tcp": check_allreduce_tcp,
    "network": machine.check_network,
    "shared-memory": machine.check_shared_memory,
    "disk": machine.check_disk,
    "cores": machine.check_cores,
    "gpus": machine.check_gpus,
}


def run(names: Iterable[str]) -> dict[str, Result]:
    """Run these checks, in this order. One that raises has failed; the others still run."""
    return {name: _run_one(CHECKS[name]) for name in names}


def _run_one(check: Callable[[], Result]) -> Result:
    try:
        return check()
    except Exception as error:  # noqa: BLE001 - whatever it is, the other checks may tell why
        return fail(
            f"could not be checked: {type(error).__name__}: {error}", "If nothing else here explains it, report it."
        )


def report(results: Mapping[str, Result]) -> str:
    """One line a check, then what to do about each problem."""
    width = max(map(len, results), default=0)
    lines = [f"{result.status.value:<4}  {name:<{width}}  {result.found}" for name, result in results.items()]
    for name, result in results.items():
        if result.advice:
            lines += ["", f"{name}: {result.advice}"]
    return "\n".join(lines)


def exit_code(results: Mapping[str, Result]) -> int:
    """1 if training on this machine will not work, else 0."""
    return int(any(result.status is Status.FAIL for result in results.values()))
