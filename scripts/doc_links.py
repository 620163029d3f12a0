"""Links of the Markdown pages and notebooks: where they lead, and whether that is there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

INDEX = "docs/README.md"
OTHER_PAGES = ("THIRD_PARTY.md", "CHANGELOG.md", "benchmarks/README.md", "recipes/README.md")
NOTEBOOKS = "examples/*.ipynb"
FENCE = re.compile(r"^( {0,3})(```+|~~~+).*?^\1\2[`~]*\s*$", re.MULTILINE | re.DOTALL)


def pages(root: Path) -> list[Path]:
    """The Markdown files whose links are checked."""
    needed = [root / "README.md", root / "CONTRIBUTING.md", root / INDEX]
    others = [path for name in OTHER_PAGES if (path := root / name).is_file()]
    return [*needed, *others, *sorted({*(root / "docs").glob("*.md")} - {root / INDEX})]


def without_code(text: str) -> str:
    """The text without fenced blocks."""
    return FENCE.sub("", text)


def prose(text: str) -> str:
    """The text without code blocks, code spans and comments."""
    text = re.sub(r"<!--.*?-->", "", without_code(text), flags=re.S)
    return re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "", text)


def headings(text: str) -> list[str]:
    """Every heading, as it is read."""
    found = re.findall(r"^#{1,6}\s+(.+?)\s*#*\s*$", without_code(text), flags=re.M)
    return [re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in found]


def slug(heading: str) -> str:
    """The heading's anchor, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def anchors(text: str) -> set[str]:
    """What a link may name after ``#``: the headings' slugs and ids."""
    found: set[str] = set(re.findall(r'<\w+ [^>]*\b(?:id|name)="([^"]+)"', without_code(text)))
    seen: dict[str, int] = {}
    for heading in map(slug, headings(text)):
        number = seen.get(heading, 0)
        seen[heading] = number + 1
        found.add(f"{heading}-{number}" if number else heading)
    return found


def links(text: str) -> list[str]:
    """The targets of all Markdown and HTML links and images."""
    body = prose(text)
    # the text of a link may be a code span, which ``prose`` leaves out
    found = re.findall(r"\]\(\s*<?([^)\s>]+)>?(?:\s+[\"'][^)]*)?\)", body)
    found += re.findall(r"^ {0,3}\[[^\]]+\]:\s*<?(\S+?)>?(?:\s|$)", body, flags=re.M)
    return found + re.findall(r'\b(?:href|src)="([^"]+)"', body)


def notebook_text(path: Path) -> str:
    """The Markdown cells of a notebook."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def broken_links(root: Path) -> Iterator[str]:
    """One sentence per relative link or anchor that leads nowhere."""
    for page in [*pages(root), *sorted(root.glob(NOTEBOOKS))]:
        where = page.relative_to(root).as_posix()
        if not page.is_file():
            yield f"{where} is missing"
            continue
        text = notebook_text(page) if page.suffix == ".ipynb" else page.read_text(encoding="utf-8")
        for link in links(text):
            if re.match(r"[a-zA-Z][\w+.-]*:|//", link):
                continue
            path, _, anchor = unquote(link).partition("#")
            target = (page.parent / path).resolve() if path else page
            if not target.is_relative_to(root) or not target.exists():
                yield f"{where} links to {link}, which does not exist"
            elif anchor and target.suffix == ".md" and anchor not in anchors(target.read_text()):
                yield f"{where} links to {link}, but {target.name} has no such heading"
