"""What a run's folder measured, as the rows that ``compare`` works with, whatever kind it is.

Everything becomes a cell as results.jsonl holds it: a damaged file is one sentence in
``problems``, never an exception.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dart_llm import drift_rows
from dart_llm.compare_items import Scores
from dart_llm.compare_row import Row, read_row
from dart_llm.results_view import mapping, number

GENERATE = "generate"
"""The task of a generated text; its metric is the speed."""

STUDIES = ("detect", "inspect", "quality", "speed")
"""Kinds whose results are no cells of a comparison; their folders have tables of their own."""

CELLS, MEASUREMENTS = "results.jsonl", "measurements.json"
EVALUATIONS = ("mmlu.json", "general_nlp.json", "summarization.json")
"""Of ``dart-llm run``: lines of results.jsonl, as ``rows``."""


def read_rows(folder: Path, config: Mapping[str, Any], problems: list[str]) -> tuple[Row, ...]:
    """The rows of a folder in the order of its files; adds to ``problems`` what is damaged."""
    found = []
    for cell in _of_kind(folder, config.get("kind"), problems):
        known = mapping(cell.get("checkpoint")) or mapping(config.get("checkpoint"))
        asked = {**_model(config), **mapping(cell.get("cell"))}
        row = read_row({**cell, "checkpoint": known, "cell": asked})
        row = replace(row, scores=Scores({}, False))  # every item of every run would be kept
        if row.task == GENERATE:
            row = replace(row, status="done", error=None)  # without timing.json there is no speed
        found.append(row)
    return tuple(found)


def read_json(path: Path, problems: list[str]) -> Any:
    """Parsed JSON; None when there is no such file, or it is damaged."""
    text = _text(path, problems)
    try:
        return None if text is None else json.loads(text)
    except (ValueError, RecursionError):
        problems.append(f"{path.name} is damaged")
        return None


def _text(path: Path, problems: list[str]) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError):
        problems.append(f"{path.name} cannot be read")
        return None


def _lines(path: Path, problems: list[str]) -> Iterator[dict[str, Any]]:
    damaged = False
    for line in (_text(path, problems) or "").split("\n"):
        try:
            value = json.loads(line) if line.strip() else {}
        except (ValueError, RecursionError):
            damaged = True
            continue
        if isinstance(value, Mapping) and value:
            yield dict(value)
        damaged |= not isinstance(value, Mapping)
    if damaged:
        problems.append(f"{path.name} is damaged")


def _model(config: Mapping[str, Any]) -> dict[str, Any]:
    settings = mapping(config.get("settings"))
    return {name: settings[name] for name in ("model", "dtype", "seed") if settings.get(name)}


def _of_kind(folder: Path, kind: Any, problems: list[str]) -> Iterator[dict[str, Any]]:
    if kind == "drift":
        yield from drift_rows.cells(mapping(read_json(folder / "summary.json", problems)))
    elif kind not in STUDIES:
        yield from _cells(folder, problems)


def _cells(folder: Path, problems: list[str]) -> Iterator[dict[str, Any]]:
    yield from _generations(folder, problems)
    cells = list(_lines(folder / CELLS, problems))
    yield from cells
    measured = mapping(read_json(folder / MEASUREMENTS, problems)).get("measurements")
    if cells:
        return  # the other files would repeat them
    for entry in map(mapping, measured if isinstance(measured, list) else ()):
        cell = {name: entry.get(name) for name in ("method", "sparsity")}
        yield {"cell": cell, "label": entry.get("label"), "measurement": entry}
    if not measured:
        yield from _perplexities(folder, problems)
    for name in EVALUATIONS:
        rows = mapping(read_json(folder / name, problems)).get("rows")
        yield from (dict(mapping(row)) for row in (rows if isinstance(rows, list) else ()))


def _perplexities(folder: Path, problems: list[str]) -> Iterator[dict[str, Any]]:
    whole = mapping(read_json(folder / "perplexity.json", problems))
    texts = whole.get("texts", [whole])
    for text in map(mapping, texts if isinstance(texts, list) else ()):
        rows = text.get("rows")
        for row in map(mapping, rows if isinstance(rows, list) else ()):
            measurement: dict[str, Any] = {
                "task": f"perplexity:{text.get('text')}",
                "protocol": text.get("protocol"),
                "metric": "perplexity",
                "higher_is_better": False,
                "metrics": {"perplexity": row.get("perplexity")},
                "items": [],
                "accounting": row.get("accounting"),
            }
            cell = {name: row.get(name) for name in ("method", "sparsity")}
            yield {"cell": cell, "label": row.get("label"), "measurement": measurement}


def _generations(folder: Path, problems: list[str]) -> Iterator[dict[str, Any]]:
    timing = mapping(read_json(folder / "timing.json", problems))
    speeds = mapping(timing.get("tokens_per_second"))
    for record in _lines(folder / "generation.jsonl", problems):
        variant = str(record.get("variant"))
        measurement = {
            "task": GENERATE,
            "metric": "tokens_per_second",
            "metrics": {"tokens_per_second": number(speeds.get(variant))},
            "accounting": record.get("accounting"),
        }
        cell = {name: record.get(name) for name in ("method", "sparsity")}
        label = variant if variant == "dense" else None
        yield {"cell": cell, "label": label, "measurement": measurement}
