"""The tables of pages that are read where no site is built: write them, or check them.

Usage: python benchmarks/readme.py [--check]
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from docs_hooks import measured  # noqa: E402  (behind the line that finds it)

PAGES = {"front": ROOT / "README.md", "graded-planes": ROOT / "benchmarks/README.md"}
"""Tables, and the pages that hold them."""


def written(page: str, table: str, here: str) -> str:
    """A page with the newest form of its table; links are those of a page in folder ``here``."""
    block = rf"(?<=<!-- table: {table} -->\n).*?(?=<!-- end of table -->)"
    made = measured(table).replace(f"]({here}", "](") if here else measured(table)
    return re.sub(block, lambda _: f"\n{made}\n\n", page, flags=re.DOTALL)


def main(arguments: list[str]) -> int:
    """0 where the tables are those of the results files, or were written."""
    for table, path in PAGES.items():
        text = path.read_text(encoding="utf-8")
        folder = path.parent.relative_to(ROOT).as_posix()
        current = written(text, table, "" if folder == "." else f"{folder}/")
        if current == text:
            continue
        if arguments == ["--check"]:
            name = path.relative_to(ROOT)
            print(f"{name}: another table than that of its results; run benchmarks/readme.py")
            return 1
        path.write_text(current, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
