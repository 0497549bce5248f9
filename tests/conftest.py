"""What tests of several rooms share: one Spark session with two slots, and a look for keys where none may be.

Without Java, the tests that ask for the session are skipped.
"""

from __future__ import annotations

import base64
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


# For the tests in which ranks are threads: each blocks one of TensorFlow's own while it waits for the others. As a variable,
# because it holds before the first module that is collected makes a model.
os.environ["TF_NUM_INTEROP_THREADS"] = "12"

# Where there is a GPU: this process leaves memory to the ranks.
os.environ["TF_FORCE_GPU_ALLOW_GROWTH"] = "true"

# For each JVM that tests start: none lives long enough to earn back what its second compiler and parallel collector cost.
JVM_OPTIONS = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"
os.environ["JAVA_TOOL_OPTIONS"] = " ".join([*filter(None, [os.environ.get("JAVA_TOOL_OPTIONS")]), JVM_OPTIONS])


@pytest.fixture(autouse=True)
def _what_is_supported(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> None:
    """Note which cell of the README's table a test is for: `support_table.py` reads it in the report."""
    mark = request.node.get_closest_marker("support")
    if mark is not None:
        backend = mark.kwargs.get("backend") or request.node.callspec.params["backend"]
        record_property("support", f"{backend} {mark.kwargs['place']}")


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
        .config("spark.local.dir", own_temporary_folder)
        .getOrCreate()
    )
    session.sparkContext.setLogLevel("ERROR")  # what tests provoke need not be printed
    yield session
    session.stop()


@pytest.fixture
def shows_key() -> Callable[[bytes, str | bytes], bool]:
    """Whether a text, or bytes, show a key: as it is, or in one of the forms in which bytes get into a text."""

    def shows(key: bytes, text: str | bytes) -> bool:
        data = text.encode(errors="surrogatepass") if isinstance(text, str) else text
        forms = [
            key,
            key.hex().encode(),
            key.hex().upper().encode(),
            repr(key)[2:-1].encode(),
            repr(list(key)).encode(),
        ]
        for start in range(3):  # what base64 makes of it depends on how many bytes come before
            whole = key[start : start + (len(key) - start) // 3 * 3]
            forms += [base64.b64encode(whole), base64.urlsafe_b64encode(whole)]
        return any(form in data for form in forms)

    return shows


@pytest.fixture
def process_shows_key(shows_key: Callable[[bytes, str | bytes], bool]) -> Callable[[bytes, int], bool]:
    """Whether the environment or the command line of a process show a key."""

    def shows(key: bytes, pid: int) -> bool:
        return any(shows_key(key, Path(f"/proc/{pid}/{name}").read_bytes()) for name in ("environ", "cmdline"))

    return shows
