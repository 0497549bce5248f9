"""The examples: the first one is run as users run it; the others, and those of the documents, share a process."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
EXAMPLES = REPOSITORY / "examples"
NUMBER = r"([0-9.]+)"


pytestmark = [pytest.mark.spark, pytest.mark.slow, pytest.mark.timeout(600)]


def run(*arguments: str) -> str:
    """Run Python to its end, which must be a good one; what it printed."""
    if shutil.which("java") is None and "JAVA_HOME" not in os.environ:
        pytest.skip("Java is missing: Spark needs it (apt-get install openjdk-17-jre-headless)")
    finished = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=580, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def test_digits_reach_the_accuracy_that_the_readme_promises() -> None:
    output = run(str(EXAMPLES / "digits.py"), "--master", "local[2]", "--num-ranks", "2")
    found = re.search(rf"held-out accuracy {NUMBER}", output)
    assert found is not None, output
    assert float(found[1]) >= 0.95
    assert len(re.findall(r"^Epoch \d+/15 - .* - accuracy: .* - val_loss: ", output, re.MULTILINE)) == 15


OTHERS = {
    "rdd.py": [],
    "mllib.py": [],
    "pipeline.py": [],
    "features.py": [],
    "loop.py": [],
    "search.py": ["--max-trials", "4", "--epochs", "5"],
}

# To start Java and to import TensorFlow takes longer than most of them.
ONE_AFTER_THE_OTHER = """
import json, runpy, sys

for path, *arguments in json.loads(sys.argv[1]):
    sys.argv = [path, *arguments]
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as ended:
        print("exit code", ended.code)
    print("end of an example", flush=True)
"""


def shown_in(document: Path, word: str) -> str:
    """The one piece of Python in a document in which there is this word."""
    (code,) = (code for code in re.findall(r"```python\n(.*?)```", document.read_text(), re.DOTALL) if word in code)
    return code


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each of them printed; at last its exit code, where it has one."""
    documents = (
        tmp_path_factory.mktemp("documents") / "documents.py"
    )  # the first leaves the session that the second takes
    fit = shown_in(REPOSITORY / "README.md", "load_digits")
    documents.write_text(fit + shown_in(EXAMPLES / "README.md", "mean_of_ranks"))
    commands = [[str(EXAMPLES / script), "--master", "local[2]", *arguments] for script, arguments in OTHERS.items()]
    printed = run("-c", ONE_AFTER_THE_OTHER, json.dumps([*commands, [str(documents)]])).split("end of an example\n")
    return dict(zip([*OTHERS, "documents"], printed[:-1], strict=True))


def test_the_documents_show_what_runs(outputs: dict[str, str]) -> None:
    found = re.search(rf"^{NUMBER}\n{{.*'accuracy': {NUMBER}", outputs["documents"], re.MULTILINE)
    assert found is not None, outputs["documents"]
    assert all(float(value) > 0.9 for value in found.groups()), found[0]
    assert outputs["documents"].endswith("[5.0, 5.0]\n")


@pytest.mark.parametrize(
    ("script", "says", "least"),
    [
        ("rdd.py", rf"held-out accuracy {NUMBER}", [0.9]),
        ("mllib.py", rf"held-out accuracy {NUMBER}", [0.9]),
        ("pipeline.py", rf"held-out accuracy {NUMBER} on wines, R2 {NUMBER} on diabetes", [0.93, 0.35]),
        ("features.py", rf"held-out accuracy {NUMBER} from features", [0.95]),
        ("loop.py", rf"held-out accuracy {NUMBER}", [0.95]),
        ("search.py", rf"accuracy {NUMBER}, of . models together {NUMBER}", [0.8] * 2),
    ],
)
def test_an_example_prints_what_a_model_that_has_learnt_can_do(
    outputs: dict[str, str], script: str, says: str, least: list[float]
) -> None:
    output = outputs[script]
    found = re.search(says, output)
    assert found is not None, output
    assert all(float(value) >= bound for value, bound in zip(found.groups(), least, strict=True)), found[0]
    assert output.endswith("exit code 0\n"), output
