"""Figure record, style, methods' looks, axes; PNG, SVG and PDF of one drawing.

The only file that imports matplotlib and the colour maps.  Files that draw are handed an empty
figure and its colours.
"""

from __future__ import annotations

import io
import math
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dart_llm.errors import MissingExtra
from dart_llm.files import write_bytes
from dart_llm.reporting.words import quantity

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


INK, SOFT, FAINT = "#1d2530", "#5a6470", "#d5d8dc"

MAX_PANELS = 4
"""Sequences, or texts, that one plot shows."""

Palette = list[Any]
"""Categorical batlow colours: 0 dark blue, 1 pink, 2 olive, 3 teal, 4 salmon, ..."""


@dataclass(frozen=True)
class Plot:
    """One plot that a folder's files allow: its file name, words, height in inches, drawing."""

    name: str
    title: str
    alt: str
    small: str
    height: float
    draw: Callable[[Figure, Palette], None]
    """Called with an empty figure and the colours."""


DASHES = (0, (5, 3))


def reference_line(
    axes: Axes, *, x: float | None = None, y: float | None = None, label: str
) -> None:
    """A dashed line across the axes, white between the dashes so that it shows on dark bars."""
    for colour, style, width, name in (("white", "-", 1.4, "_"), (INK, DASHES, 1.5, label)):
        look: dict[str, Any] = {"color": colour, "linestyle": style, "linewidth": width}
        if x is not None:
            axes.axvline(x, label=name, **look)
        if y is not None:
            axes.axhline(y, label=name, **look)


def _labelled(drawn: Iterable[Axes]) -> dict[str, Any]:
    """The handle of every label, each once, in the order in which they are met."""
    handles: dict[str, Any] = {}
    for axes in drawn:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    return handles


def legend(axes: Axes, columns: int, others: Sequence[Axes] = ()) -> None:
    """A legend above the axes, on the left, of what has a label in them or in ``others``."""
    handles = _labelled((axes, *others))
    if handles:
        axes.legend(
            list(handles.values()),
            list(handles),
            loc="lower left",
            bbox_to_anchor=(0.0, 1.0),
            ncols=columns,
            borderaxespad=0.4,
            borderpad=0.0,
            columnspacing=1.4,
            handletextpad=0.6,
        )


def draw_whisker(axes: Axes, low: float, high: float, place: float) -> None:
    """An interval across a horizontal bar, white around it so that it shows on dark ones."""
    for colour, extra in (("white", 2.0), (INK, 0.0)):
        look: dict[str, Any] = {"color": colour, "linewidth": 1.4 + extra, "marker": "|"}
        look |= {"markersize": 7 + extra, "markeredgewidth": 1.2 + extra}
        axes.plot([low, high], [place, place], **look)


def whisker_lengths(
    values: Sequence[float], ends: Sequence[tuple[float, float] | None]
) -> list[list[float]]:
    """Below and beyond each value, as ``errorbar`` takes them; None: nan, which draws nothing."""
    nothing = (math.nan, math.nan)
    lengths = [(v - e[0], e[1] - v) if e else nothing for v, e in zip(values, ends, strict=True)]
    return [
        [length if math.isnan(length) else max(0.0, length) for length in each]
        for each in zip(*lengths, strict=True)
    ]


def write_beside(
    axes: Axes, text: str, x: float, place: float, size: float = 9.0, gap: float = 5.0
) -> None:
    """A number ``gap`` points to the right of a bar or mark, for which the axes must have room."""
    where: dict[str, Any] = {"xytext": (gap, 0), "textcoords": "offset points", "va": "center"}
    axes.annotate(text, (x, place), fontsize=size, color=INK, in_layout=False, zorder=5, **where)


def name_bars(axes: Axes, names: Sequence[str]) -> None:
    """Horizontal bars from the top down, a name for each."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")


HATCHES = ("", "///", "...", "\\\\\\", "xx", "++")

GREY = "#868e98"
"""What is dense, or in the background."""

CONTRAST = 3.0
"""Of a mark against white, at least, as WCAG 2 asks of graphics."""


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers between two perplexities, at least three of them where they fit."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), tuple(range(1, 10))):
        ticks = [step * 10.0**d for d in decades for step in steps if low <= step * 10.0**d <= high]
        if len(ticks) >= 3:
            return ticks[:: math.ceil(len(ticks) / most)]
    step = 10.0 ** math.floor(math.log10((high - low) / 2))
    first = math.ceil(low / step)
    ticks = [step * n for n in range(first, math.floor(high / step) + 1)]
    return ticks[:: math.ceil(len(ticks) / most)]


# What the plots of comparisons share: panels, legend, methods' looks, curves with intervals.


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


def panels_height(count: int, names: int) -> float:
    """Inches of ``count`` panels below a legend of ``names``."""
    panel = 2.5 if count > 1 else 3.1
    return 0.7 + panel * math.ceil(count / 2) + KEY_LINE * (1 + names // 6)


def panels(figure: Figure, count: int, lines: int) -> list[Axes]:
    """A place for the legend of ``lines`` lines, and below it one panel per task, in two columns.

    The first axes are the legend's.
    """
    columns = 1 if count == 1 else 2
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
    looks = {}
    for name in names:
        if name in METHODS:
            look = LOOKS[METHODS.index(name)]
        else:
            look = further[strangers.index(name) % len(further)]
        looks[name] = {**mark(look, palette), **({"linewidth": 2.2} if name == "dart" else {})}
    return looks


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


def log_scale(axes: Axes, low: float, high: float) -> None:
    """Limits and round ticks of a log axis."""
    ticks = _log_ticks(low, high, 6)
    if len(ticks) < 4 and high < 2 * low:  # nearly straight: round numbers at even distances
        unit = 10.0 ** math.floor(math.log10((high - low) / 4))
        step = next(n * unit for n in (1, 2, 5, 10) if n * unit >= (high - low) / 6)
        ticks = [step * n for n in range(math.ceil(low / step), math.floor(high / step) + 1)]
    axes.set_yticks(ticks, [quantity(tick, True).removesuffix(".0") for tick in ticks])
    axes.set_yticks([], minor=True)
    axes.set_ylim(low, high)


def log_axis(axes: Axes) -> None:
    """A log axis whose ticks are plain numbers."""
    from matplotlib.ticker import LogLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_yticks([], minor=True)


def key(above: Axes, drawn: Sequence[Axes], columns: int) -> None:
    """One legend for all panels, above them."""
    handles = _labelled(drawn)
    above.legend(
        list(handles.values()),
        list(handles),
        loc="center left",
        bbox_to_anchor=(0.0, 0.5),
        ncols=columns,
        handlelength=3.2,
        columnspacing=1.4,
        borderaxespad=0.0,
        borderpad=0.0,
    )


def looks(labels: Sequence[str], palette: Palette) -> dict[str, Look]:
    """Colour, marker and line per label: those of the method where each method has one label."""
    methods = [label.partition("@")[0] for label in labels]
    names = methods if len(set(methods)) == len(methods) else list(labels)
    by_name = looks_of(names, palette)
    return {label: by_name[name] for label, name in zip(labels, names, strict=True)}


# A plot has one size.  It can be read in grey: hatches, markers and line styles carry the meaning,
# colours only repeat it.


WIDE = 8.0
"""Inches of a figure."""

STYLES = ("screen", "paper")

STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": INK,
    "text.parse_math": False,
    "axes.labelcolor": INK,
    "axes.edgecolor": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": FAINT,
    "grid.linewidth": 0.7,
    "hatch.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "pdf.fonttype": 42,  # fonts that a publisher can search and edit
    "svg.fonttype": "path",
    "svg.hashsalt": "dart-llm",
    "figure.constrained_layout.use": True,
}


def save(folder: Path, wanted: Iterable[Plot], style: str = "screen") -> list[Path]:
    """Draw plots into ``plots/<name>.png``; in the style ``paper`` also as PDF, for print.

    The PDF has neither headline nor small print, which the paper's caption has.  Raises
    ``ResultsError`` when a file cannot be written, and ``MissingExtra``.
    """
    written = []
    for plot in wanted:
        for kind in ("png", "pdf") if style == "paper" else ("png",):
            path = folder / "plots" / f"{plot.name}.{kind}"
            write_bytes(path, render(plot, kind), make_folder=True)
            written.append(path)
    return written


def render(plot: Plot, kind: str) -> bytes:
    """The plot as ``png`` (200 dots per inch), ``svg`` (letters as outlines) or ``pdf``."""
    with _style() as palette:
        from matplotlib.figure import Figure

        title = textwrap.wrap(plot.title.rstrip("."), round(WIDE * 10))
        small = textwrap.wrap(plot.small, round(WIDE * 15))
        if kind == "pdf":
            figure = Figure(figsize=(WIDE, plot.height - HEADLINE))
        else:
            extra = 0.2 * (len(title) + len(small) - 2)
            figure = Figure(figsize=(WIDE, plot.height + extra))
            figure.suptitle("\n".join(title), x=0.012, ha="left", fontsize=10.5, fontweight="bold")
            figure.supxlabel("\n".join(small), x=0.012, ha="left", fontsize=7, color=SOFT)
        plot.draw(figure, palette)
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, dpi=200, metadata=UNDATED[kind])
    return buffer.getvalue()


HEADLINE = 0.4
"""Inches of a plot's height that headline and small print take."""

UNDATED: dict[str, dict[str, Any]] = {
    "png": {},
    "svg": {"Creator": None, "Date": None},
    "pdf": dict.fromkeys(("Creator", "Producer", "CreationDate")),
}
"""Metadata, by format, that make equal plots equal files."""


@contextmanager
def _style() -> Iterator[Palette]:
    """Our style in force inside the block; gives the colours."""
    try:
        import matplotlib
    except ImportError:
        raise MissingExtra("matplotlib", "plots") from None
    try:
        from cmcrameri import cm
    except ImportError:
        raise MissingExtra("cmcrameri", "plots") from None
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        yield [readable(colour) for colour in cm.batlowS.colors]


def readable(colour: Sequence[float]) -> tuple[float, ...]:
    """An RGB colour, darkened until it has ``CONTRAST`` against white."""
    while 1.05 / (luminance(colour) + 0.05) < CONTRAST:
        colour = [0.97 * part for part in colour]
    return tuple(colour)


def luminance(colour: Sequence[float]) -> float:
    """Relative luminance of an RGB colour from 0 to 1, as WCAG 2 defines it."""
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
