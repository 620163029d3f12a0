"""Sweeps over layers: the metric by the layer that was pruned, one curve per share kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dart_llm.compare_format import quantity
from dart_llm.compare_row import DENSE, Row
from dart_llm.sentences import percent


@dataclass(frozen=True)
class LayerCurve:
    """One method on one task, pruned to ``keep`` in one layer, or group of layers, at a time."""

    method: str
    keep: float | None
    base_keep: float | None
    seed: int | None
    rows: tuple[Row, ...]
    dense: Row | None

    @property
    def name(self) -> str:
        """ "griffin, keep 50 %"; with what the other layers keep, where they are pruned too."""
        kept = "" if self.keep is None else f", keep {percent(self.keep)}"
        base = "" if self.base_keep is None else f" (others {percent(self.base_keep)})"
        return f"{self.method}{kept}{base}"


def curves(rows: Sequence[Row]) -> list[LayerCurve]:
    """All layer curves, layers in the order of their numbers; failed cells leave a gap."""
    found: dict[Any, list[Row]] = {}
    for row in rows:
        if row.layers is not None and row.value is not None:
            key = (row.group, row.method, row.keep, row.base_keep, row.seed)
            found.setdefault(key, []).append(row)
    return [_curve(own, rows) for own in found.values()]


def _curve(own: Sequence[Row], rows: Sequence[Row]) -> LayerCurve:
    first = own[0]
    ordered = sorted(own, key=lambda row: first_layer(row.layers))
    dense = [r for r in rows if r.method == DENSE and r.group == first.group and r.value]
    return LayerCurve(
        first.method,
        first.keep,
        first.base_keep,
        first.seed,
        tuple(ordered),
        dense[0] if dense else None,
    )


def first_layer(layers: str | None) -> tuple[int, str]:
    """Sorts "2" before "10", and "0-3" before "4-7"."""
    text = str(layers)
    digits = text.partition("-")[0].partition(",")[0]
    return (int(digits) if digits.isdigit() else 10**9), text


def sentences(rows: Sequence[Row]) -> list[str]:
    """Which layer costs the most, a sentence per curve."""
    found = curves(rows)
    several = len({curve.rows[0].model for curve in found}) > 1
    return [
        f"{f'{curve.rows[0].model}: ' if several else ''}{_sentence(curve)}." for curve in found
    ]


def _sentence(curve: LayerCurve) -> str:
    first = curve.rows[0]
    sign = -1 if first.higher_is_better else 1
    ranked = sorted(curve.rows, key=lambda row: sign * (row.value or 0.0))
    worst, best = ranked[-1], ranked[0]

    def said(row: Row) -> str:
        return f"layer {row.layers} ({first.metric} {quantity(row.value, row.perplexity)})"

    dense = ""
    if curve.dense is not None:
        dense = f"; dense has {quantity(curve.dense.value, curve.dense.perplexity)}"
    words = f"On {first.task}, {curve.name}"
    if len(curve.rows) == 1:
        return f"{words}: {said(worst)}{dense}"
    return f"{words}: {said(worst)} costs the most, {said(best)} the least{dense}"
