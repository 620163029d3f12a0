"""A results folder as read back: what is missing or damaged is empty, never an error.

Plots, the report page and later comparisons read runs through this one file.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dart_llm.errors import ResultsError
from dart_llm.records import DriftCheck

EVALUATIONS = ("mmlu", "general_nlp", "summarization")
"""Files that an evaluation of ``dart-llm run`` writes, without their ending."""


@dataclass(frozen=True)
class ResultsView:
    """The files of one folder, parsed; every field may be empty."""

    folder: Path
    config: dict[str, Any]
    generations: tuple[dict[str, Any], ...]
    perplexity: tuple[dict[str, Any], ...]
    """One document per text, each with ``rows``."""
    timing: dict[str, Any]
    remasks: tuple[dict[str, Any], ...]
    layers: tuple[dict[str, Any], ...]
    drift: tuple[DriftCheck, ...]
    evaluations: tuple[tuple[str, tuple[dict[str, Any], ...]], ...] = ()
    """Name of the evaluation (``mmlu``, ...) and its rows, one per method and task."""

    @property
    def checkpoint(self) -> dict[str, Any]:
        return mapping(self.config.get("checkpoint"))

    @property
    def generated(self) -> dict[str, Any] | None:
        """Accounting of the pruned generation, if there is one."""
        for record in self.generations:
            if record.get("variant") != "dense" and record.get("accounting"):
                return mapping(record["accounting"])
        return None

    @property
    def method(self) -> str:
        """The method of the run, or "unknown"."""
        own = self.generated or mapping(self.config.get("prune"))
        return str(own.get("method") or "unknown")

    @property
    def asked(self) -> float | None:
        """The sparsity that was asked for; None when the run did not say."""
        found = (self.generated or {}).get("requested_sparsity")
        return number(mapping(self.config.get("prune")).get("sparsity") if found is None else found)

    @property
    def name(self) -> str:
        """The checkpoint's short name."""
        known = self.checkpoint.get("name") or mapping(self.config.get("settings")).get("model")
        return str(known or "unknown model").rstrip("/").rsplit("/", 1)[-1]

    @property
    def small_print(self) -> str:
        """The checkpoint in one line: name, file quantisation, dtype, start of the checksum."""
        facts = self.checkpoint
        parts = [self.name]
        if facts.get("file_quantisation"):
            parts.append(f"file quantisation {facts['file_quantisation']}")
        if facts.get("dtype"):
            parts.append(str(facts["dtype"]))
        if facts.get("sha256"):
            parts.append(f"sha256 {str(facts['sha256'])[:12]}")
        return " · ".join(parts)


def read(folder: Path) -> ResultsView:
    """Read what is there; raises ``ResultsError`` when there is no such folder."""
    if not folder.is_dir():
        raise ResultsError(f"{folder} is not a results folder: give the folder that a run wrote")
    masks = mapping(_json(folder / "masks.json"))
    ppl = mapping(_json(folder / "perplexity.json"))
    documents = _mappings(ppl["texts"]) if "texts" in ppl else (ppl,)
    return ResultsView(
        folder,
        mapping(_json(folder / "config.json")),
        _lines(folder / "generation.jsonl"),
        tuple(_document(document) for document in documents if document.get("rows")),
        mapping(_json(folder / "timing.json")),
        tuple(
            {**mask, "kept": _counts(mask.get("kept"))} for mask in _mappings(masks.get("remasks"))
        ),
        _mappings(masks.get("layers")),
        _checks(folder / "drift.csv"),
        tuple((name, rows) for name in EVALUATIONS if (rows := _rows(folder / f"{name}.json"))),
    )


def _rows(path: Path) -> tuple[dict[str, Any], ...]:
    rows = _mappings(mapping(_json(path)).get("rows"))
    return tuple(row for row in rows if mapping(row.get("measurement")))


def mapping(value: Any) -> dict[str, Any]:
    """``value`` when it is a mapping, else an empty one."""
    return dict(value) if isinstance(value, Mapping) else {}


def number(value: Any) -> float | None:
    """``value`` as a float when it is a number, else None."""
    usable = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if usable else None


def _mappings(value: Any) -> tuple[dict[str, Any], ...]:
    items = value if isinstance(value, list) else []
    return tuple(dict(item) for item in items if isinstance(item, Mapping))


def _counts(value: Any) -> list[int]:
    """Whole numbers, or nothing when one of them is not."""
    items = value if isinstance(value, list) else []
    return items if all(isinstance(item, int) for item in items) else []


def _document(document: Mapping[str, Any]) -> dict[str, Any]:
    """A perplexity document whose rows are mappings; intervals that are not finite are dropped."""
    rows = []
    for row in _mappings(document["rows"]):
        interval = row.get("interval") or ()
        whole = len(interval) == 2 and all(number(end) is not None for end in interval)
        rows.append({**row, "interval": interval if whole else None})
    return {**document, "rows": rows}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _json(path: Path) -> Any:
    try:
        return json.loads(_text(path))
    except ValueError:
        return None


def _lines(path: Path) -> tuple[dict[str, Any], ...]:
    found = []
    for line in _text(path).split("\n"):
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return _mappings(found)


def _checks(path: Path) -> tuple[DriftCheck, ...]:
    checks = []
    for row in csv.DictReader(_text(path).splitlines()):
        try:
            check = _check(row)
        except (KeyError, TypeError, ValueError):
            continue
        if math.isfinite(check.similarity):
            checks.append(check)
    return tuple(checks)


def _check(row: Mapping[str, str]) -> DriftCheck:
    threshold = row["threshold"]
    return DriftCheck(
        sequence=int(row["sequence"]),
        row=int(row["row"]),
        step=int(row["step"]),
        layer=int(row["layer"]),
        window=int(row["window"]),
        similarity=float(row["similarity"]),
        threshold=float(threshold) if threshold else None,
        counter=int(row["counter"]),
        trigger=row["trigger"] in ("1", "True", "true"),
        state=row["state"],
    )
