"""Methods x sparsities x tasks as rows, each compared item by item with dense and with GRIFFIN.

A row comes from one cell of a sweep or comparison (a mapping as its ``results.jsonl`` holds it).
Rows are comparable when model, dtype, task and protocol agree; dense and GRIFFIN are those of the
same seed where there are any, else of another seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

from dart_llm.compare_row import DENSE, GRIFFIN, TOLERANCE, Equal, Row, read_row
from dart_llm.results_view import mapping
from dart_llm.stats import Interval
from dart_llm.task_names import short


def rows(cells: Iterable[Mapping[str, Any]], seed: int = 0) -> list[Row]:
    """One row per cell, in a fixed order: model, protocol and task as they first appear, dense
    first, then each method by sparsity.  ``seed``: of the bootstrap; the same cells give the same
    numbers.  Missing fields are None; failed cells keep their sentence.
    """
    found = _named(_ordered([read_row(cell) for cell in _known(map(mapping, cells))]))
    groups: dict[Any, list[Row]] = {}
    for row in found:
        groups.setdefault(row.group, []).append(row)
    for name, members in groups.items():
        groups[name] = _with_bytes(members)
    found = [groups[row.group].pop(0) for row in found]
    groups = {name: [row for row in found if row.group == name] for name in groups}
    return [_compared(row, groups[row.group], seed) for row in found]


def _known(cells: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """A cell that failed before its model was known takes what another cell of it knew."""

    def asked(cell: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(mapping(cell.get("cell")).get(key) for key in ("model", "revision", "dtype"))

    found = list(cells)
    checkpoints = {asked(cell): cell["checkpoint"] for cell in found if cell.get("checkpoint")}
    return [
        cell
        if cell.get("checkpoint") or asked(cell) not in checkpoints
        else {**cell, "checkpoint": checkpoints[asked(cell)]}
        for cell in found
    ]


def _named(found: list[Row]) -> list[Row]:
    """Tasks over files lose their folders, unless two of them would then be the same."""
    tasks = {row.task for row in found}
    if len({short(task) for task in tasks}) < len(tasks):
        return found
    return [replace(row, task=short(row.task)) for row in found]


def _ordered(found: Sequence[Row]) -> list[Row]:
    def places(key: Callable[[Row], Any]) -> dict[Any, int]:
        return {name: place for place, name in enumerate(dict.fromkeys(map(key, found)))}

    groups = [
        (key, places(key))
        for key in (lambda r: (r.model, r.dtype), lambda r: r.protocol, lambda r: r.task)
    ]
    methods = places(lambda row: row.method)

    def order(row: Row) -> tuple[Any, ...]:
        layered = row.layers is not None
        first = (layered, not row.method.startswith(DENSE), methods[row.method])
        return *(known[key(row)] for key, known in groups), *first, row.asked or 0.0, row.seed or 0

    return sorted(found, key=order)


def _with_bytes(members: Sequence[Row]) -> list[Row]:
    """Bytes as executed where all skip work, else what compact would have read, for all alike."""
    pruned = [row for row in members if row.executor is not None]
    executed = all(row.executor != "masked" for row in pruned)
    return [
        replace(row, bytes_share=row.bytes_executed if executed else row.bytes_if_compact)
        for row in members
    ]


def _compared(row: Row, group: Sequence[Row], seed: int) -> Row:
    if row.status != "done":
        return row
    row = replace(row, interval=row.scores.interval(seed))
    dense = reference(row, [other for other in group if other.method == DENSE])
    if dense is not None and row.method != DENSE:
        row = replace(row, to_dense=row.scores.against(dense.scores, seed))
    if row.method in (DENSE, GRIFFIN) or row.layers is not None:
        return row
    curve = _seeded(row, [o for o in group if o.method == GRIFFIN and o.layers is None])
    griffin = reference(row, [o for o in curve if _same(o.asked, row.asked)])
    against = cache(lambda place: row.scores.against(curve[place].scores, seed))
    if griffin is not None:
        gap = None
        if row.achieved is not None and griffin.achieved is not None:
            gap = row.achieved - griffin.achieved
        row = replace(row, to_griffin=against(curve.index(griffin)), gap=gap)
    return replace(
        row,
        equal_sparsity=_equal(row, curve, lambda other: other.achieved, against, seed),
        equal_bytes=_equal(row, curve, lambda other: other.bytes_share, against, seed),
    )


def _same(a: float | None, b: float | None) -> bool:
    return a is not None and b is not None and abs(a - b) < 1e-9


def _seeded(row: Row, candidates: Sequence[Row]) -> list[Row]:
    """The finished ones of the row's seed, or else of the smallest seed that there is."""
    done = [other for other in candidates if other.status == "done"]
    seeds = {other.seed for other in done}
    if not seeds:
        return []
    chosen = row.seed if row.seed in seeds else min(seeds, key=lambda s: (s is None, s or 0))
    return [other for other in done if other.seed == chosen]


def reference(row: Row, candidates: Sequence[Row]) -> Row | None:
    """The one of ``candidates`` to compare ``row`` with, if any was measured."""
    return next(iter(_seeded(row, candidates)), None)


def _equal(
    row: Row,
    curve: Sequence[Row],
    x: Callable[[Row], float | None],
    against: Callable[[int], Interval | None],
    seed: int,
) -> Equal | None:
    """GRIFFIN where ``x`` is the row's: measured within ``TOLERANCE``, or on the line between the
    two nearest measured points; None outside of what was measured.  ``against``: the comparison
    with one row of the curve."""
    at = x(row)
    points = sorted((here, place) for place, o in enumerate(curve) if (here := x(o)) is not None)
    if at is None or not points:
        return None
    near, place = min(points, key=lambda point: abs(point[0] - at))
    if abs(near - at) <= TOLERANCE + 1e-9:
        return Equal(curve[place].value, against(place), (near,))
    for (low, a), (high, b) in pairwise(points):
        if low < at < high:
            mixed = curve[a].scores.mixed(curve[b].scores, (at - low) / (high - low))
            return Equal(mixed.mean, row.scores.against(mixed, seed), (low, high))
    return None
