"""The page at ``/`` and its own files, read once from the package."""

from __future__ import annotations

import json
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any

from dart_llm.texts import prompt_names, read_prompt

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


Site = dict[str, tuple[bytes, str]]
PROMPTS = "prompts.json"


def ready_prompts(site: Site) -> dict[str, Any]:
    """``prompts``: those that the page opens with; ``shipped``: those of ``--prompt NAME``."""
    shipped = [{"title": name, "text": read_prompt(name), "note": ""} for name in prompt_names()]
    own = json.loads(site[PROMPTS][0]) if PROMPTS in site else shipped
    return {"prompts": own, "shipped": shipped}


def static_files() -> Site:
    """{name below ``static/``: (content, type)}; ``index.html`` is always there."""
    found = {"index.html": (PLACEHOLDER, TYPES["html"])}
    folder = files("dart_llm") / "static"
    if folder.is_dir():
        _collect(folder, "", found)
    return found


def _collect(folder: Traversable, prefix: str, found: Site) -> None:
    for entry in folder.iterdir():
        name = f"{prefix}{entry.name}"
        kind = TYPES.get(entry.name.rpartition(".")[2])
        if entry.is_dir():
            _collect(entry, f"{name}/", found)
        elif kind is not None:
            found[name] = (entry.read_bytes(), kind)
