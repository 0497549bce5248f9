"""`allreduce-spark checkpoints`: what lies in a folder of checkpoints, whether it is whole, and a model out of it."""

from __future__ import annotations

import importlib
import time
from collections.abc import Sequence

from allreduce_spark.checkpoint.manifest import Manifest, kept
from allreduce_spark.checkpoint.store import Store, Survey
from allreduce_spark.errors import ConfigError

__all__ = ["export_command", "list_command", "verify_command"]

COLUMNS = ("id", "epoch", "step", "ranks", "size", "age", "metrics", "kept as")


def list_command(path: str) -> int:
    """Print a table of the complete checkpoints; returns the exit code."""
    survey = _survey(path)
    print(table(survey.complete, now=time.time()))
    for checkpoint in survey.incomplete:
        print(f"{checkpoint}  incomplete: being written, or left by a fit that ended")
    for checkpoint, problem in survey.damaged.items():
        print(f"{checkpoint}  damaged: {problem}")
    return 0


def verify_command(path: str) -> int:
    """Read every file of every checkpoint and print what is wrong with each; returns the exit code: 1 if anything is."""
    survey, store = _survey(path), Store(path)
    failed = False
    for checkpoint in sorted([*(manifest.id for manifest in survey.complete), *survey.damaged]):
        problems = store.verify(checkpoint)
        failed |= bool(problems)
        print(
            "\n".join(
                [f"{'fail' if problems else 'ok':<4}  {checkpoint}", *(f"      {problem}" for problem in problems)]
            )
        )
    for checkpoint in survey.incomplete:
        print(f"-     {checkpoint}  incomplete")
    return int(failed)


def export_command(
    path: str, destination: str, *, checkpoint: str | None, modules: Sequence[str], unsafe: bool, overwrite: bool
) -> int:
    """Write the model of a checkpoint to a `.keras` file; returns the exit code.

    Args:
        modules: What the user wants imported before: there the model's own classes are registered with Keras.
    """
    from allreduce_spark.training.models.checkpoint_export import (
        export_checkpoint,
    )  # TensorFlow: only where it is needed

    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ConfigError(f"--import {module}: {error}") from error
    manifest = export_checkpoint(
        Store(path), destination, checkpoint=checkpoint, safe_mode=not unsafe, overwrite=overwrite
    )
    print(f"checkpoint {manifest.id} of {path} is now {destination}")
    return 0


def table(manifests: Sequence[Manifest], *, now: float) -> str:
    """One line for each checkpoint, newest last, under a line of headings. `now` is in seconds since 1970."""
    reasons = kept(manifests, manifests[-1].settings) if manifests else {}
    lines = [COLUMNS, *(_line(manifest, now, reasons.get(manifest.id, "-")) for manifest in manifests)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _line(manifest: Manifest, now: float, reason: str) -> tuple[str, ...]:
    metrics = [f"{name} {value:.4g}" for name, value in manifest.logs.items() if isinstance(value, (int, float))]
    numbers = (manifest.epoch, manifest.step, len(manifest.shares))
    age = _age(now - manifest.saved_at)
    return (manifest.id, *map(str, numbers), _size(manifest.bytes), age, ", ".join(metrics) or "-", reason)


def _size(count: int) -> str:
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.3g} {unit}" if unit != "B" else f"{count} B"


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.3g} {unit}"
    return f"{max(seconds, 0):.0f} s"


def _survey(path: str) -> Survey:
    survey = Store(path).survey()
    if not (survey.complete or survey.damaged or survey.incomplete):
        raise ConfigError(f"{path!r} holds no checkpoints.")
    return survey
