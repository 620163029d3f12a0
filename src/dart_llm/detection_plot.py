"""Plots of detection.json: detection rate and delay against false alarms, a curve per signal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

from dart_llm.detection_table import conclusion, title
from dart_llm.plot_base import DASHES, INK, Palette, Plot
from dart_llm.plot_lines import KEY_LINE, LOOKS, key, mark
from dart_llm.results_view import mapping

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLIND = "blind rule"
QUANTITIES = (
    ("rate", "changes detected (%)", 100.0),
    ("delay_with_misses", "mean delay (tokens),\na miss = horizon", 1.0),
)

Curve = Mapping[str, Any]


def make(document: Mapping[str, Any]) -> list[Plot]:
    """One plot per window length, the first named ``detection``; a column of panels per n0."""
    windows = list(dict.fromkeys(curve["window"] for curve in document["curves"]))
    return [_plot(document, window, first=number == 0) for number, window in enumerate(windows)]


def _plot(document: Mapping[str, Any], window: int, first: bool) -> Plot:
    curves = [curve for curve in document["curves"] if curve["window"] == window]
    counts = list(dict.fromkeys(curve["n0"] for curve in curves))
    names = list(dict.fromkeys(curve["signal"] for curve in curves))
    horizon = int(document["settings"]["horizon"])

    def draw(figure: Figure, palette: Palette, narrow: bool) -> None:
        looks = {name: mark(look, palette) for name, look in zip(names, cycle(LOOKS), strict=False)}
        drawn, above = _panels(figure, counts, narrow, len(names) + 1)
        for (count, name), axes in drawn.items():
            own = [curve for curve in curves if curve["n0"] == count]
            _draw(axes, own, looks, name, horizon)
            axes.set_title(f"n0 = {count}", loc="left", fontsize=9, color=INK)
            axes.label_outer()
        key(above, list(drawn.values()), 2 if narrow else 3)

    steps = [point["k"] for curve in curves[:1] for point in curve["points"]]
    small = (
        f"theta = mu - k sigma, k from {min(steps):g} to {max(steps):g}; n0 low windows of "
        f"{window} tokens to a trigger · blind rule: fires at equal distances, with as many false "
        f"alarms · {title(document)} · {_checkpoint(document)}"
    )
    words = conclusion(document)
    alt = (
        "Panels: detection rate and mean delay over false alarms per 1,000 tokens, one line per "
        f"signal. {words}"
    )
    heading = f"How early a change of topic is noticed, for how many false alarms (W = {window})"
    return Plot(
        "detection" if first else f"detection-w{window}",
        heading,
        alt,
        small,
        5.4,
        draw,
        0.9 + 4.3 * len(counts),
    )


def _checkpoint(document: Mapping[str, Any]) -> str:
    known = mapping(document["checkpoint"])
    parts = [f"file quantisation {known.get('file_quantisation') or 'none'}", known.get("dtype")]
    if known.get("sha256"):
        parts.append(f"sha256 {str(known['sha256'])[:12]}")
    return " · ".join(str(part) for part in parts if part)


def _panels(
    figure: Figure, counts: Sequence[int], narrow: bool, lines: int
) -> tuple[dict[tuple[int, str], Axes], Axes]:
    """Panels by n0 and quantity, and the legend's place above them."""
    names = [name for name, _, _ in QUANTITIES]
    columns = 1 if narrow else len(counts)
    order = [(count, name) for count in counts for name in names]
    if not narrow:
        order = [(count, name) for name in names for count in counts]
    rows = len(order) // columns
    height = KEY_LINE * (lines // (2 if narrow else 3) + 1)
    grid = figure.add_gridspec(rows + 1, columns, height_ratios=[height, *[2.2] * rows])
    above = figure.add_subplot(grid[0, :])
    above.axis("off")
    found: dict[tuple[int, str], Axes] = {}
    for place, panel in enumerate(order):
        row, column = divmod(place, columns)
        same = next((axes for (_, name), axes in found.items() if name == panel[1]), None)
        found[panel] = figure.add_subplot(grid[row + 1, column], sharey=same, sharex=same)
    return found, above


def _draw(
    axes: Axes, curves: Sequence[Curve], looks: Mapping[str, Any], name: str, horizon: int
) -> None:
    label, factor = next((words, factor) for key_, words, factor in QUANTITIES if key_ == name)
    for curve in curves:
        x = [point["false_alarms_per_1000"] for point in curve["points"]]
        y = [factor * point[name] for point in curve["points"]]
        axes.plot(x, y, label=curve["signal"], **looks[curve["signal"]])
    most = max((p["false_alarms_per_1000"] for c in curves for p in c["points"]), default=0.0)
    x = [max(1.0, most) * step / 50 for step in range(51)]
    axes.plot(
        x,
        [factor * blind(name, rate / 1000, horizon) for rate in x],
        color=INK,
        linestyle=DASHES,
        linewidth=1.3,
        zorder=1,
        label=BLIND,
    )
    axes.set_xlabel("false alarms per 1,000 tokens")
    axes.set_ylabel(label)
    axes.grid()
    axes.set_ylim(bottom=0)


def blind(name: str, per_token: float, horizon: int) -> float:
    """A rule that fires every 1 / ``per_token`` tokens, the change anywhere between two alarms.

    ``rate``: min(1, H f).  The wait w is uniform on (0, 1 / f], a miss counts as H: the mean of
    min(w, H) is H - f H^2 / 2 for H f <= 1, and 1 / (2 f) beyond.
    """
    expected = horizon * per_token
    if name == "rate":
        return min(1.0, expected)
    return horizon * (1 - expected / 2) if expected <= 1 else 1 / (2 * per_token)
