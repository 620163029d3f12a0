"""The plot of speed.json: speed-up against achieved sparsity, with the byte limit as a line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dart_llm.plot_base import DASHES, INK, SOFT, Palette, Plot
from dart_llm.plot_lines import key, panels
from dart_llm.records import bytes_limit
from dart_llm.speed_table import caption, sentences

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOOKS: dict[str | None, tuple[int, str]] = {
    None: (5, "x"),
    "masked": (8, "v"),
    "compact": (4, "s"),
    "native": (3, "^"),
    "slim": (0, "o"),
    "graph": (2, "D"),
}
"""Colour and marker by executor; None is plain transformers."""
POINTS = 60
"""Of the line of the limit."""

Row = Mapping[str, Any]


def make(document: Row) -> list[Plot]:
    """One plot; none where no method could run."""
    rows = document["rows"]
    if not any(row["variant"] for row in rows):
        return []

    def draw(figure: Figure, palette: Palette, narrow: bool) -> None:
        above, axes = panels(figure, 1, narrow, 2)
        _draw(axes, rows, document["ffn_share_of_bytes_read"], document["own_dense"], palette)
        key(above, [axes], 2 if narrow else 4)

    return [
        Plot(
            "speed",
            f"Speed-up over our own dense path ({document['own_dense']}), and what the bytes allow",
            "Points per row over a line that rises with the sparsity. "
            + " ".join(f"{line}." for line in sentences(document)),
            caption(document),
            3.9,
            draw,
        )
    ]


def _draw(axes: Axes, rows: Sequence[Row], share: float, own: str, palette: Palette) -> None:
    last = min(0.95, max(row["achieved_sparsity"] for row in rows) + 0.1)
    x = [last * at / POINTS for at in range(POINTS + 1)]
    limits = [bytes_limit(share, value) for value in x]
    look: dict[str, Any] = {"color": INK, "linewidth": 1.5, "linestyle": DASHES}
    axes.plot([100 * value for value in x], limits, label="byte limit 1 / (1 - f s)", **look)
    named: set[str | None] = set()
    several = len({row["variant"] for row in rows} - {None}) > 1
    for row in rows:
        executor = row["executor"]
        colour, marker = LOOKS[executor]
        words = "transformers" if executor is None else executor
        axes.plot(
            [100 * row["achieved_sparsity"]],
            [row["times_own_dense"]],
            label=f"_{words}" if executor in named else words,
            color=palette[colour],
            marker=marker,
            markersize=6,
            markeredgecolor=INK if marker != "x" else palette[colour],
            markeredgewidth=0.6 if marker != "x" else 1.8,
            linestyle="none",
        )
        named.add(executor)
        if several and row["variant"]:
            place = (100 * row["achieved_sparsity"], row["times_own_dense"])
            beside: dict[str, Any] = {"xytext": (6, 0), "textcoords": "offset points"}
            axes.annotate(row["variant"], place, fontsize=7, color=SOFT, va="center", **beside)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("achieved sparsity (%)", fontsize=8, color=SOFT)
    axes.set_ylabel(f"times as fast as {own}", fontsize=8, color=SOFT)
    axes.grid(axis="y")
