"""One cell of a drift study as read back: a frozen record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from dart_llm.records import DriftCheck
from dart_llm.results_view import mapping, number

DENSE = "dense"


@dataclass(frozen=True)
class TopicSpan:
    """A topic and the decoded tokens about it: ``start`` to ``end``, which is not included.

    Both are None where the places are not known (free mode).
    """

    name: str
    domain: str
    start: int | None
    end: int | None


@dataclass(frozen=True)
class Masked:
    """Masks of all layers, in force from decode step ``step`` on."""

    step: int
    cause: str
    kept: tuple[int, ...]
    jaccard: tuple[float, ...]
    """Per layer against the masks before; empty for the first ones."""
    evidence_tokens: float
    observed: int = 0
    """Decoded tokens right before ``step`` that ran dense to be observed."""


@dataclass(frozen=True)
class DriftCell:
    """One method on one source (a prompt or a passage)."""

    key: str
    label: str
    status: str
    error: str | None
    model: str
    dtype: str | None
    mode: str
    source: str
    method: str
    sparsity: float | None
    seed: int
    topics: tuple[TopicSpan, ...] = ()
    prompt_tokens: int = 0
    decoded_tokens: int = 0
    finish: str = ""
    checks: tuple[DriftCheck, ...] = ()
    remasks: tuple[Masked, ...] = ()
    dense_from: int | None = None
    """The decode step from which all ran dense to the end, where there is one."""
    accounting: Mapping[str, Any] | None = None
    """``RunReport.to_dict()``; None for the untouched model."""
    metrics: Mapping[str, float | None] | None = None
    text: str = ""
    pieces: tuple[str, ...] = ()
    losses: tuple[float | None, ...] = ()
    """Nats per decoded token (forced mode)."""
    masks: Path | None = None
    """The safetensors file with the kept neurons, if it is there and whole."""

    @property
    def done(self) -> bool:
        return self.status == "done"

    @property
    def dense(self) -> bool:
        return self.method == DENSE

    @property
    def changes(self) -> tuple[int, ...]:
        """Decoded-token indices at which a new topic begins."""
        return tuple(t.start for t in self.topics[1:] if t.start is not None)


def parse(row: Mapping[str, Any], text: Mapping[str, Any], tokens: Mapping[str, Any]) -> DriftCell:
    """A cell from its lines in results.jsonl, texts.jsonl and tokens.jsonl; without masks.

    Raises ``KeyError``, ``TypeError``, ``ValueError`` or ``AttributeError`` for a damaged line.
    """
    own = row["cell"]
    cell = DriftCell(
        key=str(row["key"]),
        label=str(row["label"]),
        status=str(row["status"]),
        error=None if row.get("error") is None else str(row["error"]),
        model=str(own["model"]),
        dtype=own.get("dtype"),
        mode=str(own["mode"]),
        source=str(own["source"]),
        method=str(own["method"]),
        sparsity=number(own.get("sparsity")),
        seed=int(own.get("seed") or 0),
    )
    if not cell.done:
        return cell
    decoded = int(row["decoded_tokens"])
    return replace(
        cell,
        topics=_topics(row.get("topics") or [], decoded),
        prompt_tokens=int(row["prompt_tokens"]),
        decoded_tokens=decoded,
        finish=str(row.get("finish") or ""),
        checks=tuple(_check(check) for check in row.get("checks") or [] if not _lone(check)),
        remasks=tuple(_masked(mask) for mask in row.get("remasks") or []),
        dense_from=None if row.get("dense_from") is None else int(row["dense_from"]),
        accounting=mapping(row.get("accounting")) or None,
        metrics={k: number(v) for k, v in mapping(row.get("metrics")).items()} or None,
        text=str(text.get("text") or ""),
        pieces=tuple(map(str, tokens.get("pieces") or ())),
        losses=tuple(map(number, tokens.get("losses") or ())),
    )


def _topics(rows: Sequence[Mapping[str, Any]], decoded: int) -> tuple[TopicSpan, ...]:
    starts = [None if row.get("start") is None else int(row["start"]) for row in rows]
    found = []
    for place, row in enumerate(rows):
        end = [*starts[1:], decoded][place] if starts[place] is not None else None
        found.append(TopicSpan(str(row["name"]), str(row["domain"]), starts[place], end))
    return tuple(found)


def _masked(row: Mapping[str, Any]) -> Masked:
    jaccard = tuple(float(value) for value in row.get("jaccard") or ())
    kept = tuple(int(count) for count in row["kept"])
    evidence = number(row.get("evidence_tokens")) or 0.0
    observed = int(row.get("observed") or 0)
    return Masked(int(row["step"]), str(row.get("cause") or ""), kept, jaccard, evidence, observed)


CHECK = tuple(field.name for field in fields(DriftCheck))


def _lone(row: Mapping[str, Any]) -> bool:
    """The first window of an arming detector has nothing to be compared with: it stands at 0."""
    return bool(row["state"] == "arming" and row["similarity"] == 0)


def _check(row: Mapping[str, Any]) -> DriftCheck:
    return DriftCheck(**{name: row[name] for name in CHECK})
