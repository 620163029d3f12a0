"""Update the tables and lists in the documentation, from results files and from the program.

Usage: python benchmarks/tables.py [--check]

A page shows the table of benchmarks/results/NAME.md between ``<!-- table: NAME -->`` and ``<!-- end
of table -->``, or a list of lists.py between ``<!-- list: NAME -->`` and ``<!-- end of list -->``.
``--check`` writes nothing and exits with 1 if a page is stale.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from lists import LISTS, RESULTS, ROOT  # beside this file

MARKED = re.compile(r"(<!-- (table|list): ([\w.-]+) -->\n).*?(<!-- end of \2 -->)", re.DOTALL)
LINK = re.compile(r"\]\(((?!https?:)[^)/]+)\)")


def pages() -> list[Path]:
    """Every page that may show a table or a list."""
    named = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/README.md"]
    return [*named, *sorted((ROOT / "docs").glob("*.md"))]


def sections(name: str) -> tuple[str, str, str]:
    """The commands, provenance and tables in benchmarks/results/NAME.md."""
    text = (RESULTS / f"{name}.md").read_text(encoding="utf-8")
    head, rest = text.split("\n```\n\n", 1)
    provenance, tables = rest.split("\n\n", 1)
    return head.split("```sh\n", 1)[1], provenance, tables.strip()


def table(name: str, folder: Path) -> str:
    """The tables of a results file with their provenance, linked from a page in ``folder``."""
    _, provenance, tables = sections(name)
    up = os.path.relpath(RESULTS, folder)
    provenance = LINK.sub(rf"]({up}/\1)", provenance)
    return f"{tables}\n\n{provenance} [Commands]({up}/{name}.md)."


def filled(page: str, folder: Path) -> str:
    """A page of ``folder`` with up-to-date tables and lists."""

    def block(match: re.Match[str]) -> str:
        begin, kind, name, end = match.groups()
        text = table(name, folder) if kind == "table" else LISTS[name]()
        return f"{begin}\n{text}\n\n{end}"

    return MARKED.sub(block, page)


def main(arguments: list[str]) -> int:
    """Update stale pages; with ``--check``, name them and return 1."""
    stale = {}
    for path in pages():
        text = path.read_text(encoding="utf-8")
        if (new := filled(text, path.parent)) != text:
            stale[path] = new
    if arguments != ["--check"]:
        for path, text in stale.items():
            path.write_text(text, encoding="utf-8")
        return 0
    for path in stale:
        print(f"{path.relative_to(ROOT)} is stale: run python benchmarks/tables.py")
    return int(bool(stale))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
