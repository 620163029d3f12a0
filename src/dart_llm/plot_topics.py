"""What the pictures of a drift study share: both ways to draw one, topics on the time axis, looks.

A picture is drawn twice from the same numbers: on a matplotlib figure for paper, and as a plotly
figure to point at.  Neither library is imported here: ``plots.py`` and ``plotly_page.py`` hand
over figures and makers of figures.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dart_llm.drift_masks import Period
from dart_llm.drift_view_cells import DriftCell
from dart_llm.plot_base import INK, SOFT, Palette, Plot
from dart_llm.plot_lines import Look, looks_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TIME = "decoded tokens"

SHADE = "cmc.lapaz_r"
LAPAZ = (
    "#fef2f3 #eaceb9 #b3ac96 #859e9c #5b8ba3 #3c70a0 #2c5292 #23317d #1a0c64"  # even steps
).split()
"""The colour map of overlaps (cmcrameri, Crameri 2018): from light to dark, so grey reads alike."""

SHADES = [[place / (len(LAPAZ) - 1), colour] for place, colour in enumerate(LAPAZ)]

BAND = "#eef0f3"
HAZE = "#b9bec5"
"""Dense stretches of interactive figures."""

CHANGE = (0, (7, 2.5))
"""The line of a change of topic: long dashes, white between them."""

SYMBOLS = {
    "o": "circle",
    "s": "square",
    "^": "triangle-up",
    "v": "triangle-down",
    "D": "diamond",
    "P": "cross",
    "X": "x",
    "<": "triangle-left",
    ">": "triangle-right",
    "h": "hexagon",
    "*": "star",
    "p": "pentagon",
}
"""plotly's names of matplotlib's markers."""

PATTERNS = {"": "", "///": "/", "...": ".", "\\\\\\": "\\", "xx": "x", "++": "+"}
"""plotly's names of matplotlib's hatches."""


@dataclass(frozen=True)
class Kit:
    """plotly's makers, and our colours as #rrggbb in the order of ``Palette``."""

    go: Any
    subplots: Callable[..., Any]
    colours: tuple[str, ...]


@dataclass(frozen=True)
class Drawing:
    """A picture: on paper (``plot``), and to point at (``interactive``, a plotly figure).

    ``choice``: what distinguishes it from others of the same name, which share a list of choices.
    """

    plot: Plot
    interactive: Callable[[Kit], Any]
    choice: str = ""
    tall: int = 420
    """Pixels of the interactive figure's height."""
    columns: int = 1
    """Panels side by side in it, which stand below each other on a phone."""


def looks(labels: Sequence[str], palette: Palette) -> dict[str, Look]:
    """Colour, marker and line per label: those of the method where each method has one label."""
    methods = [label.partition("@")[0] for label in labels]
    names = methods if len(set(methods)) == len(methods) else list(labels)
    found = looks_of(names, palette)
    return {label: found[name] for label, name in zip(labels, names, strict=True)}


def web_looks(labels: Sequence[str], kit: Kit) -> dict[str, dict[str, Any]]:
    """The same in plotly's words: keys ``line`` and ``marker``."""
    found = {}
    for label, look in looks(labels, list(kit.colours)).items():
        style = look["linestyle"]
        dash = "solid" if style == "-" else ",".join(f"{2 * part}px" for part in style[1])
        found[label] = {
            "line": {"color": look["color"], "width": look["linewidth"] + 0.4, "dash": dash},
            "marker": {
                "symbol": SYMBOLS[look["marker"]],
                "color": look["color"],
                "size": 8,
                "line": {"color": INK, "width": 0.8},
            },
        }
    return found


def bands(axes: Axes, cell: DriftCell, inside: bool = False) -> None:
    """Topics as light and white stretches with their names, changes as lines.

    ``inside``: names stand at the bottom of the axes, else above them.
    """
    axes.set_xlim(0, max(1, cell.decoded_tokens))
    known = [topic for topic in cell.topics if topic.start is not None]
    pixels = axes.get_window_extent().width / 9
    for place, topic in enumerate(known):
        start, end = topic.start or 0, topic.end or 0
        if inside and place % 2 == 0:
            axes.axvspan(start, end, facecolor=BAND, linewidth=0, zorder=0)
        if place:
            for colour, style, width in (("white", "-", 2.6), (INK, CHANGE, 1.5)):
                axes.axvline(start, color=colour, linestyle=style, linewidth=width, zorder=3)
        room = max(6, round(pixels * (end - start) / max(1, cell.decoded_tokens)))
        axes.annotate(
            textwrap.shorten(topic.name, room, placeholder="…"),
            ((start + end) / 2, 0.0 if inside else 1.0),
            xycoords=axes.get_xaxis_transform(),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=8.5,
            color=INK,
            zorder=5,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.8},
        )


def dense_spans(axes: Axes, periods: Sequence[Period]) -> None:
    """Hatches where all neurons live."""
    label = "dense: all neurons live"
    for period in periods:
        if period.mask is None:
            axes.axvspan(
                period.start,
                period.end,
                facecolor="white",
                edgecolor=SOFT,
                hatch="////",
                linewidth=0,
                zorder=2,
                label=label,
            )
            label = "_"


def web_bands(figure: Any, cell: DriftCell, row: int | None = None) -> None:
    """The same on a plotly figure; ``row``: of its subplots, from 1."""
    where = {} if row is None else {"row": row, "col": 1}
    known = [topic for topic in cell.topics if topic.start is not None]
    for place, topic in enumerate(known):
        if place % 2 == 0 and row is not None:
            figure.add_vrect(
                topic.start, topic.end, fillcolor=BAND, line_width=0, layer="below", **where
            )
        if place:
            figure.add_vline(topic.start, line={"color": "white", "width": 3}, **where)
            line = {"color": INK, "width": 1.6, "dash": "10px,4px"}
            figure.add_vline(topic.start, line=line, **where)
    crowded = sum(len(topic.name) for topic in known) > 40
    if row in (None, 1):
        for place, topic in enumerate(known):
            figure.add_annotation(
                text=textwrap.shorten(topic.name, 26, placeholder="…"),
                x=((topic.start or 0) + (topic.end or 0)) / 2,
                xref="x",
                y=1.0,
                yref="paper",
                yanchor="bottom",
                yshift=2 + (14 * (place % 2) if crowded else 0),
                showarrow=False,
                font={"size": 12},
            )
    figure.update_xaxes(range=[0, max(1, cell.decoded_tokens)], **where)


def web_dense(figure: Any, periods: Sequence[Period], row: int | None = None) -> None:
    """Grey stretches where all neurons live."""
    where = {} if row is None else {"row": row, "col": 1}
    for period in periods:
        if period.mask is None:
            figure.add_vrect(
                period.start,
                period.end,
                fillcolor=HAZE,
                opacity=0.7,
                line_width=0,
                layer="above" if row is None else "below",
                **where,
            )


def edges(periods: Sequence[Period]) -> list[float]:
    """Where the columns of a picture over time begin and end."""
    return [*(float(period.start) for period in periods), float(periods[-1].end)]
