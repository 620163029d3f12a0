"""Files that texts name without a link: pages in messages and docstrings, paths in code spans."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from doc_links import anchors, headings, pages, without_code

FOLDERS = "benchmarks docs examples recipes scripts src/dart_llm tests"
"""Other paths below src/ are those of the published project (docs/coming-from-scripts.md)."""
SOURCES = (
    *("src/**/*.py", "src/**/*.js", "src/**/*.html", "src/**/*.cpp", "src/**/*.h"),
    *("scripts/*.sh", "benchmarks/*.py", "benchmarks/*.yaml", "recipes/*", "examples/*"),
    *("*.sh", "Makefile", "pyproject.toml", ".ci/*"),
)
PAGE = re.compile(r'(?<![\w/.-])docs/([\w-]+\.md)(#[\w-]+)?(?:, "([^"\n]+)")?')
"""A page of docs/, perhaps with an anchor, or with a heading in quotes behind a comma."""
SPAN = re.compile(rf"`((?:{'|'.join(FOLDERS.split())})/[\w./-]+)`")
"""A path in a code span; patterns and placeholders are none."""


def broken_mentions(root: Path) -> Iterator[str]:
    """One sentence per named file or heading that is not there."""
    for path in sources(root):
        where = path.relative_to(root).as_posix()
        text = path.read_text(encoding="utf-8")
        for name, anchor, heading in PAGE.findall(_joined(text)):
            yield from _page(root, where, name, anchor, heading)
    for page in pages(root):
        if page.is_file():
            where = page.relative_to(root).as_posix()
            for name in SPAN.findall(without_code(page.read_text(encoding="utf-8"))):
                if not (root / name).exists():
                    yield f"{where} names {name}, which does not exist"


def sources(root: Path) -> list[Path]:
    """The files other than pages that may name one."""
    found = {path for pattern in SOURCES for path in root.glob(pattern) if path.is_file()}
    return sorted(path for path in found if path.suffix not in (".pyc", ".ipynb", ".json"))


def _joined(text: str) -> str:
    """The text with string literals that follow each other, and wrapped lines, as one line."""
    return re.sub(r"\s*\n\s*(?:# ?|// ?)?", " ", re.sub(r'"\s*\n\s*f?"', "", text))


def _page(root: Path, where: str, name: str, anchor: str, heading: str) -> Iterator[str]:
    page = root / "docs" / name
    if not page.is_file():
        yield f"{where} names docs/{name}, which does not exist"
        return
    text = page.read_text(encoding="utf-8")
    if anchor and anchor[1:] not in anchors(text):
        yield f"{where} names docs/{name}{anchor}, but there is no such heading"
    if heading and heading not in headings(text):
        yield f'{where} names "{heading}" of docs/{name}, which has no such heading'
