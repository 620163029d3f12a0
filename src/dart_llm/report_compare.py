"""``report.html`` of a comparison, a sweep or an evaluation, built from its ``results.jsonl``.

Like the page of a run: no script, no request to anywhere, everything from a file escaped.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dart_llm import (
    compare,
    compare_notes,
    page,
    plot_compare,
    plot_layers,
    report_head,
    report_tables,
)
from dart_llm.compare_row import DENSE, Row
from dart_llm.compare_tables import failures, tables
from dart_llm.compare_words import conclusions, leak_sentence, leaks
from dart_llm.report_tables import Table
from dart_llm.results import write_text
from dart_llm.results_view import ResultsView, mapping, read
from dart_llm.sentences import count, percent

RESULTS = "results.jsonl"

LONG = 24
"""A table with more rows is folded."""

MANY = 4
"""So are more sentences than these."""


def write(folder: Path, rows: Sequence[Row] | None = None) -> Path:
    """Write ``report.html`` into ``folder`` and return its path.

    ``rows``: what ``compare.rows`` gave for the folder's cells (default: computed here).  Without
    matplotlib the page has no plots and says so.  Raises ``ResultsError`` when the folder does not
    exist or cannot be written, ``MissingExtra`` without scipy.
    """
    view = read(folder)
    found = compare.rows(read_cells(folder)) if rows is None else rows
    path = folder / "report.html"
    write_text(path, render(view, found))
    return path


def read_cells(folder: Path) -> list[dict[str, Any]]:
    """The finished and failed cells of a folder; a line that is not whole is left out."""
    try:
        lines = (folder / RESULTS).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError):
        return []
    found = []
    for line in lines:
        try:
            cell = json.loads(line)
        except ValueError:
            continue
        if isinstance(cell, dict):
            found.append(cell)
    return found


def render(view: ResultsView, rows: Sequence[Row]) -> str:
    """The page of one comparison."""
    return page.render("compare.html", _content(view, rows), {"stacked": stacked})


def stacked(cell: str) -> tuple[str, str, str]:
    """ "0.4 (0.3 to 0.5) better" as its number, its interval and what is said of it."""
    value, _, rest = cell.partition(" (")
    ends, closed, said = rest.partition(")")
    return (value, ends, said.strip()) if closed else (cell, "", "")


def _content(view: ResultsView, rows: Sequence[Row]) -> dict[str, Any]:
    told = conclusions(rows)
    pictures, missing = page.pictures([*plot_compare.make(rows), *plot_layers.make(rows)])
    return {
        "title": title(rows),
        "status": str(view.config.get("status") or "unknown"),
        "conclusion": told[0],
        "further": told[1:],
        "many": len(told) - 1 > MANY,
        "facts": _facts(view, rows),
        "leak": compare_notes.LEAK_NOTE if any(row.leaks for row in rows) else "",
        "leaks": [leak_sentence(leak) for leak in leaks(rows)],
        "pictures": pictures,
        "missing": missing,
        "tables": [(table, len(table.rows) > LONG) for table in tables(rows)],
        "failures": failures(rows),
        "notes": compare_notes.footnotes(rows),
        "checkpoints": _checkpoints(rows),
        "settings": report_tables.settings(view),
        "provenance": report_tables.provenance(view),
    }


def title(rows: Sequence[Row]) -> str:
    """What was compared, and on which model."""
    models = list(dict.fromkeys(row.model for row in rows))
    labels = list(dict.fromkeys(row.label for row in rows if row.method != DENSE))
    where = f" on {models[0]}" if len(models) == 1 else f" on {len(models)} models"
    if not rows:
        return "Nothing was measured"
    if all(row.layers is not None or row.method == DENSE for row in rows) and labels:
        return f"Layer by layer{where}"
    if len(labels) < 2:
        return f"{labels[0] if labels else DENSE}{where}"
    methods = dict.fromkeys(row.method for row in rows if row.method != DENSE)
    return f"{count(len(methods), 'method')} compared{where}"


def _facts(view: ResultsView, rows: Sequence[Row]) -> list[tuple[str, str, bool]]:
    """Name, value, and whether the value is to be set as code."""

    done = sum(row.status == "done" for row in rows)
    asked = sorted({row.asked for row in rows if row.asked})
    found = [
        ("models", report_head.named([row.model for row in rows]), False),
        ("dtype", report_head.named([row.dtype for row in rows]), False),
        ("methods", report_head.named([row.method for row in rows]), False),
        ("sparsities asked for", ", ".join(map(percent, asked)) or "none", False),
        ("tasks", report_head.named([row.task for row in rows]), False),
        ("protocols", report_head.named([row.protocol for row in rows]), False),
        ("seeds", report_head.named([row.seed for row in rows]), False),
        ("cells", f"{done} done, {len(rows) - done or 'none'} failed", False),
    ]
    known = {"device", "date", "command"}
    return found + [fact for fact in report_head.facts(view) if fact[0] in known]


def _checkpoints(rows: Sequence[Row]) -> Table | None:
    """The files that were measured, with what identifies them."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        known = mapping(row.checkpoint)
        if known:
            found.setdefault(json.dumps(known, sort_keys=True, default=str), known)
    keys = ("name", "file_quantisation", "dtype", "revision", "sha256")
    body = tuple(
        tuple("not known" if known.get(key) is None else str(known[key])[:40] for key in keys)
        for known in found.values()
    )
    head = ("checkpoint", "file quantisation", "dtype", "revision", "sha256 (start)")
    return Table("Checkpoints", head, body, numeric=False) if body else None
