"""Line plots: curves in panels, and the similarities that the drift detector measured.

For each window of decode steps, the detector compares the mean attention output (or hidden state)
with a reference.  A similarity below the threshold can trigger a re-mask: new observations, then
new masks.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dart_llm.pruning.records import DriftCheck
from dart_llm.reporting.figures import (
    DASHES,
    INK,
    MAX_PANELS,
    SOFT,
    Palette,
    Plot,
    legend,
    log_axis,
    looks_of,
)
from dart_llm.reporting.table import grouped
from dart_llm.reporting.words import count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Curves in panels.


@dataclass(frozen=True)
class Curve:
    """A curve.  ``band``: lower and upper bounds; the area between them is shaded.

    ``is_reference``: if True, the curve is dashed and has no marks.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    band: tuple[Sequence[float], Sequence[float]] | None = None
    is_reference: bool = False


@dataclass(frozen=True)
class Panel:
    """Curves that share a pair of axes.  If ``is_log``, the y axis is logarithmic.

    ``limits``: the ends of the y axis; None means that they follow from the curves.
    """

    xlabel: str
    ylabel: str
    curves: Sequence[Curve]
    is_log: bool = False
    limits: tuple[float, float] | None = None


def line_plot(name: str, title: str, small_print: str, panels: Sequence[Panel]) -> Plot:
    """A plot of panels in up to two columns; curves also differ in their marks and line styles."""
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)

    def draw(figure: Figure, palette: Palette) -> None:
        grid = figure.subplots(rows, columns, squeeze=False).flat
        for axes, panel in zip(grid, panels, strict=False):
            _draw_panel(axes, palette, panel)
        for unused in grid[len(panels) :]:
            unused.remove()

    alt = f"Lines: {'; '.join(f'{panel.ylabel} over {panel.xlabel}' for panel in panels)}."
    return Plot(name, title, alt, small_print, 1.1 + 2.3 * rows, draw)


def _draw_panel(axes: Axes, palette: Palette, panel: Panel) -> None:
    styles = looks_of([curve.label for curve in panel.curves], palette)
    for curve in panel.curves:
        style = {**styles[curve.label], "markersize": 4.5, "markevery": len(curve.x) // 12 + 1}
        if curve.is_reference:
            style = {"color": INK, "linestyle": DASHES, "linewidth": 1.3, "zorder": 1}
        axes.plot(curve.x, curve.y, label=curve.label, **style)
        if curve.band is not None:
            axes.fill_between(curve.x, *curve.band, color=style["color"], alpha=0.18, linewidth=0)
    axes.grid(axis="y")
    axes.margins(x=0.02)
    axes.set(xlabel=panel.xlabel, ylabel=panel.ylabel)
    if panel.limits is not None:
        axes.set_ylim(*panel.limits)
    if panel.is_log:
        log_axis(axes)
    legend(axes, 3)


# The windows of the drift detector, their threshold, and the masks.

Masks = Sequence[Mapping[str, Any]]

FEWEST_WINDOWS = 8
"""A sequence with fewer windows than this is not drawn."""

MAX_NAMED = 14
"""If a panel has more masks than this, the masks are drawn as thin lines without names."""

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "armed": ("window", {"marker": "o"}),
    "low": ("low window", {"marker": "v", "markersize": 8}),
    "trigger": ("trigger", {"marker": "*", "markersize": 14}),
    "suppressed": ("suppressed by the guards", {"marker": "D", "markeredgewidth": 1.8}),
    "arming": ("arming: no threshold yet", {"marker": "o"}),
}
"""Label and look of each kind of window."""


def is_low(check: DriftCheck) -> bool:
    """Whether a window's similarity is below its threshold."""
    return check.threshold is not None and check.similarity < check.threshold


def drift_sentence(checks: Sequence[DriftCheck], remasks: Masks) -> str:
    """A sentence: how many windows fell below the threshold, and how many re-masks followed."""
    armed = [check for check in checks if check.threshold is not None]
    if not armed:
        return f"The drift detector did not arm within {count(len(checks), 'window')}."
    shared = any(remask.get("row") is None for remask in remasks)  # a trigger counts for all rows

    def number(chosen: Sequence[DriftCheck]) -> int:
        return len({(c.sequence, -1 if shared else c.row, c.step) for c in chosen})

    rebuilt = sum(remask.get("cause") == "drift" for remask in remasks)
    suppressed = number([check for check in checks if check.state == "suppressed"])
    triggers = number([check for check in checks if check.trigger])
    lows = sum(is_low(check) for check in armed)
    words = [f"{lows} of {count(len(armed), 'window')} fell below the threshold"]
    if triggers or rebuilt:
        late = " before the end" if rebuilt < triggers else ""
        words.append(f"{count(triggers, 'trigger')} led to {count(rebuilt, 're-mask')}{late}")
    else:
        words.append("no mask was rebuilt")
    if suppressed:
        words.append(f"the guards suppressed {count(suppressed, 'trigger')}")
    return "; ".join(words) + "."


def plot_similarity(checks: Sequence[DriftCheck], remasks: Masks, small_print: str) -> Plot | None:
    """A plot of the similarities, with one panel per sequence and batch row.

    It shows the ``MAX_PANELS`` panels with the most triggers.  Returns None if no sequence has
    enough windows, at least one of which has a threshold.
    """
    sequences = grouped(checks, lambda check: (check.sequence, check.row))
    groups = {key: windows for key, windows in sequences.items() if worth_drawing(windows)}
    if not groups:
        return None
    ranked = sorted(groups, key=lambda key: (-sum(c.trigger for c in groups[key]), key))
    shown = sorted(ranked[:MAX_PANELS])
    words = drift_sentence(checks, remasks)
    part = f"{len(shown)} of {len(groups)} sequences shown · " if len(groups) > len(shown) else ""

    def draw(figure: Figure, palette: Palette) -> None:
        panels = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (sequence, row) in zip(panels, shown, strict=True):
            masks = [m for m in remasks if m["sequence"] == sequence and m["row"] in (None, row)]
            draw_checks(axes, palette, groups[sequence, row], masks)
            if len(groups) > 1:
                axes.set_title(f"sequence {sequence}, row {row}", loc="right", fontsize=8)
        panels[-1].set_xlabel("decode step (tokens)")
        legend(panels[0], 4)

    alt = f"Marks: similarity of the attention output to its reference, over decode steps. {words}"
    return Plot("similarity", words, alt, part + small_print, 2.2 + 1.5 * len(shown), draw)


def worth_drawing(checks: Sequence[DriftCheck]) -> bool:
    """Whether there are enough windows, at least one of which has a threshold."""
    armed = any(check.threshold is not None for check in checks)
    return armed and len(checks) >= FEWEST_WINDOWS


def draw_checks(axes: Axes, palette: Palette, checks: Sequence[DriftCheck], masks: Masks) -> None:
    """Draw the windows' similarities and thresholds, and a line where each mask was built."""
    starts = [int(mask["step"]) for mask in masks]
    by_mask = grouped(checks, lambda check: bisect_left(starts, check.step)).values()
    for number, windows in enumerate(by_mask):
        steps = [check.step for check in windows]
        axes.plot(steps, [c.similarity for c in windows], color=SOFT, linewidth=0.9, zorder=2)
        limits = [math.nan if c.threshold is None else c.threshold for c in windows]
        label = "_" if number else "threshold"
        axes.plot(steps, limits, "--", label=label, color=palette[2], linewidth=1.6, zorder=2)
    colours = {"armed": palette[0], "suppressed": "white", "arming": "white"}
    base: dict[str, Any] = {"markersize": 6.5, "markeredgewidth": 0.9, "markeredgecolor": INK}
    base |= {"linestyle": "none", "zorder": 4}
    for kind, windows in grouped(checks, _kind).items():
        label, look = KINDS[kind]
        x, y = [check.step for check in windows], [check.similarity for check in windows]
        axes.plot(x, y, label=label, color=colours.get(kind, palette[4]), **(base | look))
    _draw_masks(axes, checks, masks)
    axes.set_ylabel("cosine similarity")
    axes.grid(axis="y")


def _kind(check: DriftCheck) -> str:
    if check.trigger:
        return "trigger"
    if check.state in ("suppressed", "arming"):
        return check.state
    return "low" if is_low(check) else "armed"


def _draw_masks(axes: Axes, checks: Sequence[DriftCheck], masks: Masks) -> None:
    """Draw a line where each mask was built, with its cause; hatch the steps that ran dense."""
    end = max(check.step for check in checks)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.16 * (high - low))
    axes.set_xlim(-0.02 * end - 1, 1.03 * end + 1)
    starts, last = [int(mask["step"]) for mask in masks], axes.get_xlim()[1]
    dense = [(0.0, float(starts[0]))] if starts and starts[0] > 0 else []
    triggers = [check.step for check in checks if check.trigger]
    dense += [(at, next((step for step in starts if step >= at), last)) for at in triggers]
    hatches: dict[str, Any] = {"facecolor": "none", "edgecolor": "#b9bec5", "hatch": "////"}
    for number, (begin, stop) in enumerate(dense):
        label = "_" if number else "dense, observing"
        axes.axvspan(begin, stop, linewidth=0, zorder=1, label=label, **hatches)
    few = len(masks) <= MAX_NAMED
    look: dict[str, Any] = {"xycoords": axes.get_xaxis_transform(), "xytext": (3, -1)}
    look |= {"textcoords": "offset points", "rotation": 90, "va": "top", "ha": "left"}
    for mask, step in zip(masks, starts, strict=True):
        axes.axvline(step, color=INK, linewidth=1.1 if few else 0.4, zorder=3 if few else 1)
        if few:
            axes.annotate(str(mask.get("cause", "")), (step, 1), fontsize=8, **look)
    if not few:
        axes.plot([], [], color=INK, linewidth=0.6, label=f"{len(masks)} masks")
