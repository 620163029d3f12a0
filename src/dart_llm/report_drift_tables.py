"""The tables of a drift study's page: every quality number beside what was really removed."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from dart_llm import detection_table, drift_tables, drift_words
from dart_llm.drift_view import DriftView
from dart_llm.drift_view_cells import DriftCell
from dart_llm.report_tables import NOTHING, Table

MOST_MASKS = 300
"""Rows of the table of re-masks."""


def methods(view: DriftView) -> Table | None:
    """The summary as ``summary.md`` has it."""
    if not view.summary:
        return None
    shown = drift_tables.columns(view.summary)
    rows = tuple(tuple(make(line) for _, make in shown) for line in view.summary["rows"])
    kind = drift_words.MODES.get(view.mode, "source")
    unit = "losses in nats per token; " if view.mode == "forced" else ""
    caption = f"Means over {view.summary['sources']} {kind}s ({unit}in brackets 95 % intervals)"
    return Table(caption, tuple(head for head, _ in shown), rows)


def remasks(view: DriftView) -> Table | None:
    """Every mask: where, why, from how many tokens, and what it keeps of the one before."""
    body = [
        (
            drift_words.choice(cell),
            str(mask.step),
            mask.cause,
            _topic(cell, mask.step),
            f"{mask.evidence_tokens:.0f}",
            f"{fmean(mask.jaccard):.2f}" if mask.jaccard else NOTHING,
            f"{min(mask.jaccard):.2f} to {max(mask.jaccard):.2f}" if mask.jaccard else NOTHING,
            f"{sum(mask.kept):,}",
        )
        for cell in view.done
        for mask in cell.remasks
    ]
    head = ("cell", "decode step", "cause", "topic", "evidence (tokens)")
    more = ("Jaccard with the mask before", "over layers", "neurons kept")
    caption = "Masks: when, why, and how much of the mask before they keep"
    if len(body) > MOST_MASKS:
        caption += f" (the first {MOST_MASKS} of {len(body):,})"
    return Table(caption, (*head, *more), tuple(body[:MOST_MASKS])) if body else None


def _topic(cell: DriftCell, step: int) -> str:
    """The topic at a step, and how far into it."""
    for topic in reversed(cell.topics):
        if topic.start is not None and topic.start <= step:
            return f"{topic.name}, token {step - topic.start}"
    return NOTHING


def detection(found: Mapping[str, Any]) -> Table | None:
    """Rate, delay and false alarms of every signal and rule, as ``detection.md`` has them."""
    if not found.get("rows"):
        return None
    body = []
    for row in found["rows"]:
        signal, rule, *cells = detection_table.cells(row)
        body.append((f"{signal}, {rule}", *cells))
    _, _, *heads = detection_table.HEADS
    caption = f"Detection of known changes of topic. {detection_table.title(found)}"
    return Table(caption, ("signal, rule", *heads), tuple(body))
