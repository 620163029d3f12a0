"""Plot of a sweep over layers: the metric by the layer that was pruned, with the dense line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dart_llm import compare_layers
from dart_llm.compare_layers import LayerCurve
from dart_llm.compare_row import Row
from dart_llm.plot_base import Palette, Plot
from dart_llm.plot_compare import MOST_PANELS
from dart_llm.plot_lines import (
    LOOKS,
    bars_words,
    curve,
    dense_line,
    heights,
    key,
    leak_words,
    mark,
    metric_axis,
    panels,
    small_print,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_TICKS = 12
"""Names of layer groups under an axis, at most."""


def make(rows: Sequence[Row]) -> list[Plot]:
    """One plot per model, dtype and protocol, one panel per task; none without a layer sweep."""
    found: dict[Any, dict[str, list[LayerCurve]]] = {}
    for one in compare_layers.curves(rows):
        first = one.rows[0]
        if len(one.rows) > 1:
            group = found.setdefault((first.model, first.dtype, first.protocol), {})
            group.setdefault(first.task, []).append(one)
    plots: list[Plot] = []
    for tasks in found.values():
        own = list(tasks.values())
        for start in range(0, len(own), MOST_PANELS):
            plots.append(_plot(own[start : start + MOST_PANELS], len(plots) + 1))
    return plots


def _plot(tasks: Sequence[Sequence[LayerCurve]], number: int) -> Plot:
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
            _draw(axes, own, looks)
        key(above, drawn, columns)

    told = " ".join(compare_layers.sentences(rows))
    alt = f"Lines: the metric by the layer that was pruned. {told}"
    small = small_print(first, bars_words(rows))
    name = "layers" if number == 1 else f"layers_{number}"
    return Plot(name, title, alt, small, *heights(len(tasks), draw, len(names)))


def _draw(axes: Axes, own: Sequence[LayerCurve], looks: dict[str, dict[str, Any]]) -> None:
    rows = [row for one in own for row in one.rows]
    groups = sorted({str(row.layers) for row in rows}, key=compare_layers.first_layer)
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
