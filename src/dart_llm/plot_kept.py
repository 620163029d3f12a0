"""Plot: the share of its FFN neurons that each layer keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dart_llm.plot_base import INK, Palette, Plot, legend, reference_line
from dart_llm.results_view import ResultsView
from dart_llm.sentences import layers_sentence, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def make(view: ResultsView) -> Plot | None:
    """Bars for the first mask, steps for the last where it differs, a line for an even spread."""
    widths = [int(layer.get("width") or 0) for layer in view.layers]
    masks = [mask for mask in view.remasks if len(mask.get("kept") or ()) == len(widths)]
    if not widths or not all(widths) or not masks:
        return None
    words = layers_sentence(masks[0]["kept"], widths)

    def draw(figure: Figure, palette: Palette, narrow: bool) -> None:
        axes = figure.subplots()
        _draw(axes, palette, masks, widths)
        legend(axes, 1 if narrow else 3)

    alt = f"Bars: share of the FFN neurons kept in each of {len(widths)} layers. {words}"
    return Plot("kept_neurons", words, alt, view.small_print, 3.4, draw)


def _draw(
    axes: Axes, palette: Palette, masks: Sequence[Mapping[str, Any]], widths: Sequence[int]
) -> None:
    first, last = masks[0]["kept"], masks[-1]["kept"]
    label = f"first mask ({_when(masks[0])})"
    if len(masks) > 1 and all(mask["kept"] == first for mask in masks):
        label = f"all {len(masks)} masks (re-masks keep the counts)"
    axes.bar(range(len(widths)), _shares(first, widths), 0.8, color=palette[3], label=label)
    if last != first:
        edges = [index - 0.5 for index in range(len(widths) + 1)]
        for colour, width, name in (
            (INK, 3.6, "_"),
            (palette[4], 2.0, f"last mask ({_when(masks[-1])})"),
        ):
            look: dict[str, Any] = {"baseline": None, "color": colour, "linewidth": width}
            axes.stairs(_shares(last, widths), edges, label=name, **look)
    even = sum(first) / sum(widths)
    reference_line(axes, y=100 * even, label=f"spread evenly: {percent(even)}")
    axes.set(ylim=(0, 100), xlim=(-0.8, len(widths) - 0.2))
    axes.set(xlabel="layer", ylabel="FFN neurons kept (%)")
    axes.grid(axis="y")
    axes.locator_params(axis="x", integer=True)
    if len(widths) < 8:
        axes.set_xticks(range(len(widths)))


def _shares(kept: Sequence[int], widths: Sequence[int]) -> list[float]:
    return [100 * count / width for count, width in zip(kept, widths, strict=True)]


def _when(mask: Mapping[str, Any]) -> str:
    cause = mask.get("cause", "first")
    step = f"step {mask.get('step', '?')}"
    return step if cause == "first" else f"{step}, {cause}"
