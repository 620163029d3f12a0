"""The plot of quality.json: gap closed per cell with its interval, in both columns."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dart_llm.plot_base import INK, SOFT, Palette, Plot, reference_line
from dart_llm.plot_lines import key, panels
from dart_llm.quality_lines import EQUAL_BYTES, EQUAL_SPARSITY
from dart_llm.quality_table import NONE, groups, sentences
from dart_llm.sentences import count, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOOKS: dict[str, tuple[str, int, str, float]] = {
    EQUAL_SPARSITY: ("at equal achieved sparsity", 0, "o", 0.14),
    EQUAL_BYTES: ("at equal FFN bytes", 4, "s", -0.14),
}
"""Per column its words, colour, marker and place beside the row."""

Row = Mapping[str, Any]


def make(document: Row) -> list[Plot]:
    """One plot with a panel per model and cell; none where nothing is compared with GRIFFIN."""
    found = [
        (caption.partition(":")[0], [row for row in (*rows, *pooled) if row[EQUAL_SPARSITY]])
        for caption, rows, pooled in groups(document)
    ]
    found = [(caption, rows) for caption, rows in found if rows]
    if not found:
        return []

    def draw(figure: Figure, palette: Palette, narrow: bool) -> None:
        above, *places = panels(figure, len(found), narrow, 1)
        for axes, (caption, rows) in zip(places, found, strict=True):
            _draw(axes, rows, palette)
            title = "\n".join(textwrap.wrap(caption, 44))
            axes.set_title(title, loc="left", fontsize=8.5, color=INK)
        key(above, places, 1 if narrow else 2)

    most = max(len(rows) for _, rows in found)
    high = 0.9 + 0.24 * most
    cell = document["cells"][0]
    small = (
        f"{count(cell['slices'], 'slice')} of {', '.join(cell['kinds'])}, set {document['set']}, "
        f"{document['prompt_tokens']} prompt + {document['tokens']} scored tokens · bars: 95 % "
        "intervals, paired over slices"
    )
    return [
        Plot(
            "quality",
            "Share of GRIFFIN's log-perplexity gap to dense that is closed",
            "Points with intervals per sparsity and variant. " + " ".join(sentences(document)),
            small,
            0.9 + high * -(-len(found) // (1 if len(found) == 1 else 2)),
            draw,
            0.9 + high * len(found),
        )
    ]


def name(row: Row) -> str:
    """What is written beside a row."""
    pooled = row.get("sparsities")
    amount = percent(row["sparsity"]) if pooled is None else "pooled"
    return f"{row['variant']}, {amount}"


def _draw(axes: Axes, rows: Sequence[Row], palette: Palette) -> None:
    for column, (words, colour, marker, aside) in LOOKS.items():
        known = [(at, row[column]) for at, row in enumerate(rows) if _known(row[column])]
        x = [100 * found["gap_closed"] for _, found in known]
        ends = [found["interval"] or [found["gap_closed"]] * 2 for _, found in known]
        below = [max(0.0, value - 100 * low) for value, (low, _) in zip(x, ends, strict=True)]
        beyond = [max(0.0, 100 * high - value) for value, (_, high) in zip(x, ends, strict=True)]
        axes.errorbar(
            x,
            [at - aside for at, _ in known],
            xerr=[below, beyond],
            label=words,
            color=palette[colour],
            marker=marker,
            markersize=5,
            markeredgecolor=INK,
            markeredgewidth=0.6,
            linestyle="none",
            capsize=2.5,
        )
    for at, row in enumerate(rows):
        if not any(_known(row[column]) for column in LOOKS):
            axes.text(0.0, at, f" {NONE}", fontsize=7.5, va="center", color=SOFT)
    reference_line(axes, x=0.0, label="_GRIFFIN")
    axes.set_yticks(range(len(rows)), [name(row) for row in rows], fontsize=7.5)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel("gap closed (%), 0 = GRIFFIN, 100 = dense", fontsize=8, color=SOFT)
    axes.grid(axis="x")


def _known(found: Mapping[str, Any] | None) -> bool:
    return found is not None and found["gap_closed"] is not None
