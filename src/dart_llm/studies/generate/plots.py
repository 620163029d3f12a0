"""What a run's page is made of, and the picture of the FFN neurons that each layer keeps.

Drift over time is drawn by ``experiments/line_plots.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dart_llm.experiments import line_plots, run_facts
from dart_llm.pruning.records import DriftCheck
from dart_llm.reporting.figures import INK, Palette, Plot, legend, reference_line
from dart_llm.reporting.words import percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Mask = Mapping[str, Any]


@dataclass(frozen=True)
class RunView:
    """A run as pictures and page show it.

    ``config``: config.json.  ``generations``: lines of generation.jsonl.  ``timing``: timing.json.
    ``checks``: windows of the drift detector.  ``perplexity``: perplexity.json, of a demo.
    """

    config: Mapping[str, Any]
    generations: Sequence[Mapping[str, Any]]
    timing: Mapping[str, Any]
    checks: Sequence[DriftCheck] = ()
    perplexity: Mapping[str, Any] | None = None

    @property
    def accounting(self) -> Mapping[str, Any]:
        """Of the pruned text; empty without one."""
        return next((one["accounting"] for one in self.generations if one["accounting"]), {})

    @property
    def method(self) -> str:
        """The method of the pruned text, or else of the configuration."""
        return str(self.accounting.get("method") or self.config["prune"]["method"])

    @property
    def requested(self) -> float | None:
        """The requested sparsity; None where the method sets it."""
        sparsity = self.accounting.get("requested_sparsity")
        found: float | None = self.config["prune"]["sparsity"] if sparsity is None else sparsity
        return found

    @property
    def masks(self) -> list[Mask]:
        """The masks in the order in which they were made."""
        sequences = self.accounting.get("sequences", ())
        return [remask for sequence in sequences for remask in sequence["remasks"]]

    @property
    def small_print(self) -> str:
        """Under every picture."""
        return run_facts.small_print(self.config)


def available(view: RunView) -> list[Plot]:
    """The plots that a run has; needs no matplotlib."""
    similarity = line_plots.plot_similarity(view.checks, view.masks, view.small_print)
    return [plot for plot in (kept_neurons(view), similarity) if plot is not None]


def kept_neurons(view: RunView) -> Plot | None:
    """Bars for the first mask, steps for the last where it differs, a line for an even spread.

    None where all layers keep the same share, to half a point, which is rounding.
    """
    masks = view.masks
    layer_widths = [layer["width"] for layer in view.accounting.get("layers", ())]
    shares = [_shares(mask["kept"], layer_widths) for mask in masks]
    if all(max(kept) - min(kept) < 0.5 for kept in shares):
        return None

    def draw(figure: Figure, palette: Palette) -> None:
        axes = figure.subplots()
        _draw_kept(axes, palette, masks, layer_widths)
        legend(axes, 3)

    title = "FFN neurons kept in each layer"
    alt = f"Bars: share of the FFN neurons kept in each of {len(layer_widths)} layers."
    return Plot("kept_neurons", title, alt, view.small_print, 3.4, draw)


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
    cause = mask["cause"]
    return f"step {mask['step']}" + ("" if cause == "first" else f", {cause}")
