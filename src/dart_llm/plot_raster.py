"""Picture: which neurons of one layer live when."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dart_llm import drift_masks, drift_words
from dart_llm.drift_masks import Live, Masks, Period
from dart_llm.drift_view import DriftView
from dart_llm.drift_view_cells import DriftCell
from dart_llm.plot_base import Palette, Plot
from dart_llm.plot_overlap import remasked
from dart_llm.plot_topics import (
    HAZE,
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

PRUNED, LIVE = "#f1f2f4", "#114260"


def make(view: DriftView) -> Iterator[Drawing]:
    """One per cell with two masks or more, of the layer whose masks moved most."""
    for cell, masks in remasked(view):
        yield _drawing(view, cell, masks)


def order(live: Live) -> NDArray[np.intp]:
    """[width]: neurons by their pattern over the masks, those that live first on top."""
    return np.lexsort((np.arange(live.shape[1]), *(~live)[::-1]))


def _cells(live: Live, own: Sequence[Period]) -> NDArray[np.uint8]:
    """[width, periods]: 1 where a neuron lives, rows in ``order``; dense tokens use all."""
    everything = np.ones(live.shape[1], dtype=np.bool_)
    shown = [everything if period.mask is None else live[period.mask] for period in own]
    return np.stack(shown)[:, order(live)].T.astype(np.uint8)


def _drawing(view: DriftView, cell: DriftCell, masks: Masks) -> Drawing:
    layer = drift_masks.moved(masks)
    live = masks.live[layer]
    always, never = int(live.all(0).sum()), int((~live).all(0).sum())
    width = live.shape[1]
    title = drift_words.raster_title(cell, layer, always, never, width)
    words = "dark: live, light: pruned · sorted by when they live"
    small = f"{words} · the layer whose masks moved most · {view.results.small_print}"

    def draw(figure: Figure, palette: Palette, narrow: bool) -> None:
        axes = figure.subplots()
        own = drift_masks.periods(cell)
        shades: Any = {"cmap": "Greys", "vmin": -0.06, "vmax": 1.15, "rasterized": True}
        axes.pcolormesh(edges(own), np.arange(width + 1), _cells(live, own), **shades)
        dense_spans(axes, own)
        for mask in cell.remasks:
            axes.axvline(mask.step, color="white", linewidth=1.2, zorder=2)
        bands(axes, cell)
        axes.set_ylim(width, 0)
        axes.set(xlabel=TIME, ylabel=f"neurons of layer {layer}, sorted")
        if any(period.mask is None for period in own):
            axes.legend(loc="lower left", fontsize=8, frameon=True, framealpha=1)

    alt = f"Raster: the neurons of layer {layer} that live, over decoded tokens. {title}"
    plot = Plot("neurons", title, alt, small, 3.9, draw)
    return Drawing(plot, lambda kit: _web(kit, cell, live, layer), drift_words.choice(cell), 440)


def _web(kit: Kit, cell: DriftCell, live: Live, layer: int) -> Any:
    own = drift_masks.periods(cell)
    figure = kit.go.Figure(
        kit.go.Heatmap(
            x=edges(own),
            y=np.arange(live.shape[1] + 1),
            z=_cells(live, own),
            customdata=np.repeat(order(live).astype(np.uint16)[:, None], len(own), axis=1),
            zmin=0,
            zmax=1,
            showscale=False,
            colorscale=[[0, PRUNED], [1, LIVE]],
            hovertemplate="neuron %{customdata}, token %{x:.0f}: live %{z}<extra></extra>",
        )
    )
    for name, colour in (("live", LIVE), ("pruned", PRUNED), ("dense: all live", HAZE)):
        marker = {"symbol": "square", "size": 11, "color": colour, "line_width": 1}
        figure.add_trace(
            kit.go.Scatter(x=[None], y=[None], mode="markers", name=name, marker=marker)
        )
    web_dense(figure, own)
    web_bands(figure, cell)
    figure.update_xaxes(title_text=TIME)
    figure.update_yaxes(title_text=f"neurons of layer {layer}, sorted", range=[live.shape[1], 0])
    return figure
