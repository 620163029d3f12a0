"""The picture of a run's masks: the share of its FFN neurons that each layer keeps.

Drift over time is drawn by ``experiments/drift_plot.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dart_llm.experiments import drift_plot
from dart_llm.experiments.store import ResultsView
from dart_llm.reporting.figures import INK, Palette, Plot, legend, reference_line
from dart_llm.reporting.words import percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Mask = Mapping[str, Any]


def available(view: ResultsView) -> list[Plot]:
    """The plots that can be drawn from the files of a folder; needs no matplotlib."""
    makers = (kept_neurons, drift_plot.make)
    return [plot for plot in (make(view) for make in makers) if plot is not None]


def kept_neurons(view: ResultsView) -> Plot | None:
    """Bars for the first mask, steps for the last where it differs, a line for an even spread.

    None where all layers keep the same share.
    """
    layer_widths, masks = _widths(view), _masks(view)
    if not layer_widths or not all(layer_widths) or not masks or _is_uniform(view):
        return None

    def draw(figure: Figure, palette: Palette) -> None:
        axes = figure.subplots()
        _draw_kept(axes, palette, masks, layer_widths)
        legend(axes, 3)

    title = "FFN neurons kept in each layer"
    alt = f"Bars: share of the FFN neurons kept in each of {len(layer_widths)} layers."
    return Plot("kept_neurons", title, alt, view.small_print, 3.4, draw)


def _widths(view: ResultsView) -> list[int]:
    return [int(layer.get("width") or 0) for layer in view.layers]


def _masks(view: ResultsView) -> list[Mask]:
    """The masks that have a count for every layer."""
    return [mask for mask in view.remasks if len(mask.get("kept") or ()) == len(view.layers)]


def _is_uniform(view: ResultsView) -> bool:
    """Whether every mask keeps the same share of each layer, so that a line per layer says nothing.

    Shares that differ by less than half a point are rounding.
    """
    layer_widths = _widths(view)
    if not all(layer_widths):
        return False
    shares = [_shares(mask["kept"], layer_widths) for mask in _masks(view)]
    return bool(shares) and all(max(kept) - min(kept) < 0.5 for kept in shares)


def _draw_kept(
    axes: Axes, palette: Palette, masks: Sequence[Mask], layer_widths: Sequence[int]
) -> None:
    first, last = masks[0]["kept"], masks[-1]["kept"]
    label = f"first mask ({_when(masks[0])})"
    if len(masks) > 1 and all(mask["kept"] == first for mask in masks):
        label = f"all {len(masks)} masks (re-masks keep the counts)"
    layers = range(len(layer_widths))
    axes.bar(layers, _shares(first, layer_widths), 0.8, color=palette[3], label=label)
    if last != first:
        edges = [index - 0.5 for index in range(len(layer_widths) + 1)]
        name = f"last mask ({_when(masks[-1])})"
        for colour, width, shown in ((INK, 3.6, "_"), (palette[4], 2.0, name)):
            look: dict[str, Any] = {"baseline": None, "color": colour, "linewidth": width}
            axes.stairs(_shares(last, layer_widths), edges, label=shown, **look)
    even = sum(first) / sum(layer_widths)
    reference_line(axes, y=100 * even, label=f"spread evenly: {percent(even)}")
    axes.set(ylim=(0, 100), xlim=(-0.8, len(layer_widths) - 0.2))
    axes.set(xlabel="layer", ylabel="FFN neurons kept (%)")
    axes.grid(axis="y")
    axes.locator_params(axis="x", integer=True)
    if len(layer_widths) < 8:
        axes.set_xticks(layers)


def _shares(kept: Sequence[int], layer_widths: Sequence[int]) -> list[float]:
    return [100 * count / width for count, width in zip(kept, layer_widths, strict=True)]


def _when(mask: Mask) -> str:
    cause = mask.get("cause", "first")
    step = f"step {mask.get('step', '?')}"
    return step if cause == "first" else f"{step}, {cause}"
