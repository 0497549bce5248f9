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
    if args.command == "doctor":
        return run_doctor(args)
    return run_checkpoints(args) if args.command == "checkpoints" else run_install_horovod(args)


def run_doctor(args: argparse.Namespace) -> int:
    results = doctor.run(args.only or doctor.CHECKS)
    print(doctor.report(results))
    return doctor.exit_code(results)


def run_checkpoints(args: argparse.Namespace) -> int:
    from allreduce_spark.cli import checkpoints  # loads rooms that an old Python cannot read
    from allreduce_spark.errors import AllReduceSparkError

    try:
        if args.action == "list":
            return checkpoints.list_command(args.path)
        if args.action == "verify":
            return checkpoints.verify_command(args.path)
        return checkpoints.export_command(
            args.path,
            args.destination,
            checkpoint=args.id,
            modules=args.modules,
            unsafe=args.unsafe,
            overwrite=args.overwrite,
        )
    except AllReduceSparkError as error:
        print(f"allreduce-spark: {error}", file=sys.stderr)
        return 1


def run_install_horovod(args: argparse.Namespace) -> int:
    from allreduce_spark.cli import install_horovod  # loads rooms that an old Python cannot read
    from allreduce_spark.errors import AllReduceSparkError

    try:
        return install_horovod.install_horovod(with_nccl=args.nccl)
    except AllReduceSparkError as error:
        print(f"allreduce-spark: {error}", file=sys.stderr)
        return 1


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
    _add_checkpoints(commands)
    horovod = commands.add_parser(
        "install-horovod",
        help="build Horovod for the TensorFlow that is installed, and install it",
        description="Build Horovod for the TensorFlow that is installed, with Gloo and, where the package mpich is installed, "
        "MPI; install it here, and let two ranks reduce by it. The wheel is kept, and taken again where nothing has changed.",
    )
    horovod.add_argument("--nccl", action="store_true", help="with NCCL, for GPUs; needs CUDA's nvcc and NCCL's header")
    return parser


def _add_checkpoints(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    checkpoints = commands.add_parser(
        "checkpoints", help="look at the checkpoints of a fit, or take a model out of one"
    )
    actions = checkpoints.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, help_text in (
        ("list", "list the complete checkpoints, and why each is kept"),
        ("verify", "read every file and compare it with its checksum; exit with 1 if one is damaged"),
        ("export", "write the model of a checkpoint to a .keras file"),
    ):
        action = actions.add_parser(name, help=help_text, description=help_text[0].upper() + help_text[1:] + ".")
        action.add_argument("path", metavar="PATH", help="the folder: a local path, or a URI such as s3://bucket/fit")
    action.add_argument("destination", metavar="OUT.keras", help="the file to write: a local path, or a URI")
    action.add_argument("--id", help="which checkpoint; without it, the newest that is not damaged")
    action.add_argument("--overwrite", action="store_true", help="replace OUT.keras if it exists")
    action.add_argument(
        "--import",
        action="append",
        default=[],
        dest="modules",
        metavar="MODULE",
        help="import this module first: the one that registers the model's own classes with Keras",
    )
    action.add_argument(
        "--unsafe",
        action="store_true",
        help="load Lambda layers, which are code in the file: only if you trust whoever wrote it",
    )


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in doctor.CHECKS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no check is called {unknown[0]!r}; there are {', '.join(doctor.CHECKS)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
