"""What the plots of comparisons share: panels, legend, methods' looks, curves with intervals."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from dart_llm.compare_format import quantity
from dart_llm.compare_row import DENSE, Row
from dart_llm.plot_bars import _log_ticks as log_ticks
from dart_llm.plot_base import DASHES, INK, Palette

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

METHODS = ("dart", "griffin", "flap", "static", "published", "wanda", "glass", "random")
"""These look the same in every plot; further methods take the looks that are left."""

LOOKS: tuple[tuple[int, str, Any], ...] = (
    (0, "o", "-"),
    (4, "s", "-"),
    (3, "^", (0, (5, 2))),
    (8, "D", (0, (1, 1.5))),
    (7, "v", (0, (6, 2, 1, 2))),
    (2, "P", "-"),
    (6, "X", (0, (5, 2))),
    (5, "<", (0, (1, 1.5))),
    (16, ">", (0, (6, 2, 1, 2))),
    (12, "h", "-"),
    (1, "*", (0, (5, 2))),
    (14, "p", (0, (1, 1.5))),
)
"""Colour, marker and line of a method; marker and line tell methods apart without colours."""

KEY_LINE = 0.22
"""Inches of one line of the legend."""


Look = dict[str, Any]


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


def heights(
    count: int, draw: Callable[[Figure, Palette, bool], None], lines: int
) -> tuple[float, Callable[[Figure, Palette, bool], None], float]:
    """Height, drawing and narrow height of a plot with ``count`` panels, as ``Plot`` takes them."""
    wide = 0.7 + (2.5 if count > 1 else 3.1) * math.ceil(count / 2) + KEY_LINE * (1 + lines // 6)
    return wide, draw, 0.7 + 2.35 * count + KEY_LINE * (1 + lines // 3)


def panels(figure: Figure, count: int, narrow: bool, lines: int) -> list[Axes]:
    """A place for the legend of ``lines`` lines, and below it one panel per task.

    Two columns, or one where the figure is narrow.  The first axes are the legend's.
    """
    columns = 1 if narrow or count == 1 else 2
    rows = math.ceil(count / columns)
    ratios = [KEY_LINE * lines, *[2.4] * rows]
    grid = figure.add_gridspec(rows + 1, columns, height_ratios=ratios)
    places = [divmod(number, columns) for number in range(count)]
    above = figure.add_subplot(grid[0, :])
    above.axis("off")
    return [above, *(figure.add_subplot(grid[row + 1, column]) for row, column in places)]


def looks_of(names: Sequence[str], palette: Palette) -> dict[str, Look]:
    """Colour, marker and line by name; ``dart`` is the boldest."""
    left = iter(
        [look for look, name in zip(LOOKS, METHODS, strict=False) if name not in names][::-1]
    )
    further = [*LOOKS[len(METHODS) :], *left, *LOOKS]
    strangers = [name for name in names if name not in METHODS]
    found = {}
    for name in names:
        if name in METHODS:
            look = LOOKS[METHODS.index(name)]
        else:
            look = further[strangers.index(name) % len(further)]
        found[name] = {**mark(look, palette), **({"linewidth": 2.2} if name == "dart" else {})}
    return found


def mark(look: tuple[int, str, Any], palette: Palette) -> Look:
    """matplotlib's words for a colour, a marker and a line."""
    return {
        "color": palette[look[0]],
        "marker": look[1],
        "linestyle": look[2],
        "linewidth": 1.5,
        "markersize": 5.5,
        "markeredgecolor": INK,
        "markeredgewidth": 0.6,
    }


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


def log_scale(axes: Axes, low: float, high: float) -> None:
    """Limits and round ticks of a log axis."""
    ticks = log_ticks(low, high, 6)
    if len(ticks) < 4 and high < 2 * low:
        ticks = _even_ticks(low, high)
    axes.set_yticks(ticks, [quantity(tick, True).removesuffix(".0") for tick in ticks])
    axes.set_yticks([], minor=True)
    axes.set_ylim(low, high)


def _even_ticks(low: float, high: float) -> list[float]:
    """Round numbers at even distances, for a log axis that is nearly straight."""
    unit = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(n * unit for n in (1, 2, 5, 10) if n * unit >= (high - low) / 6)
    return [step * n for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def key(above: Axes, drawn: Sequence[Axes], columns: int) -> None:
    """One legend for all panels, above them."""
    found: dict[str, Any] = {}
    for axes in drawn:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    above.legend(
        list(found.values()),
        list(found),
        loc="center left",
        bbox_to_anchor=(0.0, 0.5),
        ncols=columns,
        handlelength=3.2,
        columnspacing=1.4,
        borderaxespad=0.0,
        borderpad=0.0,
    )
