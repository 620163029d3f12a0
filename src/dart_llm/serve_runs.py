"""Past runs for ``/api/runs``: folders below the configured one, and nothing else."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from dart_llm import results_list
from dart_llm.compare_row import Row
from dart_llm.errors import ConfigError
from dart_llm.results_info import RunInfo
from dart_llm.results_rows import GENERATE
from dart_llm.serve_errors import Refusal

DOCUMENTS = (
    "config.json",
    "masks.json",
    "timing.json",
    "perplexity.json",
    "mmlu.json",
    "general_nlp.json",
    "summarization.json",
    "compare.json",
    "inspect.json",
)
"""Files that are shown as they are, where a run has them, under their names without ``.json``."""
TABLES = {
    "compare": "compare.md",
    "sweep": "compare.md",
    "drift": "summary.md",
    "detect": "detection.md",
    "inspect": "inspect.md",
    "quality": "quality.md",
    "speed": "speed.md",
}
"""The file with all tables, by kind of run."""
MEASURED = (
    *("model", "label", "asked", "task", "protocol", "status", "metric", "value", "items"),
    *("achieved", "dense_share", "remasks"),
)
"""What is told of a measured row, under its names in compare.csv."""
LARGEST = 8 << 20
"""Bytes of a file that is still read."""
MOST_RUNS = 500
"""The newest ones are listed."""


REPORT = "report.html"
"""A run's own page."""


def listing(root: Path) -> dict[str, Any]:
    """``runs``: those below ``root`` in a few facts, the newest first; ``total``: how many."""
    found = _runs(root)
    runs = [_facts(root, run) for run in reversed(found[-MOST_RUNS:])]
    return {"runs": runs, "total": len(found)}


def _runs(root: Path) -> list[RunInfo]:
    try:
        found = results_list.find(root)
    except ConfigError:
        return []
    home = root.resolve()
    return [run for run in found if run.path.resolve().is_relative_to(home)]


def _facts(root: Path, run: RunInfo) -> dict[str, Any]:
    return {
        "name": run.path.relative_to(root).as_posix(),
        "experiment": run.experiment,
        "time": run.time,
        "started": None if run.started is None else run.started.isoformat(),
        "status": run.status,
        "kind": run.kind,
        "models": list(run.models),
        "methods": list(run.methods),
        "sparsities": list(run.sparsities),
        "tasks": list(run.tasks),
        "seconds": run.seconds,
    }


def opened(root: Path, name: str) -> dict[str, Any]:
    """One run with what its files hold; raises ``Refusal`` (404) for every other name.

    ``name`` is compared with the names that were found, and never joined to a path.
    """
    run = _named(root, name)
    files = {path.name: path for path in sorted(run.path.iterdir()) if path.is_file()}
    found: dict[str, Any] = {**_facts(root, run), "files": list(files)}
    for document in DOCUMENTS:
        found[document.removesuffix(".json")] = _json(_text(run.path, files.get(document)))
    lines = _text(run.path, files.get("generation.jsonl")).splitlines()
    found["generation"] = [row for line in lines if (row := _json(line)) is not None]
    found["drift"] = _rows(_text(run.path, files.get("drift.csv")))
    found["rows"] = [_measured(row) for row in run.rows if row.task != GENERATE]
    found["tables"] = _text(run.path, files.get(TABLES.get(run.kind, "")))
    return found


def _named(root: Path, name: str) -> RunInfo:
    run = next((one for one in _runs(root) if _facts(root, one)["name"] == name), None)
    if run is None:
        raise Refusal(404, "there is no such run: /api/runs lists them", code="run_not_found")
    return run


def report(root: Path, name: str) -> str:
    """The page of one run; raises ``Refusal`` (404) where there is none, as ``opened`` does."""
    folder = _named(root, name).path
    text = _text(folder, folder / REPORT)
    if not text:
        raise Refusal(404, f"this run has no {REPORT} that can be shown", code="report_not_found")
    return text


def _measured(row: Row) -> dict[str, Any]:
    return {name: getattr(row, name) for name in MEASURED}


def _text(folder: Path, path: Path | None) -> str:
    """ "" for a file that is not there, leads out of its folder, is too large or is no text."""
    try:
        if path is None or path.resolve().parent != folder.resolve():
            return ""
        return path.read_text(encoding="utf-8") if path.stat().st_size <= LARGEST else ""
    except (OSError, UnicodeDecodeError):
        return ""


def _rows(text: str) -> list[dict[str, Any]]:
    """[] for what is no table, such as one with a field of a megabyte."""
    try:
        return list(csv.DictReader(io.StringIO(text)))
    except csv.Error:
        return []


def _json(text: str) -> Any:
    try:
        return json.loads(text) if text else None
    except (ValueError, RecursionError):
        return None
