"""Tables with numbers that nobody generated: measured ones belong into a generated block.

A hand-written Markdown table with a decimal number, a percentage, a time or a size is a problem,
but where its numbers are settings, definitions or other people's: those places are listed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ALLOWED = {
    ("docs/claims.md", "The paper's claims"): "the paper's own figures",
    ("docs/drift.md", "Methods side by side"): "settings of methods; the share of intervals",
    ("docs/drift.md", "Text metrics"): "thresholds by definition",
    ("docs/drift.md", "Pictures and the report page"): "the share of intervals",
    ("docs/drift.md", "Detection quality"): "the layer at 80 % of the depth; a column's unit",
    ("docs/inspect.md", "Looking into a model"): "percentiles by definition",
    ("docs/method.md", "Budgets"): "floors of budgets",
    ("docs/method.md", "Drift"): "settings of guards",
    ("docs/method.md", "Methods"): "settings of methods",
    ("docs/recipes.md", "What each needs"): "sizes of downloads",
    ("docs/server.md", "Queue, limits and the end"): "settings of limits",
    ("docs/server.md", "What this does not serve"): "arithmetic on independent masks",
    ("THIRD_PARTY.md", "Models"): "versions of packages",
}
"""(page, heading) -> why a table there may hold numbers."""

KEYS = re.compile(r"docs/results(-\w+)?\.md")
"""Pages that say what keys and columns mean: percentages of intervals, and no measurement."""

NUMBER = re.compile(r"\d\.\d|\d ?%|\d ?(us|ms|s|min|h|GB|MB|GiB|MiB|KB)\b")
GENERATED = re.compile(r"<!-- generated: (\S+) -->.*?<!-- end of generated: \1 -->", re.DOTALL)
FENCED = re.compile(r"^( {0,3})(```+|~~~+).*?^\1\2[`~]*\s*$", re.MULTILINE | re.DOTALL)
ASIDE = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)|\]\([^)]*\)|(arXiv|DOI) [\w./]+")
"""Code, targets of links and names of papers: no measurements."""


def hand_written(text: str) -> Iterator[tuple[str, str]]:
    """The heading above and the first line with a number of every hand-written table with one."""
    body = FENCED.sub("", GENERATED.sub("", text))
    heading, told = "", False
    for line in body.splitlines():
        if match := re.match(r"#{1,6}\s+(.+?)\s*#*$", line):
            heading = match[1]
        inside = line.startswith("|")
        if inside and not told and NUMBER.search(ASIDE.sub("", line)):
            told = True
            yield heading, line
        told = told and inside


def problems(root: Path, pages: list[Path]) -> Iterator[str]:
    """One sentence per table whose numbers are neither generated nor allowed."""
    for page in pages:
        where = page.relative_to(root).as_posix()
        if KEYS.fullmatch(where):
            continue
        for heading, line in hand_written(page.read_text(encoding="utf-8")):
            if (where, heading) not in ALLOWED:
                yield (
                    f'{where} has a hand-written table with numbers under "{heading}" '
                    f"({line[:60].strip()}...): render it from a file under benchmarks/results, or "
                    "say in scripts/hand_tables.py why it may stay"
                )
