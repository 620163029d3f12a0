"""What the plots share: the record of a plot, ink and greys, and the legend's place.

Nothing here or in the drawing files imports matplotlib: they are handed figures by ``plots.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
    draw: Callable[[Figure, Palette, bool], None]
    """Called with an empty figure, the colours, and whether the figure is narrow."""
    narrow_height: float | None = None
    """Inches of the narrow figure where it is stacked higher; None: ``height``."""


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


def legend(axes: Axes, columns: int) -> None:
    """A legend above the axes, on the left, if anything has a label."""
    if not axes.get_legend_handles_labels()[1]:
        return
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        ncols=columns,
        borderaxespad=0.4,
        borderpad=0.0,
        columnspacing=1.4,
        handletextpad=0.6,
    )
