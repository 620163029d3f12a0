"""The ``Plot`` class, and what all plots share: style, colours, legends, axes and output files.

This is the only file that imports matplotlib.  Modules that draw plots receive an empty figure and
its colours.
"""

from __future__ import annotations

import io
import math
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dart_llm.errors import MissingExtra
from dart_llm.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Palette = Sequence[str]
Look = dict[str, Any]

INK, SOFT, FAINT = "#1d2530", "#5a6470", "#d5d8dc"

GREY = "#868e98"
"""Colour of results of models that are not pruned."""

PALETTE: Palette = (
    *("#011959", "#a889a8", "#828231", "#226061", "#c98259", "#4d734d", "#114360", "#bb8584"),
    *("#bb8c34", "#175262", "#b48999", "#c58471", "#356a59", "#0d315d", "#a18a2b", "#677b3e"),
    "#c38444",
)
"""Crameri's categorical batlow colours, darkened to a contrast of 3 against white (WCAG 2):
0 dark blue, 1 pink, 2 olive, 3 teal, 4 salmon, ..."""

MAX_PANELS = 4
"""Maximum number of sequences or texts in one plot."""

WIDE = 8.0
"""Width of a figure in inches."""

STYLES = ("screen", "paper")
"""Values of the setting ``style``; ``paper`` also writes every plot as PDF."""

# A plot can be read in grey: hatches, markers and line styles carry the meaning, colours repeat it.

STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.parse_math": False,
    "axes.edgecolor": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "pdf.fonttype": 42,  # fonts that a publisher can search and edit
    "svg.hashsalt": "dart-llm",
    "figure.constrained_layout.use": True,
}

UNDATED: dict[str, dict[str, Any]] = {
    "png": {},
    "svg": {"Creator": None, "Date": None},
    "pdf": dict.fromkeys(("Creator", "Producer", "CreationDate")),
}
"""Maps a file format to its metadata, without dates, so that equal plots give equal files."""


@dataclass(frozen=True)
class Plot:
    """One plot.  ``draw(figure, palette)`` draws it into an empty figure with these colours.

    ``alt``: description for screen readers.  ``small``: text in small print below the plot.
    ``height``: height in inches, with one line each of title and small print.
    """

    name: str
    title: str
    alt: str
    small: str
    height: float
    draw: Callable[[Figure, Palette], None]


def save(folder: Path, wanted: Iterable[Plot], style: str = "screen") -> list[Path]:
    """Write each plot as ``plots/<name>.png``; with style ``paper`` also as PDF.  Return the paths.

    Raises ``ResultsError`` if a file cannot be written, ``MissingExtra`` without matplotlib.
    """
    written = []
    for plot in wanted:
        for kind in ("png", "pdf") if style == "paper" else ("png",):
            path = folder / "plots" / f"{plot.name}.{kind}"
            write_bytes(path, render(plot, kind), make_folder=True)
            written.append(path)
    return written


def render(plot: Plot, kind: str) -> bytes:
    """The plot as ``png`` (200 dots per inch), ``svg`` (text as outlines) or ``pdf``."""
    title = textwrap.wrap(plot.title.rstrip("."), round(WIDE * 10))
    small = textwrap.wrap(plot.small, round(WIDE * 15))
    with _style() as palette:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(WIDE, plot.height + 0.2 * (len(title) + len(small) - 2)))
        figure.suptitle("\n".join(title), x=0.012, ha="left", fontsize=10.5, fontweight="bold")
        figure.supxlabel("\n".join(small), x=0.012, ha="left", fontsize=7, color=SOFT)
        plot.draw(figure, palette)
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, dpi=200, metadata=UNDATED[kind])
    return buffer.getvalue()


@contextmanager
def _style() -> Iterator[Palette]:
    """Use the project's style inside the block; yield the colours."""
    try:
        import matplotlib
    except ImportError:
        raise MissingExtra("matplotlib", "plots") from None
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        yield PALETTE


# Colour, marker and line of each method.

METHODS = ("dart", "griffin", "flap", "static", "published", "wanda", "glass", "random")
"""Methods that have the same look in every plot; other methods get the looks that are left."""

LINES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))

LOOKS: tuple[tuple[int, str, Any], ...] = tuple(
    zip((0, 4, 3, 8, 7, 2, 6, 5, 16, 12, 1, 14), "os^DvPX<>h*p", LINES * 3, strict=True)
)
"""Each look is an index into the colours, a marker and a line style.  Marker and line style also
distinguish methods in a grey print."""

DASHES = (0, (5, 3))


def mark(look: tuple[int, str, Any], palette: Palette) -> Look:
    """The look as arguments for matplotlib's ``plot``."""
    colour, marker, line = look
    edge = {"markeredgecolor": INK, "markeredgewidth": 0.6, "markersize": 5.5}
    return {"color": palette[colour], "marker": marker, "linestyle": line, "linewidth": 1.5, **edge}


def looks_of(names: Sequence[str], palette: Palette) -> dict[str, Look]:
    """Maps each name to its look, as arguments for matplotlib; ``dart`` has the thickest line."""
    unused = [look for look, name in zip(LOOKS, METHODS, strict=False) if name not in names]
    further = cycle([*LOOKS[len(METHODS) :], *unused[::-1], *LOOKS])
    looks = {}
    for name in names:
        look = LOOKS[METHODS.index(name)] if name in METHODS else next(further)
        looks[name] = {**mark(look, palette), **({"linewidth": 2.2} if name == "dart" else {})}
    return looks


# Panels and their legend.

KEY_LINE = 0.22  # height in inches of one line of the legend


def panels_height(count: int, names: int) -> float:
    """Height in inches of ``count`` panels below a legend with ``names`` entries."""
    return 0.7 + 2.6 * math.ceil(count / 2) + KEY_LINE * (1 + names // 6)


def panels(figure: Figure, count: int, lines: int) -> list[Axes]:
    """Return axes: one for a legend of ``lines`` lines, then one for each of ``count`` panels."""
    columns = 1 if count == 1 else 2
    rows = math.ceil(count / columns)
    grid = figure.add_gridspec(rows + 1, columns, height_ratios=[KEY_LINE * lines, *[2.4] * rows])
    above = figure.add_subplot(grid[0, :])
    above.axis("off")
    places = (divmod(number, columns) for number in range(count))
    return [above, *(figure.add_subplot(grid[row + 1, column]) for row, column in places)]


def key(above: Axes, drawn: Sequence[Axes], columns: int) -> None:
    """Draw one legend for all panels, above them."""
    anchor: Look = {"loc": "center left", "bbox_to_anchor": (0.0, 0.5), "handlelength": 3.2}
    _legend(above, drawn, columns, borderaxespad=0.0, **anchor)


def legend(axes: Axes, columns: int, others: Sequence[Axes] = ()) -> None:
    """Draw a legend above ``axes``, at the left, with the labels of ``axes`` and of ``others``."""
    anchor: Look = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "handletextpad": 0.6}
    _legend(axes, (axes, *others), columns, borderaxespad=0.4, **anchor)


def _legend(axes: Axes, drawn: Iterable[Axes], columns: int, **anchor: Any) -> None:
    """Draw a legend in ``axes`` that has every label in ``drawn`` once, in the same order."""
    handles: dict[str, Any] = {}
    for panel in drawn:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if handles:
        shape: Look = {"ncols": columns, "columnspacing": 1.4, "borderpad": 0.0}
        axes.legend(list(handles.values()), list(handles), **shape, **anchor)


# Lines, intervals and numbers in axes.


def reference_line(
    axes: Axes, *, x: float | None = None, y: float | None = None, label: str
) -> None:
    """Draw a dashed line across the axes, with white gaps so that it is visible on dark bars."""
    draw, at = (axes.axhline, y or 0.0) if x is None else (axes.axvline, x)
    draw(at, color="white", linewidth=1.4, label="_")
    draw(at, color=INK, linestyle=DASHES, linewidth=1.5, label=label)


def whisker_lengths(
    values: Sequence[float], ends: Sequence[tuple[float, float] | None]
) -> list[list[float]]:
    """Lengths of the whiskers below and above each value, for matplotlib's ``errorbar``.

    Where ``ends`` has None, the lengths are nan, for which matplotlib draws nothing.
    """
    lengths = [
        (max(0.0, v - e[0]), max(0.0, e[1] - v)) if e else (math.nan, math.nan)
        for v, e in zip(values, ends, strict=True)
    ]
    return [list(side) for side in zip(*lengths, strict=True)]


def write_beside(
    axes: Axes, text: str, x: float, y: float, size: float = 9.0, gap: float = 5.0
) -> None:
    """Write ``text`` ``gap`` points to the right of (x, y); the axes must have room for it."""
    where: Look = {"xytext": (gap, 0), "textcoords": "offset points", "va": "center"}
    axes.annotate(text, (x, y), fontsize=size, color=INK, in_layout=False, zorder=5, **where)


def log_axis(axes: Axes, low: float | None = None, high: float | None = None) -> None:
    """Make the y axis logarithmic, with optional limits and plain numbers as ticks."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    axes.set_yscale("log")
    low, high = axes.set_ylim(low, high)
    decades = high > 10 * low
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if decades else MaxNLocator(6))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_yticks([], minor=True)
