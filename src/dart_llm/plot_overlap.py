"""Picture: how much of each layer's first mask is still in force, over time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from dart_llm import drift_masks, drift_words
from dart_llm.drift_masks import Masks
from dart_llm.drift_view import DriftView
from dart_llm.drift_view_cells import DriftCell
from dart_llm.plot_base import INK, Palette, Plot
from dart_llm.plot_topics import (
    SHADE,
    SHADES,
    TIME,
    Drawing,
    Kit,
    bands,
    dense_spans,
    edges,
    web_bands,
    web_dense,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LABEL = "Jaccard overlap with the first mask"


def make(view: DriftView) -> Iterator[Drawing]:
    """One per cell with two masks or more."""
    for cell, masks in remasked(view):
        yield _drawing(view, cell, masks)


def remasked(view: DriftView) -> Iterator[tuple[DriftCell, Masks]]:
    """Cells whose masks were rebuilt: dart's first, then those with fewer, legible re-masks."""
    found = [cell for cell in view.done if cell.masks and len(cell.remasks) > 1]
    found.sort(key=lambda cell: (cell.method != "dart", abs(len(cell.remasks) - 3)))
    for cell in found:
        masks = drift_masks.read(cell)
        if masks is not None:
            yield cell, masks


def _drawing(view: DriftView, cell: DriftCell, masks: Masks) -> Drawing:
    values, expected = drift_masks.overlap(masks), drift_masks.chance(masks)
    title = drift_words.overlap_title(cell, float(values[:, -1].mean()), expected)
    low = min(0.9, np.floor(10 * min(expected, float(values.min()))) / 10)
    small = f"Jaccard: neurons in both masks over neurons in either · {view.results.small_print}"

    def draw(figure: Figure, palette: Palette, narrow: bool) -> None:
        axes = figure.subplots()
        own = drift_masks.periods(cell)
        columns = [0 if period.mask is None else period.mask for period in own]
        rows = np.arange(len(masks.live) + 1) - 0.5
        mesh = axes.pcolormesh(
            edges(own), rows, values[:, columns], cmap=SHADE, vmin=low, vmax=1, rasterized=True
        )
        dense_spans(axes, own)
        for mask in cell.remasks:
            axes.axvline(mask.step, color="white", linewidth=1.0, zorder=2)
        bands(axes, cell)
        bar = figure.colorbar(mesh, ax=axes, label=LABEL, pad=0.02)
        bar.ax.axhline(expected, color="white", linewidth=3.0)
        bar.ax.axhline(expected, color=INK, linewidth=1.4)
        ticks = [*np.arange(low, 1.01, 0.2)]
        near = [tick for tick in ticks if abs(tick - expected) > 0.05]
        bar.set_ticks([*near, expected], labels=[*(f"{t:.1f}" for t in near), "chance"])
        axes.set(xlabel=TIME, ylabel="layer")
        axes.locator_params(axis="y", integer=True)
        if any(period.mask is None for period in own):
            axes.legend(loc="lower left", fontsize=8, frameon=True, framealpha=1)

    alt = f"Heat map: {LABEL}, by layer and decoded token. {title}"
    plot = Plot("overlap", title, alt, small, 3.9, draw)
    return Drawing(
        plot, lambda kit: _web(kit, cell, masks, low, expected), drift_words.choice(cell), 440
    )


def _web(kit: Kit, cell: DriftCell, masks: Masks, low: float, expected: float) -> Any:
    own = drift_masks.periods(cell)
    first, before = drift_masks.overlap(masks), drift_masks.overlap(masks, before=True)
    columns = [0 if period.mask is None else period.mask for period in own]
    told = [
        [
            "dense" if period.mask is None else f"mask {period.mask}, with the mask before {b:.2f}"
            for period, b in zip(own, before[layer, columns], strict=True)
        ]
        for layer in range(len(masks.live))
    ]
    figure = kit.go.Figure(
        kit.go.Heatmap(
            x=edges(own),
            y=[layer - 0.5 for layer in range(len(masks.live) + 1)],
            z=[
                [None if p.mask is None else round(float(row[p.mask]), 3) for p in own]
                for row in first
            ],
            text=told,
            zmin=low,
            zmax=1,
            colorscale=SHADES,
            colorbar={
                "title": {"text": f"Jaccard overlap (chance: {expected:.2f})", "side": "right"},
                "thickness": 14,
            },
            hovertemplate="layer %{y:.0f}, token %{x:.0f}<br>overlap %{z:.2f}<br>%{text}"
            "<extra></extra>",
        )
    )
    web_dense(figure, own)
    web_bands(figure, cell)
    figure.update_xaxes(title_text=TIME)
    figure.update_yaxes(title_text="layer")
    return figure
