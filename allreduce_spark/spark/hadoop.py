"""Files of the Hadoop file systems that Spark is configured for, through its JVM.

Any path that Spark knows will do, and nothing else needs to be installed.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any

from pyspark import SparkContext

from allreduce_spark.errors import ConfigError

__all__ = ["fetch_hadoop_file", "hadoop_exists", "put_hadoop_file"]


def put_hadoop_file(context: SparkContext, local: Path, destination: str, *, overwrite: bool) -> None:
    """Copy a local file, by the JVM, under another name first: it gets its own when it is complete.

    Raises:
        ConfigError: The destination exists and `overwrite` is False, or it cannot be written.
    """
    if hadoop_exists(context, destination) and not overwrite:
        raise ConfigError(f"{destination!r} exists already; pass overwrite=True to replace it.")
    system, path_of = _file_system(context, destination)
    folder, _, name = destination.rpartition("/")
    partial = path_of(os.path.join(folder, f".{name}.{secrets.token_hex(4)}.partial"))
    system.copyFromLocalFile(False, True, path_of(str(local)), partial)
    system.delete(path_of(destination), False)  # HDFS renames onto nothing that exists
    if not system.rename(partial, path_of(destination)):
        system.delete(partial, False)
        raise ConfigError(f"{destination!r} cannot be written: its file system refused the name.")


def fetch_hadoop_file(context: SparkContext, source: str, folder: Path) -> Path:
    """A copy of the file in the local `folder`, of the same name.

    Raises:
        ConfigError: There is no such file.
    """
    if not hadoop_exists(context, source):
        raise ConfigError(f"{source!r} cannot be read: there is no such file.")
    system, path_of = _file_system(context, source)
    local = folder / source.rpartition("/")[2]
    system.copyToLocalFile(False, path_of(source), path_of(str(local)), True)
    return local


def hadoop_exists(context: SparkContext, path: str) -> bool:
    """Whether there is a file or folder."""
    system, path_of = _file_system(context, path)
    return bool(system.exists(path_of(path)))


def _file_system(context: SparkContext, path: str) -> tuple[Any, Any]:
    """(Hadoop's file system of a path, the class of its paths)."""
    jvm: Any = context._jvm
    path_of = jvm.org.apache.hadoop.fs.Path
    return path_of(path).getFileSystem(context._jsc.hadoopConfiguration()), path_of
