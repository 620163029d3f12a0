"""The plots of a results folder; the only file that imports matplotlib and the colour maps.

Every plot can be drawn wide, for a page of about 800 pixels, or narrow, for a phone, and can be
read in grey: hatches, markers and line styles carry the meaning, colours only repeat it.
"""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dart_llm import plot_bars, plot_drift, plot_kept
from dart_llm.errors import MissingExtra
from dart_llm.plot_base import FAINT, INK, SOFT, Palette, Plot
from dart_llm.results import write_bytes
from dart_llm.results_view import ResultsView, read

WIDE, NARROW = 8.0, 4.1
"""Inches; 100 pixels each on the report page."""

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
    "svg.fonttype": "path",
    "svg.hashsalt": "dart-llm",
    "figure.constrained_layout.use": True,
}


def available(view: ResultsView) -> list[Plot]:
    """The plots that can be drawn from what the folder holds; needs no matplotlib."""
    makers = (plot_kept.make, plot_drift.make, plot_bars.perplexity, plot_bars.time_per_token)
    return [plot for plot in (make(view) for make in makers) if plot is not None]


def write_all(folder: Path) -> list[Path]:
    """Write ``plots/<name>.png`` from the files that exist; returns the paths.

    Raises ``MissingExtra`` without matplotlib, ``ResultsError`` when a file cannot be written.
    """
    return save(folder, available(read(folder)))


def save(folder: Path, wanted: Iterable[Plot]) -> list[Path]:
    """Draw plots into ``plots/<name>.png``; raises as ``write_all``."""
    written = []
    for plot in wanted:
        path = folder / "plots" / f"{plot.name}.png"
        write_bytes(path, render(plot, "png"), make_folder=True)
        written.append(path)
    return written


def render(plot: Plot, kind: str, narrow: bool = False) -> bytes:
    """The plot as ``png`` (200 dots per inch) or ``svg`` (letters as outlines, no scripts)."""
    with _style() as palette:
        from matplotlib.figure import Figure

        width = NARROW if narrow else WIDE
        title = textwrap.wrap(plot.title.rstrip("."), round(width * 10))
        small = textwrap.wrap(plot.small, round(width * 15))
        extra = 0.2 * (len(title) + len(small) - 2) + (0.4 if narrow else 0.0)
        height = plot.narrow_height if narrow and plot.narrow_height else plot.height
        figure = Figure(figsize=(width, height + extra))
        figure.suptitle("\n".join(title), x=0.012, ha="left", fontsize=10.5, fontweight="bold")
        figure.supxlabel("\n".join(small), x=0.012, ha="left", fontsize=7, color=SOFT)
        plot.draw(figure, palette, narrow)
        buffer = io.BytesIO()
        metadata: dict[str, Any] = {"Creator": None, "Date": None} if kind == "svg" else {}
        figure.savefig(buffer, format=kind, dpi=200, metadata=metadata)
    return buffer.getvalue()


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
        yield list(cm.batlowS.colors)
