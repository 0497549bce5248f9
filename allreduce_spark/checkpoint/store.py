"""The checkpoints of a fit in one folder, on any file system that pyarrow knows: complete or absent.

    <path>/model.keras                          the untrained model, once for all of them
    <path>/<id>/share-<index>-<launch>.safetensors     one rank's share, put there by its agent
    <path>/<id>/manifest.json                   written last, by the driver: what has none does not exist

Nothing here decides when a checkpoint is taken. What is removed loses its manifest first.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from allreduce_spark.checkpoint import files
from allreduce_spark.checkpoint.manifest import Checksum, File, Manifest, is_checkpoint_id, kept, share_name
from allreduce_spark.config import Checkpoint
from allreduce_spark.errors import CheckpointError, ConfigError

__all__ = ["Store", "Survey"]

logger = logging.getLogger(__name__)

MANIFEST, MODEL = "manifest.json", "model.keras"


@dataclass(frozen=True)
class Survey:
    """What a folder holds.

    Attributes:
        complete: Oldest first.
        damaged: By id, why a manifest that is there cannot be read.
        incomplete: Ids of what has no manifest: still being written, or left by a fit that ended.
        partial: Names of what was to become the model's archive, and may still.
        foreign: Names of what is no checkpoint.
    """

    complete: tuple[Manifest, ...]
    damaged: dict[str, str]
    incomplete: tuple[str, ...]
    partial: tuple[str, ...]
    foreign: tuple[str, ...]


class Store:
    """A folder of checkpoints.

    Args:
        path: A local path, or a URI. It need not exist yet.

    Attributes:
        path: The same, but absolute: executors have working directories of their own.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = files.absolute(path)

    def survey(self) -> Survey:
        """Look at everything in the folder.

        Raises:
            ConfigError: It cannot be read, is a file, or a checkpoint in it was written by a newer version.
        """
        found: dict[str, set[str]] = {}
        partial, foreign = set(), set()
        for path, _ in files.list_files(self.path):
            top, _, name = path.partition("/")
            if name and is_checkpoint_id(top):
                found.setdefault(top, set()).add(name)
            elif top.startswith(f".{MODEL}.") and top.endswith(".partial"):
                partial.add(top)
            elif path != MODEL:
                foreign.add(top)
        complete, damaged = [], {}
        for checkpoint, names in sorted(found.items()):
            if MANIFEST in names:
                try:
                    complete.append(self._manifest(checkpoint))
                except CheckpointError as error:
                    damaged[checkpoint] = str(error)
        incomplete = tuple(checkpoint for checkpoint, names in sorted(found.items()) if MANIFEST not in names)
        return Survey(tuple(complete), damaged, incomplete, tuple(sorted(partial)), tuple(sorted(foreign)))

    def begin(self, resumed: str | None) -> None:
        """Make sure that a fit may use the folder, before its first rank starts. No checkpoint is touched.

        Args:
            resumed: The id of the checkpoint that the fit goes on from; None for a fit that starts from its beginning.

        Raises:
            ConfigError: The folder cannot be used, is not for checkpoints, or a fit from the beginning finds some in it.
        """
        survey = self.survey()
        ids = [*(manifest.id for manifest in survey.complete), *survey.damaged]
        if resumed is None and ids:
            raise ConfigError(
                f"{self.path!r} holds {len(ids)} checkpoints already, the newest {max(ids)}. Pass resume='auto' to go on from "
                "there, or let Checkpoint.path name a folder of its own for each fit."
            )
        if survey.foreign and not ids:
            raise ConfigError(
                f"{self.path!r} is no folder of checkpoints: it holds {_some(survey.foreign)}. Let Checkpoint.path name a new "
                "or an empty folder."
            )
        if resumed is not None and resumed not in ids:
            raise ConfigError(f"{self.path!r} holds no complete checkpoint {resumed}.")
        for name in survey.partial:
            files.remove(files.inside(self.path, name))

    def forget_later(self, resumed: str) -> None:
        """Let checkpoints after `resumed`, which are damaged, exist no more: they would count as newer than those to come.

        Only their manifests are removed. The rest goes with `prune`, as does what was never complete.

        Raises:
            ConfigError: The folder cannot be read, or a manifest not be removed.
        """
        survey = self.survey()
        for checkpoint in (*(manifest.id for manifest in survey.complete), *survey.damaged):
            if checkpoint > resumed:
                logger.warning("%s: checkpoint %s is removed, training goes on from %s", self.path, checkpoint, resumed)
                files.remove(self.place(checkpoint, MANIFEST))

    def put_model(self, local: Path) -> File:
        """Put the archive of the untrained model there, unless complete checkpoints have one already; returns what is there.

        Raises:
            ConfigError: It cannot be written.
        """
        for manifest in reversed(self.survey().complete):
            if manifest.model is not None:
                return manifest.model
        files.put_file(local, files.inside(self.path, MODEL), overwrite=True)
        digest = Checksum()
        files.read_file(local, digest.update)
        return File(MODEL, local.stat().st_size, digest.hexdigest())

    def share_place(self, checkpoint: str, index: int, launch: int) -> str:
        """Where the share of one rank belongs, as a path or URI."""
        return self.place(checkpoint, share_name(index, launch))

    def place(self, checkpoint: str, name: str) -> str:
        """Where a file of a checkpoint is, as a path or URI."""
        return files.inside(files.inside(self.path, checkpoint), name)

    def put_share(self, local: Path, checkpoint: str, index: int, launch: int) -> None:
        """Put a share into its place.

        Raises:
            CheckpointError: It cannot be written.
        """
        with _as_checkpoint_errors():
            files.put_file(local, self.share_place(checkpoint, index, launch), overwrite=True, in_one_step=False)

    def commit(self, manifest: Manifest) -> None:
        """Make a checkpoint exist, once all its shares are there.

        Raises:
            CheckpointError: A share is not there as the manifest says, or the manifest cannot be written.
        """
        with _as_checkpoint_errors():
            there = dict(files.list_files(files.inside(self.path, manifest.id)))
            for share in manifest.shares:
                if there.get(share.name) != share.bytes:
                    size = there.get(share.name)
                    found = "is not there" if size is None else f"has {size} bytes, not {share.bytes}"
                    raise CheckpointError(
                        f"{self.place(manifest.id, share.name)!r} {found}, as the driver sees it, though its rank has written "
                        "it. Checkpoint.path must be one that all hosts share: a mounted file system, or a URI."
                    )
            content = json.dumps(manifest.to_json(), indent=1).encode()
            files.put_file(content, self.place(manifest.id, MANIFEST), overwrite=True)

    def checkpoints(self) -> list[Manifest]:
        """The complete ones, oldest first. Of damaged manifests there is a warning.

        Raises:
            ConfigError: As `survey`.
        """
        survey = self.survey()
        for checkpoint, problem in survey.damaged.items():
            logger.warning("%s: checkpoint %s is damaged: %s", self.path, checkpoint, problem)
        return list(survey.complete)

    def latest(self) -> Manifest | None:
        """The newest one whose files all have the length and the checksum that they were written with; None without any.

        Newer ones that have not are passed over with a warning. All files are read for it.

        Raises:
            ConfigError: As `survey`.
        """
        manifests, there = self.checkpoints(), dict(files.list_files(self.path))
        for manifest in reversed(manifests):
            problems = self._problems(manifest, there)
            if not problems:
                return manifest
            logger.warning(
                "%s: checkpoint %s is damaged, falling back to the one before: %s",
                self.path,
                manifest.id,
                "; ".join(problems),
            )
        return None

    def verify(self, checkpoint: str) -> list[str]:
        """What is wrong with a checkpoint, in words; empty where all is well.

        Raises:
            ConfigError: It was written by a newer version, or the folder cannot be read: which says nothing of the checkpoint.
        """
        there = dict(files.list_files(self.path))
        if f"{checkpoint}/{MANIFEST}" not in there:
            return [f"it has no {MANIFEST}: it was never complete"]
        try:
            manifest = self._manifest(checkpoint)
        except CheckpointError as error:
            return [str(error)]
        return self._problems(manifest, there)

    def _problems(self, manifest: Manifest, there: Mapping[str, int]) -> list[str]:
        """What is wrong with the files of a checkpoint. All are read.

        Args:
            there: The lengths of all files in the folder, by path.
        """
        expected = {f"{manifest.id}/{share.name}": share for share in manifest.shares}
        if manifest.model is not None:
            expected[manifest.model.name] = manifest.model
        return [
            problem
            for path, file in expected.items()
            if (problem := _problem_of(file, there.get(path), files.inside(self.path, path)))
        ]

    def remove(self, checkpoint: str) -> None:
        """Remove a checkpoint. One whose removal is interrupted is absent, and the rest of it goes with the next `prune`.

        Raises:
            ConfigError: It cannot be removed.
        """
        files.remove(self.place(checkpoint, MANIFEST))
        files.remove(files.inside(self.path, checkpoint))

    def prune(self, settings: Checkpoint) -> list[str]:
        """Remove what need not be kept, and what will never be complete; returns the ids.

        Of incomplete ones only those before the newest complete one go: later ones may still be in the making.

        Raises:
            CheckpointError: Something cannot be read or removed.
        """
        with _as_checkpoint_errors():
            survey = self.survey()
            if not survey.complete:
                return []
            keep = kept(survey.complete, settings)
            never = [
                checkpoint
                for checkpoint in (*survey.incomplete, *survey.damaged)
                if checkpoint < survey.complete[-1].id
            ]
            removed = [*(manifest.id for manifest in survey.complete if manifest.id not in keep), *never]
            for checkpoint in removed:
                self.remove(checkpoint)
            return removed

    def _manifest(self, checkpoint: str) -> Manifest:
        content = bytearray()
        files.read_file(self.place(checkpoint, MANIFEST), content.extend)
        try:
            fields = json.loads(content)
        except ValueError as error:
            raise CheckpointError(f"{MANIFEST} is damaged: it is not JSON ({error})") from error
        manifest = Manifest.from_json(fields)
        if manifest.id != checkpoint:
            raise CheckpointError(f"{MANIFEST} is that of {manifest.id}")
        return manifest


def _problem_of(file: File, length: int | None, place: str) -> str | None:
    if length is None:
        return f"{file.name} is missing"
    if length != file.bytes:
        return f"{file.name} has {length} bytes, but was written with {file.bytes}"
    digest = Checksum()
    files.read_file(place, digest.update)
    is_whole = digest.hexdigest() == file.checksum
    return None if is_whole else f"{file.name} is not as it was written: its checksum is wrong"


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@contextlib.contextmanager
def _as_checkpoint_errors() -> Iterator[None]:
    """While training goes on, a store that fails is no fault of the settings; callers warn and go on."""
    try:
        yield
    except CheckpointError:
        raise
    except (ConfigError, OSError) as error:
        raise CheckpointError(str(error)) from error
