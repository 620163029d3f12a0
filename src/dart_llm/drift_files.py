"""The files of a drift study that hold its cells; what is finished survives any interruption.

A finished cell is a part of the folder (``results.save_part``) beside its file of masks.  The
files below are made from the parts alone: the same cells give the same bytes, however often the
study was interrupted.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from dart_llm import drift_losses
from dart_llm.drift_cell import Part
from dart_llm.drift_grid import DriftCell
from dart_llm.records import DriftCheck
from dart_llm.results import ResultsFolder, finite, write_csv, write_lines
from dart_llm.settings_drift import FORCED

DONE, FAILED = "done", "failed"
MASKS = "masks"
EVERY = 20.0
"""Seconds between two times that the growing files are written: each is written whole."""

_CHECK = tuple(column.name for column in fields(DriftCheck))


@dataclass
class StudyFiles:
    """The cells of a study in a results folder.  ``failed``: sentences, by key.

    ``moment``: tokens after a change from which ``later`` means are taken.
    """

    folder: ResultsFolder
    cells: Sequence[DriftCell]
    model: str
    moment: int
    dtype: str | None = None
    failed: dict[str, str] = field(default_factory=dict)
    written: float = 0.0

    @property
    def path(self) -> Path:
        return self.folder.path

    @property
    def masks(self) -> Path:
        return self.path / MASKS

    def part(self, cell: DriftCell) -> Part | None:
        """What was computed of ``cell``, masks included; None otherwise."""
        found: Part | None = self.folder.part(cell.key)
        whole = found is not None and (
            found["accounting"] is None or (self.masks / cell.file).exists()
        )
        return found if whole else None

    def save(self, cell: DriftCell, part: Part) -> None:
        """Keep a finished cell; raises ``ResultsError`` when the disk is full or read-only."""
        self.failed.pop(cell.key, None)
        self.folder.save_part(cell.key, part)
        self.grow()

    def fail(self, cell: DriftCell, sentence: str) -> None:
        """Mark a cell whose computation failed; the next run tries it again."""
        self.failed[cell.key] = sentence
        self.grow()

    def metrics(self, cell: DriftCell) -> dict[str, Any] | None:
        """``values`` and ``seconds`` of the comparison of a cell's text with the dense one."""
        found: dict[str, Any] | None = self.folder.part(f"metrics/{cell.key}")
        return found

    def save_metrics(
        self, cell: DriftCell, values: Mapping[str, float | None], seconds: float
    ) -> None:
        """Keep a comparison."""
        part = {"values": finite(dict(values)), "seconds": seconds}
        self.folder.save_part(f"metrics/{cell.key}", part)

    def rows(self) -> list[dict[str, Any]]:
        """Lines of results.jsonl: the finished and the failed cells, in grid order."""
        rows = []
        for cell in self.cells:
            part = self.part(cell)
            if part is not None or cell.key in self.failed:
                rows.append(self._row(cell, part))
        return rows

    def _row(self, cell: DriftCell, part: Part | None) -> dict[str, Any]:
        known = part or {}
        return {
            "key": cell.key,
            "status": FAILED if part is None else DONE,
            "error": self.failed[cell.key] if part is None else None,
            "label": cell.method.label,
            "cell": cell.facts(self.model, self.dtype),
            "topics": known.get("topics", []),
            "prompt_tokens": known.get("prompt_tokens"),
            "decoded_tokens": known.get("decoded_tokens"),
            "finish": known.get("finish"),
            "checks": known.get("checks", []),
            "remasks": known.get("remasks", []),
            "dense_from": known.get("dense_from"),
            "accounting": known.get("accounting"),
            "loss": None if part is None else self._loss(cell, part),
            "metrics": None if part is None else (self.metrics(cell) or {}).get("values"),
        }

    def _loss(self, cell: DriftCell, part: Part) -> dict[str, Any] | None:
        if cell.mode != FORCED:
            return None
        starts, losses = [topic["start"] for topic in part["topics"]], part["losses"]
        dense = self.folder.part(cell.dense_key)
        return {
            "topics": drift_losses.topics(losses, starts, self.moment),
            "recovery": None
            if dense is None
            else drift_losses.recovery(losses, dense["losses"], starts),
        }

    def grow(self) -> None:
        """Write the files when the last time is a while ago."""
        if time.monotonic() - self.written >= EVERY:
            self.write()

    def write(self) -> list[dict[str, Any]]:
        """results.jsonl, texts.jsonl, tokens.jsonl and drift.csv; returns the rows."""
        rows = self.rows()
        write_lines(self.path / "results.jsonl", rows)
        write_lines(self.path / "tokens.jsonl", self._tokens())
        if any(cell.mode != FORCED for cell in self.cells):
            write_lines(self.path / "texts.jsonl", self._texts())
        write_csv(self.path / "drift.csv", ("key", *_CHECK), _checks(rows))
        self.written = time.monotonic()
        return rows

    def _parts(self) -> Iterator[tuple[DriftCell, Part]]:
        for cell in self.cells:
            part = self.part(cell)
            if part is not None:
                yield cell, part

    def _texts(self) -> Iterator[dict[str, Any]]:
        for cell, part in self._parts():
            yield {
                "key": cell.key,
                "id": cell.source.id,
                "method": cell.method.label,
                "seed": cell.seed,
                "text": part["text"],
            }

    def _tokens(self) -> Iterator[dict[str, Any]]:
        for cell, part in self._parts():
            losses = {} if part["losses"] is None else {"losses": part["losses"]}
            yield {"key": cell.key, "pieces": part["pieces"], **losses}


def _checks(rows: Sequence[Mapping[str, Any]]) -> Iterator[list[Any]]:
    for row in rows:
        for check in row["checks"]:
            values = (check[name] for name in _CHECK)
            yield [row["key"], *(int(v) if isinstance(v, bool) else v for v in values)]
