"""The loss over dense around changes of topic, in bins of tokens, with bootstrap intervals.

A passage is one item: its changes and seeds are averaged first, because what varies within a
passage says little about other passages.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from dart_llm import stats
from dart_llm.drift_losses import BIN
from dart_llm.drift_view import DriftView
from dart_llm.drift_view_cells import DriftCell
from dart_llm.stats import Interval

BEFORE, AFTER = 128, 256
"""Tokens shown before and after a change."""


@dataclass(frozen=True)
class Point:
    """Mean loss over dense, nats per token, of the ``BIN`` tokens from ``start`` on.

    ``start``: tokens after the change, negative before it.  ``n``: passages with that bin.
    """

    start: int
    value: float
    interval: Interval | None
    n: int

    @property
    def middle(self) -> float:
        return self.start + BIN / 2


def around(view: DriftView) -> dict[str, list[Point]]:
    """By method; bins lie within the two topics, and all their tokens have a loss.

    Empty where dense was not measured on the same passages.
    """
    found = {}
    for label in view.labels:
        bins: dict[int, dict[str, list[float]]] = {}
        for cell in view.of(label):
            dense = None if cell.dense else view.dense_of(cell)
            for change in range(len(cell.changes)) if dense else ():
                for start, value in _bins(cell, dense, change):
                    bins.setdefault(start, {}).setdefault(cell.source, []).append(value)
        if bins:
            found[label] = [_point(start, bins[start]) for start in sorted(bins)]
    return found


def _bins(cell: DriftCell, dense: DriftCell | None, change: int) -> Iterator[tuple[int, float]]:
    before, after = cell.topics[change], cell.topics[change + 1]
    low, high, place = before.start or 0, after.end or 0, after.start or 0
    others = dense.losses if dense else ()
    for start in range(-BEFORE, AFTER, BIN):
        first, last = place + start, place + start + BIN
        if first < low or last > min(high, len(cell.losses), len(others)):
            continue
        pairs = zip(cell.losses[first:last], others[first:last], strict=True)
        excess = [a - b for a, b in pairs if a is not None and b is not None]
        if len(excess) == BIN:
            yield start, fmean(excess)


def _point(start: int, by_source: Mapping[str, Sequence[float]]) -> Point:
    values = {source: fmean(own) for source, own in by_source.items()}
    return Point(start, fmean(values.values()), stats.known(values), len(values))
