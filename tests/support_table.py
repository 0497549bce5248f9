"""The README's table of what trains where, from what the tests that are marked `support` have come to. `make support` does it.

python tests/support_table.py REPORT...                         each is what a pytest --junitxml has written; of a test that
                                                                is in several, the last one counts
"""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ET
from collections import defaultdict
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
BACKENDS = {"mpi": "MPI", "horovod": "Horovod, Gloo controller", "horovod-mpi": "Horovod, MPI controller"}
PLACES = {
    "local": "local mode",
    "standalone": "standalone",
    "spark-submit": "spark-submit",
    "namespaces": "several hosts",
    "docker": "Docker",
    "connect": "Connect",
}
BEGIN, END = "<!-- what trains where: made by `make support` -->", "<!-- end -->"


def cells(*reports: str) -> dict[tuple[str, str], str]:
    """(backend, place) -> "passed" if all of its tests that were run passed, else "FAILED"; nothing where none was run."""
    last = {
        (case.get("classname"), case.get("name")): case
        for report in reports
        for case in ET.fromstring(report).iter("testcase")
    }
    outcomes: dict[tuple[str, str], set[str]] = defaultdict(set)
    for case in last.values():
        for entry in case.iter("property"):
            if entry.get("name") == "support":
                backend, place = str(entry.get("value")).split()
                if backend not in BACKENDS or place not in PLACES:
                    raise ValueError(f"{case.get('name')} is marked for {backend!r} and {place!r}: not in the table")
                failed = case.find("failure") is not None or case.find("error") is not None
                skipped = case.find("skipped") is not None
                outcomes[backend, place].add("failed" if failed else "skipped" if skipped else "passed")
    return {cell: "FAILED" if "failed" in each else "passed" for cell, each in outcomes.items() if each != {"skipped"}}


def table(found: dict[tuple[str, str], str]) -> str:
    """The same in Markdown."""
    rows = [["", *PLACES.values()], ["---"] * (len(PLACES) + 1)]
    rows += [
        [title, *(found.get((backend, place), "not run here") for place in PLACES)]
        for backend, title in BACKENDS.items()
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def with_table(text: str, made: str) -> str:
    """The text with this table in the place of the one between the two comments."""
    changed, count = re.subn(
        f"({re.escape(BEGIN)}\n).*?({re.escape(END)})", rf"\g<1>\n{made}\n\n\g<2>", text, flags=re.DOTALL
    )
    if count != 1:
        raise ValueError(f"there are {count} places for the table")
    return changed


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(), table(cells(*(Path(name).read_text() for name in sys.argv[1:])))))
