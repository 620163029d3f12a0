"""The table of the README, which is read where no site is built: write it, or check it.

Usage: python benchmarks/readme.py [--check]
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from docs_hooks import measured  # noqa: E402  (behind the line that finds it)

README = ROOT / "README.md"
BLOCK = re.compile(r"(?<=<!-- table: front -->\n).*?(?=<!-- end of table -->)", re.DOTALL)


def main(arguments: list[str]) -> int:
    """0 where the table is that of the results files, or was written."""
    text = README.read_text(encoding="utf-8")
    current = BLOCK.sub(lambda _: f"\n{measured('front')}\n\n", text)
    if current == text:
        return 0
    if arguments == ["--check"]:
        print("README.md: another table than that of its results files; run benchmarks/readme.py")
        return 1
    README.write_text(current, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
