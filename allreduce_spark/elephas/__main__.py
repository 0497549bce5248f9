"""Run a script that was written for Elephas as it is.

python -m allreduce_spark.elephas script.py [args]
spark-submit [options] .../allreduce_spark/elephas/__main__.py script.py [args]
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import ModuleType

USAGE = "usage: python -m allreduce_spark.elephas script.py [args]"


def main() -> None:
    """Be `python script.py args`, but that `import elephas` finds this package."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.exit(
            f"{USAGE}\n\nRuns the script with `import elephas` finding allreduce_spark.elephas, executors included."
        )
    script = Path(arguments[0])
    if not script.is_file():
        sys.exit(f"{USAGE}\n\nThere is no file {str(script)!r}.")
    if not getattr(sys.flags, "safe_path", False):
        # Under spark-submit, the first place to look for modules is this very folder, where `utils` and the like are ours.
        sys.path[0] = str(script.resolve().parent)
    sys.argv[:] = arguments

    from allreduce_spark.elephas import alias

    alias.install()
    with io.open_code(str(script.resolve())) as file:
        code = compile(file.read(), str(script), "exec")
    module = ModuleType("__main__")
    module.__file__ = str(script.absolute())
    module.__dict__.update(__builtins__=__builtins__, __cached__=None)
    sys.modules["__main__"] = module
    exec(code, module.__dict__)  # noqa: S102 - the user's own script, which is what they asked to run


if __name__ == "__main__":
    main()
