"""Plots of a comparison: quality against achieved sparsity, and the metric by layer."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from dart_llm.experiments import comparison
from dart_llm.experiments.comparison import DENSE, TOLERANCE, LayerCurve, Row
from dart_llm.experiments.store import checkpoint_line
from dart_llm.reporting.figures import (
    DASHES,
    INK,
    LOOKS,
    Look,
    Palette,
    Plot,
    key,
    log_scale,
    looks_of,
    mark,
    panels,
    panels_height,
    whisker_lengths,
)
from dart_llm.reporting.table import grouped
from dart_llm.reporting.words import percent, quantity, too_few

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

T = TypeVar("T")

MOST_PANELS = 6
"""Tasks in one plot; what is more goes into further plots."""

SIDEWAYS = 0.006
"""Sparsity by which the marks of two methods at one place are moved apart."""

MOVED = "; marks at one place are moved sideways by up to 2 points"

FAR = 30.0
"""Perplexities over this multiple of dense are named at the edge: the rest stays legible."""

MOST_TICKS = 12
"""Names of layer groups under an axis, at most."""


def make(rows: Sequence[Row]) -> list[Plot]:
    """Every plot that the rows allow: curves over the sparsity, then over the layers.

    One plot per model, dtype and protocol and up to six tasks.
    """
    whole = [row for row in rows if row.layers is None and row.value is not None]
    groups = grouped(whole, lambda row: row.group).values()
    tasks = [task for task in groups if len(_placed(task)) > 1]
    curves = [curve for curve in comparison.curves(rows) if len(curve.rows) > 1]
    layers = list(grouped(curves, lambda curve: curve.rows[0].group).values())
    return [
        *(_comparison_plot(*page) for page in _pages("quality", tasks, lambda task: task[0])),
        *(_layers_plot(*page) for page in _pages("layers", layers, lambda task: task[0].rows[0])),
    ]


def _pages(name: str, tasks: Sequence[T], first: Callable[[T], Row]) -> list[tuple[str, list[T]]]:
    """Names of plots, and the tasks of each; ``first``: a task's first row."""

    def settings(task: T) -> tuple[Any, ...]:
        row = first(task)
        return row.model, row.dtype, row.protocol

    pages = [
        group[start : start + MOST_PANELS]
        for group in grouped(tasks, settings).values()
        for start in range(0, len(group), MOST_PANELS)
    ]
    return [(f"{name}_{n}" if n > 1 else name, page) for n, page in enumerate(pages, 1)]


def _plot(
    name: str,
    title: str,
    alt: str,
    rows: Sequence[Row],
    tasks: Sequence[T],
    looks: Callable[[Palette], dict[str, Look]],
    names: Sequence[str],
    columns: int,
    draw_task: Callable[[Axes, T, dict[str, Look]], None],
    footnote: str = "",
) -> Plot:
    """One panel per task under a common legend of ``names`` in ``columns`` columns.

    ``rows``: those that are drawn as points.
    """
    first = rows[0]
    leak = " (LEAK: the masks have seen the answers)" if first.protocol == "published" else ""
    title = f"{title}: {first.model}, protocol {first.protocol or 'not known'}{leak}"
    facts = {**first.checkpoint, "dtype": first.dtype}

    def draw(figure: Figure, palette: Palette) -> None:
        above, *drawn = panels(figure, len(tasks), math.ceil((len(names) + 1) / columns))
        for axes, task in zip(drawn, tasks, strict=True):
            draw_task(axes, task, looks(palette))
        key(above, drawn, columns)

    small = f"{checkpoint_line(first.model, facts)} · {_whiskers(rows)}{footnote}"
    return Plot(name, title, alt, small, panels_height(len(tasks), len(names)), draw)


def _whiskers(rows: Sequence[Row]) -> str:
    """What the whiskers are intervals of, or why there are none."""
    drawn = [row for row in rows if _ends(row, row) is not None]
    if not drawn:
        return f"no whiskers: {too_few(min(row.items for row in rows)) or 'no items'}"
    if all(row.to_dense is not None for row in drawn):
        return "whiskers: 95 % bootstrap intervals of the difference to dense, paired by item"
    if not any(row.to_dense is not None for row in drawn):
        return "whiskers: 95 % bootstrap intervals of the score itself, over items"
    return (
        "whiskers: 95 % bootstrap intervals of the difference to dense, paired by item, or of the "
        "score itself where dense was not measured"
    )


def _draw_curve(
    axes: Axes, rows: Sequence[Row], x: Sequence[float], dense: Row | None, look: Look
) -> None:
    """Points with their intervals, joined by a line."""
    values = [row.value or 0.0 for row in rows]
    ends = whisker_lengths(values, [_ends(row, dense) for row in rows])
    axes.errorbar(x, values, yerr=ends, capsize=1.8, elinewidth=0.9, capthick=0.9, **look)


def _ends(row: Row, dense: Row | None) -> tuple[float, float] | None:
    """Of the paired difference to dense, where there is one, else of the metric itself.

    Pairing takes out what all methods share, the difficulty of the items.  None with too few.
    """
    if row.to_dense is None or dense is None or dense.value is None:
        return None if row.interval is None else row.interval.ends
    if row.to_dense.ends is None:
        return None
    low, high = row.to_dense.ends
    if row.perplexity:
        return low * dense.value, high * dense.value
    return dense.value + low, dense.value + high


def _dense_line(axes: Axes, dense: Row | None) -> None:
    """A dashed line across."""
    if dense is not None and dense.value is not None:
        axes.axhline(dense.value, color=INK, linestyle=DASHES, linewidth=1.4, label=DENSE)


def _metric_axis(axes: Axes, rows: Sequence[Row]) -> None:
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


# Quality against achieved sparsity, one line per method.


def _placed(rows: Sequence[Row]) -> list[Row]:
    """The rows that are a point: not the untouched model, whose line runs across."""
    return [row for row in rows if row.method != DENSE and row.achieved is not None]


def _equal(rows: Sequence[Row]) -> bool:
    """Whether all removed the same share, to a point: then an axis of shares says nothing."""
    shares = [row.achieved or 0.0 for row in rows]
    return max(shares) - min(shares) <= TOLERANCE


def _comparison_plot(name: str, tasks: Sequence[Sequence[Row]]) -> Plot:
    placed = [row for task in tasks for row in _placed(task)]
    curved = [task for task in tasks if not _equal(_placed(task))]
    what = "against achieved sparsity" if curved else "at equal achieved sparsity"
    methods = list(dict.fromkeys(row.method for row in placed))
    points_of_tasks = []
    for task in tasks:
        points = [f"{row.label} {row.quantity} at {percent(row.achieved)}" for row in _placed(task)]
        dense = _dense(task)
        line = [f"dense {dense.quantity}"] if dense else []
        points_of_tasks.append(f"{task[0].task} ({task[0].metric}): {', '.join([*line, *points])}")
    return _plot(
        name,
        f"Quality {what}",
        f"Points: quality {what}, by method. {'. '.join(points_of_tasks)}.",
        placed,
        tasks,
        lambda palette: looks_of(methods, palette),
        methods,
        6,
        _draw_comparison,
        MOVED if len(methods) > 1 and curved else "",
    )


def _draw_comparison(axes: Axes, rows: Sequence[Row], looks: dict[str, Look]) -> None:
    placed = _placed(rows)
    dense = _dense(rows)
    if _equal(placed):
        _draw_categories(axes, placed, dense, looks)
        _metric_axis(axes, rows)
        return
    methods = list(dict.fromkeys(row.method for row in placed))
    spots: list[tuple[Row, float]] = []
    for place, method in enumerate(methods):
        method_rows = sorted(
            (r for r in placed if r.method == method), key=lambda r: r.achieved or 0.0
        )
        shift = SIDEWAYS * (place - (len(methods) - 1) / 2)
        for line in grouped(method_rows, lambda row: row.seed).values():
            x = [100 * ((row.achieved or 0.0) + shift) for row in line]
            label = method if line[0] is method_rows[0] else "_"
            _draw_curve(axes, line, x, dense, {**looks[method], "label": label})
            spots += zip(line, x, strict=True)
    _dense_line(axes, dense)
    _metric_axis(axes, rows)
    _name_far_points(axes, spots, dense)
    axes.set_xlabel("achieved sparsity (%)")


def _draw_categories(
    axes: Axes, placed: Sequence[Row], dense: Row | None, looks: dict[str, Look]
) -> None:
    """A place for each row, named below; several seeds share one."""
    labels = list(dict.fromkeys(row.label for row in placed))
    methods = set[str]()
    for row in placed:
        label = "_" if row.method in methods else row.method
        look = {**looks[row.method], "linestyle": "none", "label": label}
        _draw_curve(axes, [row], [labels.index(row.label)], dense, look)
        methods.add(row.method)
    _dense_line(axes, dense)
    if len(methods) == len(labels):
        labels = [label.partition("@")[0] for label in labels]
    names = [textwrap.fill(label.replace("@", " @"), 12) for label in labels]
    axes.set_xticks(range(len(labels)), names, fontsize=8.5 if len(labels) < 5 else 7)
    axes.set_xlim(-0.6, len(labels) - 0.4)
    shares = [row.achieved or 0.0 for row in placed]
    ends = list(dict.fromkeys(percent(share) for share in (min(shares), max(shares))))
    axes.set_xlabel(f"each with {' to '.join(ends)} achieved sparsity")


def _dense(rows: Sequence[Row]) -> Row | None:
    """The untouched model's row, if it was measured."""
    return next((row for row in rows if row.method == DENSE and row.value is not None), None)


def _name_far_points(axes: Axes, spots: Sequence[tuple[Row, float]], dense: Row | None) -> None:
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
        line = columns.setdefault(row.requested, 0)
        columns[row.requested] += 1
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


# The metric by the layer that was pruned, with the dense line.


def _layers_plot(name: str, tasks: Sequence[Sequence[LayerCurve]]) -> Plot:
    curves = [curve for task in tasks for curve in task]
    names = list(dict.fromkeys(curve.name for curve in curves))

    def looks(palette: Palette) -> dict[str, Look]:
        return {
            name: {**mark(LOOKS[place % len(LOOKS)], palette), "markersize": 4.5}
            for place, name in enumerate(names)
        }

    values = "; ".join(
        f"{curve.name}: " + ", ".join(f"{row.layers} {row.quantity}" for row in curve.rows)
        for curve in curves
    )
    return _plot(
        name,
        "One layer pruned at a time",
        f"Lines: the metric by the layer that was pruned. {values}.",
        [row for curve in curves for row in curve.rows],
        tasks,
        looks,
        names,
        4,
        _draw_layers,
    )


def _draw_layers(
    axes: Axes, curves: Sequence[LayerCurve], looks: dict[str, dict[str, Any]]
) -> None:
    rows = [row for curve in curves for row in curve.rows]
    groups = sorted({str(row.layers) for row in rows}, key=comparison.first_layer)
    numbered = all(group.isdigit() for group in groups)
    places = {group: int(group) if numbered else place for place, group in enumerate(groups)}
    for curve in curves:
        x = [float(places[str(row.layers)]) for row in curve.rows]
        _draw_curve(axes, curve.rows, x, curve.dense, {**looks[curve.name], "label": curve.name})
    _dense_line(axes, curves[0].dense)
    _metric_axis(axes, rows)
    axes.margins(x=0.02)
    axes.set_xlabel("layer that is pruned" if numbered else "layers that are pruned together")
    if numbered:
        axes.locator_params(axis="x", integer=True)
    else:
        step = -(-len(groups) // MOST_TICKS)
        axes.set_xticks(range(0, len(groups), step), groups[::step])
