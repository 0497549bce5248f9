"""Who may import what: each foreign library has one door, and importing the package leaves the process as it was.

The order of the rooms themselves is the contract of import-linter, in pyproject.toml.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

import allreduce_spark

PACKAGE = Path(allreduce_spark.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

# Foreign library: the folders and files of the package that may import it.
DOORS = {
    "pyspark": ["spark/", "elephas/"],
    "py4j": ["spark/", "elephas/"],
    "keras": ["training/"],
    "tensorflow": [
        "training/backends/tensorflow.py",
        "training/cores.py",
        "training/loops.py",  # has to do with the user's data sets of TensorFlow
        "communicator/horovod.py",  # its operations are TensorFlow's
    ],
    "jax": ["training/backends/jax.py", "training/cores.py"],
    "torch": ["training/backends/torch.py", "training/cores.py"],
    "mpi4py": ["communicator/mpi.py"],
    "horovod": ["communicator/horovod.py"],
    "cryptography": ["rendezvous/handshake.py"],
}
STANDARD_LIBRARY_ONLY = ["__init__.py", "errors.py", "world.py", "config.py"]


class WithoutTypeImports(ast.NodeTransformer):
    def visit_If(self, node: ast.If) -> ast.If | list[ast.stmt]:  # named by ast
        self.generic_visit(node)
        return node.orelse if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING" else node


def imported_modules(source: str) -> set[str]:
    """The modules that this source imports anywhere when it runs: at the top, in functions, or by name.

    What is imported under TYPE_CHECKING lends its name to annotations only.
    """
    found = set()
    for node in ast.walk(WithoutTypeImports().visit(ast.parse(source))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                found.add(str(node.args[0].value))
    return found


def imported_packages(module: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported_modules(module.read_text(encoding="utf-8"))}


@pytest.mark.parametrize(
    "source",
    [
        "import pyspark.sql",
        "from pyspark.sql import DataFrame",
        "def f():\n    import pyspark",
        "if TYPE_CHECKING:\n    import keras\nelse:\n    from pyspark import RDD",
        "importlib.import_module('pyspark.ml')",
        "__import__('pyspark')",
    ],
)
def test_every_way_to_import_is_seen(source):
    assert {name.partition(".")[0] for name in imported_modules(source)} == {"pyspark"}


@pytest.mark.parametrize("library", DOORS)
def test_a_foreign_library_is_imported_through_its_door_alone(library):
    elsewhere = [
        path
        for module in MODULES
        if library in imported_packages(module)
        and not (path := module.relative_to(PACKAGE).as_posix()).startswith(tuple(DOORS[library]))
    ]
    assert not elsewhere, f"{library} may be imported in {DOORS[library]} only, not in {elsewhere}"


@pytest.mark.parametrize("path", STANDARD_LIBRARY_ONLY)
def test_the_lowest_rooms_need_the_standard_library_only(path):
    assert imported_packages(PACKAGE / path) <= sys.stdlib_module_names | {"allreduce_spark"}


def test_every_public_name_has_a_home_that_defines_it():
    homes = allreduce_spark._HOME_OF
    assert set(allreduce_spark.__all__) == {*homes, "__version__"}
    for name, home in homes.items():
        # The spec alone: importing the home would import pyspark.
        spec = importlib.util.find_spec(home)
        assert spec is not None, f"{name} is said to be in {home}, which does not exist"
        assert name in defined_names(Path(spec.origin)), f"{home} does not define {name}"


def defined_names(module: Path) -> set[str]:
    body = ast.parse(module.read_text(encoding="utf-8")).body
    names = {node.name for node in body if isinstance(node, (ast.ClassDef, ast.FunctionDef))}
    assigned = [target for node in body if isinstance(node, ast.Assign) for target in node.targets]
    return names | {target.id for target in assigned if isinstance(target, ast.Name)}


LOOK_AROUND = """
import json, logging, os, signal, sys, threading, warnings

def state():
    return {
        "environment": dict(os.environ),
        "signal handlers": [str(signal.getsignal(number)) for number in sorted(signal.valid_signals())],
        "log handlers": [str(handler) for handler in logging.getLogger().handlers],
        "log level": logging.getLogger().level,
        "warning filters": [str(entry) for entry in warnings.filters],
        "threads": threading.active_count(),
        "working folder": os.getcwd(),
        "search path": list(sys.path),
    }

before = state()
import allreduce_spark
dir(allreduce_spark), allreduce_spark.__version__
after = state()
print(json.dumps({
    "changed": [key for key in before if before[key] != after[key]],
    "imported": sorted({name.partition(".")[0] for name in sys.modules}),
}))
"""


@pytest.fixture(scope="module")
def after_import():
    """What `import allreduce_spark` did to a fresh process."""
    answer = subprocess.run(
        [sys.executable, "-c", LOOK_AROUND], cwd=PACKAGE.parent, capture_output=True, text=True, timeout=60, check=True
    )
    return json.loads(answer.stdout)


def test_importing_the_package_imports_no_foreign_library(after_import):
    assert not set(DOORS) & set(after_import["imported"])


def test_importing_the_package_changes_no_global_state(after_import):
    assert after_import["changed"] == []


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'SparkModle'"):
        _ = allreduce_spark.SparkModle
