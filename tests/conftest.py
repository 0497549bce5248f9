"""One Spark session with two slots for all tests that ask for it; without Java they are skipped."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


# For the tests in which ranks are threads: each blocks one of TensorFlow's own while it waits for the others. As a variable,
# because it holds before the first module that is collected makes a model.
os.environ["TF_NUM_INTEROP_THREADS"] = "12"


@pytest.fixture(scope="session")
def own_temporary_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A temporary folder for this run alone, in this process and all it starts: what is left in it is ours."""
    folder = str(tmp_path_factory.mktemp("temporary"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", folder)
        patch.setattr(tempfile, "tempdir", folder)
        yield folder


@pytest.fixture(scope="session")
def spark(own_temporary_folder: str) -> Iterator[SparkSession]:
    if shutil.which("java") is None and "JAVA_HOME" not in os.environ:
        pytest.skip("Java is missing: Spark needs it (apt-get install openjdk-17-jre-headless)")
    from pyspark.sql import SparkSession  # only here: most tests need no Spark

    session = (
        SparkSession.builder.master("local[2]")
        .appName("allreduce_spark tests")
        .config("spark.ui.enabled", "false")
        .config("spark.ui.showConsoleProgress", "false")
        .config("spark.sql.shuffle.partitions", "2")
        .getOrCreate()
    )
    session.sparkContext.setLogLevel("ERROR")  # what tests provoke need not be printed
    yield session
    session.stop()
