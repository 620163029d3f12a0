"""The files of a comparison: ``compare.md``, ``compare.csv`` and ``compare.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from dart_llm.compare_notes import footnotes
from dart_llm.compare_row import Equal, Row
from dart_llm.compare_tables import failures, markdown
from dart_llm.compare_words import conclusions, leaks
from dart_llm.results import write_csv, write_json, write_text

SCHEMA = 1

INTERVALS = ("interval", "to_dense", "to_griffin")
EQUALS = ("equal_sparsity", "equal_bytes")
LEFT_OUT = ("scores", "checkpoint", "notes", *INTERVALS, *EQUALS)
ENDS = ("low", "high", "estimate", "n")
PAIRED = (*ENDS, "differing", "significant")


def record(row: Row) -> dict[str, Any]:
    """A row as JSON-able data, its intervals and comparisons nested."""
    data: dict[str, Any] = {
        field.name: getattr(row, field.name) for field in fields(Row) if field.name not in LEFT_OUT
    }
    for key in INTERVALS:
        interval = getattr(row, key)
        data[key] = None if interval is None else interval.to_dict()
    for key in EQUALS:
        equal = getattr(row, key)
        data[key] = None if equal is None else _equal_record(equal)
    data["unequal"] = row.unequal
    data["leaks"] = row.leaks
    data["notes"] = list(row.notes)
    data["checkpoint"] = dict(row.checkpoint)
    return data


def _equal_record(equal: Equal) -> dict[str, Any]:
    return {
        "griffin": equal.value,
        "between": list(equal.between),
        "interval": None if equal.interval is None else equal.interval.to_dict(),
    }


def document(rows: Sequence[Row]) -> dict[str, Any]:
    """The whole comparison as JSON-able data."""
    return {
        "schema": SCHEMA,
        "conclusion": conclusions(rows)[0],
        "conclusions": conclusions(rows),
        "rows": [record(row) for row in rows],
        "leaks": [
            {
                "label": leak.published.label,
                "model": leak.published.model,
                "task": leak.published.task,
                "full": leak.full.value,
                "published": leak.published.value,
                "interval": None if leak.interval is None else leak.interval.to_dict(),
            }
            for leak in leaks(rows)
        ],
        "failures": failures(rows),
        "notes": footnotes(rows),
    }


def _csv_row(row: Row) -> dict[str, Any]:
    """All columns of one row, the same for every row."""
    data = record(row)
    for key in ("notes", "checkpoint"):
        data.pop(key)
    for key in INTERVALS:
        ends = ENDS if key == "interval" else PAIRED
        data[key] = {end: (data[key] or {}).get(end) for end in ends}
    for key in EQUALS:
        equal = data[key] or {"griffin": None, "between": [], "interval": None}
        data[key] = {
            "griffin": equal["griffin"],
            "between": " ".join(f"{x:.6g}" for x in equal["between"]),
            **{end: (equal["interval"] or {}).get(end) for end in PAIRED},
        }
    return {
        f"{key}.{name}" if isinstance(value, Mapping) else key: item
        for key, value in data.items()
        for name, item in (value.items() if isinstance(value, Mapping) else [("", value)])
    }


def write_all(folder: Path, rows: Sequence[Row]) -> list[Path]:
    """Write ``compare.md``, ``compare.csv`` and ``compare.json``; returns their paths.

    Raises ``ResultsError`` when a file cannot be written.
    """
    paths = [folder / f"compare.{kind}" for kind in ("md", "csv", "json")]
    write_text(paths[0], markdown(rows))
    table = [_csv_row(row) for row in rows]
    write_csv(paths[1], table[0] if table else [], [list(row.values()) for row in table])
    write_json(paths[2], document(rows))
    return paths
