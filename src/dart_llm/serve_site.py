"""The page at ``/`` and its own files, read once from the package."""

from __future__ import annotations

from importlib.resources import files
from importlib.resources.abc import Traversable

TYPES = {
    "css": "text/css; charset=utf-8",
    "html": "text/html; charset=utf-8",
    "ico": "image/x-icon",
    "js": "text/javascript; charset=utf-8",
    "json": "application/json",
    "png": "image/png",
    "svg": "image/svg+xml",
    "woff2": "font/woff2",
}
"""Kinds of files that are served."""

PLACEHOLDER = b"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>dart-llm</title>
<h1>dart-llm serves here</h1>
<p>This installation has no page. The API is at /v1/chat/completions; /openapi.json describes it.
</html>
"""


def static_files() -> dict[str, tuple[bytes, str]]:
    """{name below ``static/``: (content, type)}; ``index.html`` is always there."""
    found = {"index.html": (PLACEHOLDER, TYPES["html"])}
    folder = files("dart_llm") / "static"
    if folder.is_dir():
        _collect(folder, "", found)
    return found


def _collect(folder: Traversable, prefix: str, found: dict[str, tuple[bytes, str]]) -> None:
    for entry in folder.iterdir():
        name = f"{prefix}{entry.name}"
        kind = TYPES.get(entry.name.rpartition(".")[2])
        if entry.is_dir():
            _collect(entry, f"{name}/", found)
        elif kind is not None:
            found[name] = (entry.read_bytes(), kind)
