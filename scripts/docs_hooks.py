"""Hooks of mkdocs: pages and results files outside docs/ become part of the site.

So links to them are checked like all others.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BROUGHT = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md",
           "third-party.md": "THIRD_PARTY.md", "changelog.md": "CHANGELOG.md",
           "benchmarks.md": "benchmarks/README.md"}  # fmt: skip
"""Pages of the site that lie outside docs/; the results files beside them keep their places."""


def on_files(files: Any, config: Any) -> Any:
    """Bring the README and its like, and the results files, into the site."""
    from mkdocs.structure.files import File

    results = [p for p in sorted((ROOT / "benchmarks/results").iterdir()) if p.suffix != ".jsonl"]
    kept = {path.relative_to(ROOT).as_posix(): path for path in results}
    for place, path in ({k: ROOT / v for k, v in BROUGHT.items()} | kept).items():
        files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn links that hold in the repository into links of the site.

    What the site lacks (sources, tests, examples) stays as the text of its link.
    """
    here = page.file.src_uri
    home = Path(
        here if here.startswith("benchmarks/") else BROUGHT.get(here, f"docs/{here}")
    ).parent
    places = {path: place for place, path in BROUGHT.items()}

    def link(match: re.Match[str]) -> str:
        image, text, target = match.groups()
        path, _, anchor = target.partition("#")
        where = (ROOT / home / path).resolve()
        if not path or not where.exists() or ROOT not in where.parents:
            return match[0]
        inside = where.relative_to(ROOT).as_posix()
        place = places.get(inside, inside.removeprefix("docs/"))
        if files.get_file_from_path(place) is None:
            return str(text)
        up = "../" * here.count("/")
        return f"{image}[{text}]({up}{place}{'#' + anchor if anchor else ''})"

    return re.sub(r"(!?)\[([^\]]*)\]\(((?!https?:|mailto:)[^)\s]+)\)", link, markdown)
