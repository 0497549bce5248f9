"""What travels beside the rows: files from the client to tasks, and answers from tasks to the client.

Files go as an artifact of the session, which Spark brings to every executor once: a model in the task's closure would pass
through one message, of 128 MiB at most, and through the memory of the server several times. Answers come as rows of named
pieces, and are read without pickle: a client trusts its cluster with the work, and not with itself.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow as pa
from pyspark import SparkFiles
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession

from allreduce_spark.errors import AllReduceSparkError, MissingDependencyError
from allreduce_spark.launch.scratch import scratch_folder
from allreduce_spark.rendezvous.group import Failure
from allreduce_spark.spark.stage import error_of, missing_module

__all__ = ["SCHEMA", "answers_of", "check_answer", "error_pieces", "pieces_of", "read_files", "rows_of", "send_files"]

SCHEMA = "name string, piece binary"
ERROR = "error"
PIECE_BYTES = 1 << 20


def send_files(session: SparkSession, files: Mapping[str, bytes]) -> str:
    """Bring files to where tasks of this session can read them; return what `read_files` wants to know.

    They stay on the cluster's disks until the session ends. What has been sent before is not kept twice.
    """
    digest = hashlib.sha256()
    for name, content in sorted(files.items()):
        digest.update(f"{name} {len(content)} ".encode())
        digest.update(content)
    with scratch_folder() as folder:
        archive = folder / f"allreduce_spark-{digest.hexdigest()}.zip"
        with zipfile.ZipFile(archive, "w") as zipped:
            for name, content in sorted(files.items()):
                # A time that is always the same: Spark refuses a second artifact of this name that differs in a byte.
                zipped.writestr(zipfile.ZipInfo(name), content)
        session.addArtifacts(str(archive), file=True)
        return archive.name


def read_files(sent: str) -> dict[str, bytes]:
    """File name -> content, in a task."""
    with zipfile.ZipFile(SparkFiles.get(sent)) as zipped:
        return {name: zipped.read(name) for name in zipped.namelist()}


def pieces_of(name: str, content: bytes | Path) -> Iterator[pa.RecordBatch]:
    """Rows of `SCHEMA` for one answer: bytes, or a file."""
    if isinstance(content, bytes):
        yield _row(name, content)
        return
    with content.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            yield _row(name, piece)


def error_pieces(error: AllReduceSparkError) -> Iterator[pa.RecordBatch]:
    """An error that trying again cannot mend: Spark would run the task again and wrap the message."""
    return pieces_of(ERROR, json.dumps({"error": type(error).__name__, "cause": str(error)}).encode())


def answers_of(frame: DataFrame) -> Iterator[tuple[str, bytes]]:
    """(name, piece) of all rows of `SCHEMA`, partition after partition.

    Raises:
        AllReduceSparkError: A task has answered with an error, or the executors lack a module.
        PySparkException: The Spark job failed, in functions of the user's own, say, which make the rows.
    """
    try:
        for name, piece in rows_of(frame):
            check_answer(name, piece)
            yield name, piece
    except PySparkException as error:
        missing = missing_module(error)
        if missing is None:
            raise
        raise MissingDependencyError(missing) from error


def check_answer(name: str, piece: bytes) -> None:
    """Raise the error that a task has answered with, where this is one."""
    if name == ERROR:
        raise error_of(Failure(**json.loads(piece)))


def rows_of(frame: DataFrame) -> Iterator[tuple[str, bytes]]:
    """The same, with no meaning given to names and errors."""
    for row in frame.toLocalIterator():
        yield row[0], bytes(row[1])


def _row(name: str, piece: bytes) -> pa.RecordBatch:
    return pa.RecordBatch.from_pydict({"name": pa.array([name]), "piece": pa.array([piece], pa.binary())})
