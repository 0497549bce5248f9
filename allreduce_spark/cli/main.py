"""The command `allreduce-spark`: reads the command line and hands over to one module for each word."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import allreduce_spark
from allreduce_spark.cli import doctor

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code. `argv` is for tests: without it, the words of the command line count."""
    args = _parser().parse_args(argv)
    results = doctor.run(args.only or doctor.CHECKS)
    print(doctor.report(results))
    return doctor.exit_code(results)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="allreduce-spark", description=(allreduce_spark.__doc__ or "").split("\n")[0])
    parser.add_argument("--version", action="version", version=f"allreduce-spark {allreduce_spark.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    doctor_parser = commands.add_parser(
        "doctor",
        help="check what this machine has and lacks, and say what to do about it",
        description="Check what this machine has and lacks for training on Spark; exit with 1 if it cannot work.",
    )
    doctor_parser.add_argument(
        "--only",
        type=_names,
        metavar="NAME,NAME",
        help=f"run these checks alone: {', '.join(doctor.CHECKS)}",
    )
    return parser


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in doctor.CHECKS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no check is called {unknown[0]!r}; there are {', '.join(doctor.CHECKS)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
