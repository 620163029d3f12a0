"""``report.html`` of an inspection, built from its ``inspect.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dart_llm import page, plot_inspect, report_head, report_tables
from dart_llm.inspect_tables import sheets
from dart_llm.results import write_text
from dart_llm.results_view import ResultsView, mapping, read

DOCUMENT = "inspect.json"
LONG = 12
"""A table with more rows is folded."""

SHOWN = 300
"""Rows of a table on the page, at most; the rest is in the CSV file."""

TELLING = ("ablation", "overlap", "space", "layers", "weights", "neurons")
"""The first of these whose sentence is there heads the page."""

TITLES = {
    "layers": "Layers",
    "weights": "Weights and activations",
    "neurons": "Strong and weak neurons",
    "overlap": "Overlap of the neurons of two texts",
    "ablation": "Ablation",
    "space": "Embedding space",
}


def write(folder: Path) -> Path:
    """Write ``report.html`` into ``folder`` and return its path.

    Without matplotlib the page has no plots and says so.  Raises ``ResultsError`` when the folder
    does not exist or cannot be written.
    """
    path = folder / "report.html"
    write_text(path, render(read(folder), _document(folder)))
    return path


def _document(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / DOCUMENT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = {}
    return {"texts": [], "sentences": {}, "sections": {}, **mapping(found)}


def render(view: ResultsView, document: Mapping[str, Any]) -> str:
    """The page of one inspection."""
    return page.render("inspect.html", _content(view, document))


def _content(view: ResultsView, document: Mapping[str, Any]) -> dict[str, Any]:
    sections, told = document["sections"], document["sentences"]
    drawn, missing = page.pictures(plot_inspect.make(document, view.small_print))
    found = sheets(sections)
    shown = []
    for name in sections:
        own = [sheet for sheet in found if sheet.section == name]
        tables = [
            (sheet.table(), len(sheet.rows) > LONG, f"{sheet.name}.csv")
            for sheet in own
            if len(sheet.rows) <= SHOWN
        ]
        left = [(sheet.caption, f"{sheet.name}.csv") for sheet in own if len(sheet.rows) > SHOWN]
        pictures = [picture for picture in drawn if picture.name in _names(name)]
        shown.append((name, TITLES[name], told.get(name, ""), pictures, tables, left))
    return {
        "title": f"Inside {view.name}",
        "status": str(view.config.get("status") or "unknown"),
        "conclusion": next((told[name] for name in TELLING if name in told), ""),
        "facts": _facts(view, document),
        "texts": document["texts"],
        "sections": shown,
        "missing": missing,
        "settings": report_tables.settings(view),
        "provenance": report_tables.provenance(view),
    }


def _names(section: str) -> tuple[str, ...]:
    """Plots of a section."""
    parts = {"space": ("space_layers", "space_windows", "space_tokens")}
    more = ("activations",) if section == "weights" else ()
    return tuple(f"inspect_{name}" for name in (*parts.get(section, (section,)), *more))


def _facts(view: ResultsView, document: Mapping[str, Any]) -> list[tuple[str, str, bool]]:
    known = {"checkpoint", "file quantisation", "dtype", "device", "date", "sha256", "command"}
    texts = [
        (f"text {text['label']}", f"{text['name']}: {text['tokens_read']} tokens read", False)
        for text in document["texts"]
    ]
    return texts + [fact for fact in report_head.facts(view) if fact[0] in known]
