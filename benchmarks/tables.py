"""Tables and lists of the documentation: written from results files and from the program itself.

Usage: python benchmarks/tables.py [--check]

A view of benchmarks/tables.yaml holds the columns of a table, benchmarks/results the numbers.
Every table is written to benchmarks/results/NAME.md, with its commands, beside the JSON that it is
made of.  A page shows one between ``<!-- table: NAME -->`` and ``<!-- end of table -->``, or a
list of lists.py between ``<!-- list: NAME -->`` and ``<!-- end of list -->``.  ``--check`` writes
nothing and exits with 1 where a file is stale.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from lists import LISTS  # beside this file
from rendering import RESULTS, ROOT, registry, shown, whole

MARKED = re.compile(r"(<!-- (table|list): ([\w.-]+) -->\n).*?(<!-- end of \2 -->)", re.DOTALL)


def pages() -> list[Path]:
    """Every page that may show a table or a list."""
    named = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/README.md"]
    return [*named, *sorted((ROOT / "docs").glob("*.md"))]


def linked(text: str, folder: Path) -> str:
    """Links from the root of the repository as links from ``folder``."""
    up = os.path.relpath(RESULTS, folder)
    return text.replace("](benchmarks/results/", f"]({'' if up == '.' else up + '/'}")


def filled(page: str, folder: Path) -> str:
    """A page of ``folder`` with the newest form of its tables and lists."""

    def block(match: re.Match[str]) -> str:
        begin, kind, name, end = match.groups()
        made = shown(name) if kind == "table" else LISTS[name]()
        return f"{begin}\n{linked(made, folder)}\n\n{end}"

    return MARKED.sub(block, page)


def written() -> dict[Path, str]:
    """Every file that this script writes, with its content."""
    found = {}
    for view in registry()["views"]:
        for block in view["blocks"]:
            text = f"# {block}\n\n<!-- Written by benchmarks/tables.py. -->\n\n{whole(block)}\n"
            found[RESULTS / f"{block}.md"] = linked(text, RESULTS)
    for path in pages():
        found[path] = filled(path.read_text(encoding="utf-8"), path.parent)
    return found


def main(arguments: list[str]) -> int:
    """0 where every table and list is that of its results files, or was written."""
    stale = [
        (path, text)
        for path, text in written().items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]
    if arguments != ["--check"]:
        for path, text in stale:
            path.write_text(text, encoding="utf-8")
        return 0
    for path, _ in stale:
        print(f"{path.relative_to(ROOT)} is stale: run python benchmarks/tables.py")
    return int(bool(stale))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
