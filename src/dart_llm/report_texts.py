"""The generated texts of the report page: tokens joined by phase, dense first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from dart_llm import sentences
from dart_llm.results_view import ResultsView, mapping

PHASES = {
    "prefill": "from the prompt's last forward, dense",
    "observe": "dense, observed to build a mask",
    "pruned": "masks in force",
    "released": "dense again, after the release step",
}
"""Phases of a pruned run's tokens, as the legend words them."""


@dataclass(frozen=True)
class Span:
    """Consecutive tokens of one phase; ``title`` says which."""

    phase: str
    text: str
    title: str


@dataclass(frozen=True)
class Column:
    """One generated text."""

    name: str
    note: str
    spans: tuple[Span, ...]


def prompts(view: ResultsView) -> list[tuple[str, list[Column]]]:
    """Each prompt with its texts: dense first."""
    found: dict[str, list[dict[str, Any]]] = {}
    for record in view.generations:
        found.setdefault(str(record.get("id")), []).append(record)
    texts = []
    for records in found.values():
        records.sort(key=lambda record: record.get("variant") != "dense")
        texts.append((str(records[0].get("prompt") or ""), [_column(r) for r in records]))
    return texts


def _column(record: Mapping[str, Any]) -> Column:
    dense = record.get("variant") == "dense"
    counted = mapping(record.get("accounting"))
    note = f"{len(record.get('token_ids') or ())} tokens"
    if counted:
        note += (
            f", {sentences.percent(counted.get('achieved_sparsity'))} of the FFN neurons removed, "
            f"{sentences.count(int(counted.get('remasks') or 0), 're-mask')}"
        )
    return Column("dense" if dense else sentences.row_name(record), note, _spans(record, dense))


def _spans(record: Mapping[str, Any], dense: bool) -> tuple[Span, ...]:
    text = str(record.get("text") or "")
    tokens, phases = record.get("tokens") or [], record.get("phases") or []
    fits = len(tokens) == len(phases) and "".join(map(str, tokens)) == text
    if dense or not fits:
        return (Span("", text, ""),)
    spans, start = [], 0
    for phase, group in groupby(zip(phases, tokens, strict=True), key=lambda pair: pair[0]):
        pieces = [str(token) for _, token in group]
        end = start + len(pieces) - 1
        place = f"token {start}" if start == end else f"tokens {start} to {end}"
        known = str(phase) if phase in PHASES else ""
        spans.append(Span(known, "".join(pieces), f"{place}: {PHASES.get(phase, phase)}"))
        start = end + 1
    return tuple(spans)


def phases(prompts: Sequence[tuple[str, Sequence[Column]]]) -> list[tuple[str, str]]:
    """The phases that occur, in order of life, with their words."""
    seen = {span.phase for _, columns in prompts for column in columns for span in column.spans}
    return [(phase, words) for phase, words in PHASES.items() if phase in seen]
