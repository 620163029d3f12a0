"""mkdocs hooks that add pages and results files outside docs/ to the site.

mkdocs then checks links to them like all others.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BROUGHT = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md",
           "third-party.md": "THIRD_PARTY.md", "changelog.md": "CHANGELOG.md",
           "benchmarks.md": "benchmarks/README.md"}  # fmt: skip
"""Pages of the site that are outside docs/; results files keep their paths."""


def on_files(files: Any, config: Any) -> Any:
    """Add the README, the other pages in ``BROUGHT`` and the results files to the site."""
    from mkdocs.structure.files import File

    results = [p for p in sorted((ROOT / "benchmarks/results").iterdir()) if p.suffix != ".jsonl"]
    kept = {path.relative_to(ROOT).as_posix(): path for path in results}
    for uri, path in ({k: ROOT / v for k, v in BROUGHT.items()} | kept).items():
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Convert links between files of the repository to links within the site.

    Links to files that the site lacks (sources, tests, examples) become plain text.
    """
    here = page.file.src_uri
    home = Path(
        here if here.startswith("benchmarks/") else BROUGHT.get(here, f"docs/{here}")
    ).parent
    uris = {path: uri for uri, path in BROUGHT.items()}

    def link(match: re.Match[str]) -> str:
        image, text, target = match.groups()
        path, _, anchor = target.partition("#")
        where = (ROOT / home / path).resolve()
        if not path or not where.exists() or ROOT not in where.parents:
            return match[0]
        inside = where.relative_to(ROOT).as_posix()
        uri = uris.get(inside, inside.removeprefix("docs/"))
        if files.get_file_from_path(uri) is None:
            return str(text)
        up = "../" * here.count("/")
        return f"{image}[{text}]({up}{uri}{'#' + anchor if anchor else ''})"

    return re.sub(r"(!?)\[([^\]]*)\]\(((?!https?:|mailto:)[^)\s]+)\)", link, markdown)
