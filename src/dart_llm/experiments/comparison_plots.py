"""Quality against sparsity; metric by layer.

Plots of a comparison: quality against achieved sparsity, one line per method.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dart_llm.experiments import comparison
from dart_llm.experiments.comparison import DENSE, LayerCurve, Row
from dart_llm.reporting.figures import (
    DASHES,
    INK,
    LOOKS,
    Look,
    Palette,
    Plot,
    heights,
    key,
    log_scale,
    looks_of,
    mark,
    panels,
)
from dart_llm.reporting.words import percent, quantity

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def small_print(row: Row, more: str = "") -> str:
    """The checkpoint in one line: name, file quantisation, dtype, start of the checksum."""
    known = row.checkpoint
    parts = [row.model]
    if known.get("file_quantisation"):
        parts.append(f"file quantisation {known['file_quantisation']}")
    if row.dtype:
        parts.append(row.dtype)
    if known.get("sha256"):
        parts.append(f"sha256 {str(known['sha256'])[:12]}")
    return " · ".join([*parts, *([more] if more else [])])


def leak_words(row: Row) -> str:
    """What a title says of a protocol that has seen the answers."""
    return " (LEAK: the masks have seen the answers)" if row.protocol == "published" else ""


def dense_row(rows: Sequence[Row]) -> Row | None:
    """The untouched model's row, if it was measured."""
    return next((row for row in rows if row.method == DENSE and row.value is not None), None)


def curve(
    axes: Axes, rows: Sequence[Row], x: Sequence[float], dense: Row | None, look: Look
) -> None:
    """Points with their intervals, joined by a line."""
    values = [row.value or 0.0 for row in rows]
    ends: list[list[float]] = [[], []]
    for row, value in zip(rows, values, strict=True):
        low, high = _ends(row, value, dense)
        ends[0].append(max(0.0, value - low))
        ends[1].append(max(0.0, high - value))
    axes.errorbar(x, values, yerr=ends, capsize=1.8, elinewidth=0.9, capthick=0.9, **look)


def _ends(row: Row, value: float, dense: Row | None) -> tuple[float, float]:
    """Of the paired difference to dense, where there is one, else of the metric itself.

    Pairing takes out what all methods share, the difficulty of the items.
    """
    if row.to_dense is not None and dense is not None and dense.value is not None:
        low, high = row.to_dense.low, row.to_dense.high
        if row.perplexity:
            return low * dense.value, high * dense.value
        return dense.value + low, dense.value + high
    return (row.interval.low, row.interval.high) if row.interval else (value, value)


def bars_words(rows: Sequence[Row]) -> str:
    """What the bars of a plot are."""
    if all(row.to_dense is not None for row in rows):
        return "bars: 95 % bootstrap intervals of the difference to dense, paired by item"
    return "bars: 95 % bootstrap intervals over items, paired with dense where it was measured"


def dense_line(axes: Axes, dense: Row | None) -> None:
    """A dashed line across."""
    if dense is not None and dense.value is not None:
        axes.axhline(dense.value, color=INK, linestyle=DASHES, linewidth=1.4, label=DENSE)


def metric_axis(axes: Axes, rows: Sequence[Row]) -> None:
    """The metric's name and direction; a log axis for perplexities."""
    row = next((row for row in rows if row.method != DENSE), rows[0])
    better = "higher" if row.higher_is_better else "lower"
    title = textwrap.shorten(row.task, 44, placeholder=" ...")
    axes.set_title(f"{title}: {better} is better", loc="left", fontsize=9, color=INK)
    axes.set_ylabel(f"{row.metric} (log axis)" if row.perplexity else row.metric)
    axes.grid(axis="y")
    axes.margins(x=0.06)
    if row.perplexity and all((other.value or 0.0) > 0 for other in rows):
        axes.set_yscale("log")
        log_scale(axes, *axes.get_ylim())
    elif axes.get_ylim()[0] < 0 <= min((other.value or 0.0) for other in rows):
        axes.set_ylim(bottom=-0.02 * axes.get_ylim()[1])  # a difference's bar may end below zero


MOST_PANELS = 6
"""Tasks in one plot; what is more goes into further plots."""

SIDEWAYS = 0.006
"""Sparsity by which the marks of two methods at one place are moved apart."""

FAR = 30.0
"""Perplexities over this multiple of dense are named at the edge: the rest stays legible."""


def make_comparison(rows: Sequence[Row]) -> list[Plot]:
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
            plots.append(_comparison_plot(curves[start : start + MOST_PANELS], len(plots) + 1))
    return plots


def _placed(rows: Sequence[Row]) -> list[Row]:
    """The rows that are a point: not the untouched model, whose line runs across."""
    return [row for row in rows if row.method != DENSE and row.achieved is not None]


def _comparison_plot(curves: Sequence[Sequence[Row]], number: int) -> Plot:
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
            _draw_comparison(axes, own, looks)
        key(above, drawn, columns)

    name = "quality" if number == 1 else f"quality_{number}"
    return Plot(name, title, _alt(curves), small, *heights(len(curves), draw, len(methods)))


def _draw_comparison(axes: Axes, rows: Sequence[Row], looks: dict[str, Look]) -> None:
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


# Plot of a sweep over layers: the metric by the layer that was pruned, with the dense line.


MOST_TICKS = 12
"""Names of layer groups under an axis, at most."""


def make_layers(rows: Sequence[Row]) -> list[Plot]:
    """One plot per model, dtype and protocol, one panel per task; none without a layer sweep."""
    found: dict[Any, dict[str, list[LayerCurve]]] = {}
    for one in comparison.curves(rows):
        first = one.rows[0]
        if len(one.rows) > 1:
            group = found.setdefault((first.model, first.dtype, first.protocol), {})
            group.setdefault(first.task, []).append(one)
    plots: list[Plot] = []
    for tasks in found.values():
        own = list(tasks.values())
        for start in range(0, len(own), MOST_PANELS):
            plots.append(_layers_plot(own[start : start + MOST_PANELS], len(plots) + 1))
    return plots


def _layers_plot(tasks: Sequence[Sequence[LayerCurve]], number: int) -> Plot:
    first = tasks[0][0].rows[0]
    names = list(dict.fromkeys(one.name for own in tasks for one in own))
    protocol = f"protocol {first.protocol or 'not known'}{leak_words(first)}"
    title = f"One layer pruned at a time: {first.model}, {protocol}"
    rows = [row for own in tasks for one in own for row in one.rows]

    def draw(figure: Figure, palette: Palette, narrow: bool) -> None:
        looks = {
            name: {**mark(LOOKS[place % len(LOOKS)], palette), "markersize": 4.5}
            for place, name in enumerate(names)
        }
        columns = 2 if narrow else 4
        lines = math.ceil((len(names) + 1) / columns)
        above, *drawn = panels(figure, len(tasks), narrow, lines)
        for axes, own in zip(drawn, tasks, strict=True):
            _draw_layers(axes, own, looks)
        key(above, drawn, columns)

    told = " ".join(comparison.sentences(rows))
    alt = f"Lines: the metric by the layer that was pruned. {told}"
    small = small_print(first, bars_words(rows))
    name = "layers" if number == 1 else f"layers_{number}"
    return Plot(name, title, alt, small, *heights(len(tasks), draw, len(names)))


def _draw_layers(axes: Axes, own: Sequence[LayerCurve], looks: dict[str, dict[str, Any]]) -> None:
    rows = [row for one in own for row in one.rows]
    groups = sorted({str(row.layers) for row in rows}, key=comparison.first_layer)
    numbered = all(group.isdigit() for group in groups)
    places = {group: int(group) if numbered else place for place, group in enumerate(groups)}
    for one in own:
        x = [float(places[str(row.layers)]) for row in one.rows]
        curve(axes, one.rows, x, one.dense, {**looks[one.name], "label": one.name})
    dense_line(axes, own[0].dense)
    metric_axis(axes, rows)
    axes.margins(x=0.02)
    axes.set_xlabel("layer that is pruned" if numbered else "layers that are pruned together")
    if numbered:
        axes.locator_params(axis="x", integer=True)
    else:
        step = -(-len(groups) // MOST_TICKS)
        axes.set_xticks(range(0, len(groups), step), groups[::step])
