"""Plots of a comparison: quality against achieved sparsity, one line per method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dart_llm.compare_format import quantity
from dart_llm.compare_row import DENSE, Row
from dart_llm.plot_base import INK, Palette, Plot
from dart_llm.plot_lines import (
    Look,
    bars_words,
    curve,
    dense_line,
    dense_row,
    heights,
    key,
    leak_words,
    log_scale,
    looks_of,
    metric_axis,
    panels,
    small_print,
)
from dart_llm.sentences import percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_PANELS = 6
"""Tasks in one plot; what is more goes into further plots."""

SIDEWAYS = 0.006
"""Sparsity by which the marks of two methods at one place are moved apart."""

FAR = 30.0
"""Perplexities over this multiple of dense are named at the edge: the rest stays legible."""


def make(rows: Sequence[Row]) -> list[Plot]:
    """One plot per model, dtype and protocol and up to six tasks; none where nothing is a curve."""
    found: dict[tuple[Any, ...], dict[str, list[Row]]] = {}
    for row in rows:
        if row.status == "done" and row.layers is None and row.value is not None:
            key = (row.model, row.dtype, row.protocol)
            found.setdefault(key, {}).setdefault(row.task, []).append(row)
    plots: list[Plot] = []
    for tasks in found.values():
        curves = [own for own in tasks.values() if len(_placed(own)) > 1]
        for start in range(0, len(curves), MOST_PANELS):
            plots.append(_plot(curves[start : start + MOST_PANELS], len(plots) + 1))
    return plots


def _placed(rows: Sequence[Row]) -> list[Row]:
    """The rows that are a point: not the untouched model, whose line runs across."""
    return [row for row in rows if row.method != DENSE and row.achieved is not None]


def _plot(curves: Sequence[Sequence[Row]], number: int) -> Plot:
    first = curves[0][0]
    methods = list(dict.fromkeys(row.method for own in curves for row in _placed(own)))
    protocol = f"protocol {first.protocol or 'not known'}{leak_words(first)}"
    title = f"Quality against achieved sparsity: {first.model}, {protocol}"
    apart = "; marks at one place are moved sideways by up to 2 points" if len(methods) > 1 else ""
    bars = bars_words([row for own in curves for row in _placed(own)])
    small = small_print(first, f"{bars}{apart}")

    def draw(figure: Figure, palette: Palette, narrow: bool) -> None:
        looks, columns = looks_of(methods, palette), 3 if narrow else 6
        lines = math.ceil((len(methods) + 1) / columns)
        above, *drawn = panels(figure, len(curves), narrow, lines)
        for axes, own in zip(drawn, curves, strict=True):
            _draw(axes, own, looks)
        key(above, drawn, columns)

    name = "quality" if number == 1 else f"quality_{number}"
    return Plot(name, title, _alt(curves), small, *heights(len(curves), draw, len(methods)))


def _draw(axes: Axes, rows: Sequence[Row], looks: dict[str, Look]) -> None:
    placed = _placed(rows)
    dense = dense_row(rows)
    methods = list(dict.fromkeys(row.method for row in placed))
    spots: list[tuple[Row, float]] = []
    for place, method in enumerate(methods):
        own = sorted((r for r in placed if r.method == method), key=lambda r: r.achieved or 0.0)
        shift = SIDEWAYS * (place - (len(methods) - 1) / 2)
        for seed in dict.fromkeys(row.seed for row in own):
            line = [row for row in own if row.seed == seed]
            x = [100 * ((row.achieved or 0.0) + shift) for row in line]
            name = method if seed == own[0].seed else "_"
            curve(axes, line, x, dense, {**looks[method], "label": name})
            spots += zip(line, x, strict=True)
    dense_line(axes, dense)
    metric_axis(axes, rows)
    _far(axes, spots, dense)
    axes.set_xlabel("achieved sparsity (%)")


def _far(axes: Axes, spots: Sequence[tuple[Row, float]], dense: Row | None) -> None:
    """Cut a perplexity axis off where it would hide everything else, and say what lies beyond."""
    if dense is None or not dense.value or not dense.perplexity:
        return
    limit = FAR * dense.value
    beyond = [(row, x) for row, x in spots if (row.value or 0.0) > limit]
    if not beyond or len(beyond) == len(spots):
        return
    low, _ = axes.get_ylim()
    highest = max(row.value or 0.0 for row, _ in spots if (row.value or 0.0) <= limit)
    log_scale(axes, low, 2.2 * highest)
    columns: dict[float | None, int] = {}
    for row, x in beyond:
        line = columns.setdefault(row.asked, 0)
        columns[row.asked] += 1
        axes.annotate(
            f"{row.method} {quantity(row.value, True)} \u2191",
            (x, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, -2 - 9 * line),
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=7,
            color=INK,
        )


def _alt(curves: Sequence[Sequence[Row]]) -> str:
    parts = []
    for own in curves:
        points = ", ".join(
            f"{row.label} {quantity(row.value, row.perplexity)} at {percent(row.achieved)}"
            for row in _placed(own)
        )
        dense = next((row for row in own if row.method == DENSE), None)
        line = f"dense {quantity(dense.value, dense.perplexity)}, " if dense else ""
        parts.append(f"{own[0].task} ({own[0].metric}): {line}{points}")
    return f"Lines: quality against achieved sparsity, by method. {'. '.join(parts)}."
