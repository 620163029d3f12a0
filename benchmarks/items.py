"""What is kept of every item of a finished run: its id and what was measured on it, never its text.

Written as benchmarks/results/NAME.jsonl beside NAME.json, which is made from the same items.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from common import RESULTS

from dart_llm.files import write_lines

Row = Mapping[str, Any]


def write(name: str, rows: Iterable[Row]) -> Path:
    """Write the lines of one results file."""
    path = RESULTS / f"{name}.jsonl"
    write_lines(path, list(rows))
    return path


def quality(lines: Iterable[Row]) -> list[dict[str, Any]]:
    """A line per model, cell, variant and sparsity: slices by name, and the mean loss of each."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    names = ("model", "cell", "variant", "sparsity")
    for line in lines:
        key = tuple(line[name] for name in names)
        row = found.setdefault(key, {**dict(zip(names, key, strict=True)), "losses": {}})
        row["losses"][line["slice"]] = line["loss"]
    return list(found.values())


def drift(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """A line per method, source and seed: losses or metrics, and when masks were chosen anew."""
    return [
        {
            "label": row["label"],
            "source": row["cell"]["source"],
            "seed": row["cell"]["seed"],
            "decoded_tokens": row["decoded_tokens"],
            "remasks": [remask["step"] for remask in row["remasks"]],
            "loss": _loss(row["loss"]),
            "metrics": row["metrics"],
        }
        for row in rows
        if row["status"] == "done"
    ]


def _loss(found: Row | None) -> dict[str, Any] | None:
    """Mean losses and tokens by topic, without their course over tokens."""
    if found is None:
        return None
    topics = [{k: v for k, v in topic.items() if k != "first"} for topic in found["topics"]]
    return {"topics": topics, "recovery": found["recovery"]}


def detection(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """A line per passage: its changes of topic, and where each rule fired."""
    return [
        {
            "passage": row["passage"]["id"],
            "changes": row["passage"]["changes"],
            "rules": row["rules"],
        }
        for row in rows
        if row["status"] == "done"
    ]
