"""Whole files on any file system that pyarrow knows, complete or absent: nobody ever sees half of one.

A place is a local path, or a URI such as `s3://bucket/models/digits.keras`, `hdfs://namenode:8020/models/digits.keras`, `gs://...`
or `file:///...`. Credentials and options are those of `pyarrow.fs.FileSystem.from_uri`.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
from pyarrow import fs

from allreduce_spark.errors import ConfigError

__all__ = [
    "Listed",
    "absolute",
    "check_absent",
    "fetch_file",
    "inside",
    "list_files",
    "put_file",
    "read_file",
    "remove",
]

PIECE_BYTES = 16 << 20
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # Hadoop writes file:/tmp and dbfs:/models with one slash
WITHOUT_FOLDERS = ("s3", "gcs", "abfs")  # there, making a folder leaves an empty object of its name


class Listed(NamedTuple):
    """A file in a folder: its path below that folder, with slashes, and its length in bytes."""

    path: str
    bytes: int


def absolute(place: str | os.PathLike[str]) -> str:
    """The place as a process with another working directory must name it."""
    text = os.fspath(place)
    return text if _SCHEME.match(text) else os.path.abspath(text)


def put_file(
    local: Path | bytes, destination: str | os.PathLike[str], *, overwrite: bool, in_one_step: bool = True
) -> None:
    """Copy a local file, or the content of one, to `destination`, and make folders on the way.

    It is written under another name beside the destination first and gets its own in one step. Local files, and HDFS's, are on
    disk when this returns.

    Args:
        in_one_step: False where nobody looks at the file before somebody says that it is complete. In an object store, where a
            file is renamed by copying it, it then gets its name at once.

    Raises:
        ConfigError: The destination exists and `overwrite` is False, or it cannot be written.
    """
    check_absent(destination, overwrite=overwrite)
    system, path = _locate(destination)
    parent, _, name = path.rpartition("/")
    direct = not in_one_step and system.type_name in WITHOUT_FOLDERS
    partial = path if direct else f"{parent}/.{name}.{secrets.token_hex(4)}.partial"
    with _explained(destination, "written"):
        try:
            if parent and system.type_name not in WITHOUT_FOLDERS:
                system.create_dir(parent, recursive=True)
            _upload(local, system, partial)
            if not direct:
                _rename(system, partial, path)
        except BaseException:
            with contextlib.suppress(OSError):  # it may never have come to be; the first error is the one to hear of
                system.delete_file(partial)
            raise


def fetch_file(source: str | os.PathLike[str], folder: Path) -> Path:
    """A local path to the file at `source`: its own where it is local, else that of a copy in `folder`, of the same name.

    Raises:
        ConfigError: There is no such file, or it cannot be read.
    """
    system, path = _locate(source)
    with _explained(source, "read"):
        kind = system.get_file_info(path).type
        if kind != fs.FileType.File:
            found = "it is a folder" if kind == fs.FileType.Directory else "there is no such file"
            raise ConfigError(f"{os.fspath(source)!r} cannot be read: {found}.")
        if isinstance(system, fs.LocalFileSystem):
            return Path(path)
        copy = folder / path.rpartition("/")[2]
        with system.open_input_stream(path) as stream, copy.open("wb") as file:
            shutil.copyfileobj(stream, file, PIECE_BYTES)
        return copy


def read_file(source: str | os.PathLike[str], take: Callable[[bytes], object]) -> None:
    """Hand the content of a file to `take`, piece by piece.

    Raises:
        ConfigError: There is no such file, or it cannot be read.
    """
    system, path = _locate(source)
    with _explained(source, "read"), system.open_input_stream(path) as stream:
        while piece := stream.read(PIECE_BYTES):
            take(piece)


def inside(folder: str | os.PathLike[str], name: str) -> str:
    """The place of a file in a folder, which may be a URI with options behind a question mark.

    >>> inside("s3://bucket/fit?region=eu-west-1", "manifest.json")
    's3://bucket/fit/manifest.json?region=eu-west-1'
    """
    text = os.fspath(folder)
    place, mark, options = text.partition("?") if _SCHEME.match(text) else (text, "", "")
    return f"{place.rstrip('/')}/{name}{mark}{options}"


def list_files(folder: str | os.PathLike[str]) -> list[Listed]:
    """All files in a folder and below it, in the order of their paths; none where there is no such folder.

    Raises:
        ConfigError: It is a file, or cannot be read.
    """
    system, path = _locate(folder)
    with _explained(folder, "read"):
        found = system.get_file_info(fs.FileSelector(path, recursive=True, allow_not_found=True))
    prefix = len(path.rstrip("/")) + 1
    return sorted(Listed(info.path[prefix:], info.size) for info in found if info.is_file)


def remove(place: str | os.PathLike[str]) -> None:
    """Remove a file, or a folder with everything in it. What is not there needs no removing.

    Raises:
        ConfigError: It cannot be removed.
    """
    system, path = _locate(place)
    with _explained(place, "removed"):
        kind = system.get_file_info(path).type
        if kind == fs.FileType.Directory:
            system.delete_dir(path)
        elif kind == fs.FileType.File:
            system.delete_file(path)


def check_absent(destination: str | os.PathLike[str], *, overwrite: bool) -> None:
    """Make sure that a file may be written there, before the work of making it.

    Raises:
        ConfigError: It exists and `overwrite` is False, or it is a folder.
    """
    system, path = _locate(destination)
    with _explained(destination, "written"):
        kind = system.get_file_info(path).type
    if kind == fs.FileType.Directory:
        raise ConfigError(f"{os.fspath(destination)!r} cannot be written: it is a folder.")
    if kind != fs.FileType.NotFound and not overwrite:
        raise ConfigError(f"{os.fspath(destination)!r} exists already; pass overwrite=True to replace it.")


def _locate(place: str | os.PathLike[str]) -> tuple[fs.FileSystem, str]:
    """The file system of a place, and the path in it."""
    text = os.fspath(place)
    if not isinstance(text, str) or not text:
        raise ConfigError(f"a file needs a path or a URI, got {place!r}.")
    if not _SCHEME.match(text):
        return fs.LocalFileSystem(), os.path.abspath(text)
    with _explained(text, "reached"):
        system, path = fs.FileSystem.from_uri(text)
        return system, path


def _upload(local: Path | bytes, system: fs.FileSystem, path: str) -> None:
    if isinstance(system, fs.LocalFileSystem):
        _copy_to_disk(local, path)
        return
    expected = len(local) if isinstance(local, bytes) else local.stat().st_size
    content = io.BytesIO(local) if isinstance(local, bytes) else local.open("rb")
    with content as source, system.open_output_stream(path) as stream:
        shutil.copyfileobj(source, stream, PIECE_BYTES)
    written = system.get_file_info(path).size
    if written != expected:
        raise OSError(f"{written} of {expected} bytes have arrived")


def _copy_to_disk(local: Path | bytes, path: str) -> None:
    if isinstance(local, bytes):
        Path(path).write_bytes(local)
    else:
        shutil.copyfile(local, path)  # within the kernel
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _rename(system: fs.FileSystem, source: str, destination: str) -> None:
    if isinstance(system, fs.LocalFileSystem):
        os.replace(source, destination)
        parent = os.path.dirname(destination)
        for folder in (parent, os.path.dirname(parent)):  # which may have a new folder in it
            if os.access(folder, os.R_OK):
                _sync_folder(folder)  # or the new name would be lost with the machine's power
    else:
        system.move(source, destination)


def _sync_folder(path: str) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextlib.contextmanager
def _explained(place: str | os.PathLike[str], what: str) -> Iterator[None]:
    """Errors of file systems as ConfigError with the place in it: their own often do not name it."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"{os.fspath(place)!r} cannot be {what}: {error}") from error
