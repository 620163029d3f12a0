"""Plots of an inspection: lines by layer or place, maps of norms, bars of the ablation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dart_llm.reporting.figures import (
    HATCHES,
    INK,
    LOOKS,
    Palette,
    Plot,
    legend,
    mark,
    reference_line,
    whisker_lengths,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = Mapping[str, Any]
Values = Sequence[float]

MANY = 100
"""Points above which a line is thin and has no marks."""

HEAT = "cmc.oslo_r"
"""Colour map of counts: white for none, and darker with every step, in grey too."""

ARMS = {"a_only": "A's own", "b_only": "B's own"}
"""What is drawn; A's strongest neurons, whose loss dwarfs these, stand in the table."""


def make(document: Record, small: str) -> list[Plot]:
    """Every plot that inspect.json allows; ``small``: the checkpoint in one line."""
    sections = document["sections"]
    made = [draw(sections[name], small) for name, draw in MAKERS.items() if name in sections]
    return [plot for plots in made for plot in plots]


@dataclass(frozen=True)
class Panel:
    """Lines over the same places, told apart by marker and line style."""

    ylabel: str
    lines: Mapping[str, Values]
    log: bool = False
    limits: tuple[float, float] | None = None
    band: tuple[Values, Values] | None = None
    """Around the first line."""
    level: float | None = None
    """Where a line across the panel stands."""


def line_plot(
    name: str,
    title: str,
    small: str,
    panels: Sequence[Panel],
    xlabel: str = "layer",
    x: Values | None = None,
    ticks: Sequence[str] = (),
) -> Plot:
    """The panels in twos, below each other where the figure is narrow.

    ``x``: the places; by default they are counted.  ``ticks``: what stands at each of them.
    """

    def draw(figure: Figure, palette: Palette, narrow: bool) -> None:
        for axes, panel in zip(_places(figure, len(panels), narrow), panels, strict=True):
            places = range(len(next(iter(panel.lines.values())))) if x is None else x
            _draw_lines(axes, palette, places, panel)
            axes.set_xlabel(xlabel)
            axes.locator_params(axis="x", integer=True)
            if ticks:
                step = 2 if narrow else 1
                axes.set_xticks(range(0, len(ticks), step), ticks[::step])

    rows = math.ceil(len(panels) / 2)
    alt = f"Lines by {xlabel}: {title}; {', '.join(panel.ylabel for panel in panels)}."
    return Plot(name, title, alt, small, 1.1 + 2.1 * rows, draw, 1.1 + 2.1 * len(panels))


def _places(figure: Figure, count: int, narrow: bool) -> list[Axes]:
    columns = 1 if narrow else min(2, count)
    found = list(figure.subplots(-(-count // columns), columns, squeeze=False).flat)
    for spare in found[count:]:
        spare.remove()
    return found[:count]


def _draw_lines(axes: Axes, palette: Palette, x: Values, panel: Panel) -> None:
    every = max(1, len(x) // 12)
    for look, (label, values) in zip(LOOKS, panel.lines.items(), strict=False):
        words = {**mark(look, palette), "markersize": 4.5, "markevery": every}
        if len(x) > MANY:
            words |= {"marker": "", "linewidth": 0.8}
        axes.plot(x, values, label=label, **words)
    if panel.band is not None:
        axes.fill_between(x, *panel.band, color=palette[0], alpha=0.18, linewidth=0)
    if panel.level is not None:
        reference_line(axes, y=panel.level, label="_")
    axes.grid(axis="y")
    axes.margins(x=0.02)
    axes.set_ylabel(panel.ylabel)
    if panel.limits is not None:
        axes.set_ylim(*panel.limits)
    if panel.log:
        _log_axis(axes)
    legend(axes, 2)


def _log_axis(axes: Axes) -> None:
    """A log axis with its decades as plain numbers, or its ends where there are less than two."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    powers = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
    ticks = [10.0**power for power in powers] if len(powers) > 1 else [low, high]
    axes.set_yticks(ticks, [f"{tick:,.0f}" if tick >= 10 else f"{tick:.3g}" for tick in ticks])
    axes.set_yticks([], minor=True)


def _layers(data: Record, small: str) -> list[Plot]:
    panels = []
    for what, ylabel, names, log in (
        ("cosine", "cosine with the stream before", ("x + r", "z"), False),
        ("change", "relative change", ("r: |r| / |x|", "z: |z - x| / |x|"), True),
    ):
        found = [[layer[one][what] for layer in data["layers"]] for one in ("residual", "output")]
        lines = {
            name: [one["median"] for one in own] for name, own in zip(names, found, strict=True)
        }
        low, high = ([one[end] for one in found[0]] for end in ("q05", "q95"))
        panels.append(Panel(ylabel, lines, log, band=(low, high)))
    more = f"{small} · lines: medians over the tokens of text {data['text']}; band: 5 to 95 % (r)"
    return [line_plot("inspect_layers", "What each FFN does to the residual stream", more, panels)]


def _weights(data: Record, small: str) -> list[Plot]:
    ranges, layers = data["weights"]["range"], data["weights"]["layers"]

    def draw(figure: Figure, palette: Palette, narrow: bool) -> None:
        places = _places(figure, len(ranges), narrow)
        for axes, (matrix, ends) in zip(places, ranges.items(), strict=True):
            counts = [layer[matrix]["histogram"] for layer in layers]
            shares = [[100 * n / max(1, sum(one)) for n in one] for one in counts]
            extent = (-0.5, len(layers) - 0.5, *ends)
            look: dict[str, Any] = {"origin": "lower", "aspect": "auto", "cmap": HEAT}
            heat = axes.imshow(list(zip(*shares, strict=True)), extent=extent, **look)
            figure.colorbar(heat, ax=axes, pad=0.02).set_label("neurons (%)")
            medians = [layer[matrix]["median"] for layer in layers]
            for colour, width in (("white", 3.2), (INK, 1.4)):
                axes.plot(range(len(layers)), medians, color=colour, linewidth=width)
            axes.set(xlabel="layer", ylabel=f"norm of a neuron's {matrix} weights")
            axes.locator_params(axis="x", integer=True)

    more = (
        f"{small} · shading: neurons of a layer in each of 40 bins (ends: and beyond); line: median"
    )
    title = "Norms of the neurons' weights"
    wide, narrow = 0.6 + 2.6 * math.ceil(len(ranges) / 2), 0.6 + 2.4 * len(ranges)
    alt = f"Heat maps by layer: {title}."
    found = [Plot("inspect_weights", title, alt, more, wide, draw, narrow)]
    return found + (_activations(data, small) if data["activations"] else [])


def _activations(data: Record, small: str) -> list[Plot]:
    layers = data["activations"]
    names = {"median": "median", "q95": "95 %", "max": "largest"}
    sizes = {words: [one["absolute"][key] for one in layers] for key, words in names.items()}
    shares = {
        "hold 90 % of u²": [100 * one["holds"] for one in layers],
        "|u| < 0.1 RMS": [100 * one["near"]["0.1"] for one in layers],
    }
    panels = [
        Panel("|u|", sizes, log=True),
        Panel("share of neurons (%)", shares, limits=(0, 100)),
    ]
    title = f"Activations u of the neurons on text {data['text']}"
    return [line_plot("inspect_activations", title, small, panels)]


def _neurons(data: Record, small: str) -> list[Plot]:
    lines = {
        f"strongest {name}": [100 * layer["concentration"][key] for layer in data["layers"]]
        for key, name in (("0.01", "1 %"), ("0.1", "10 %"))
    }
    more = f"{small} · forward proxy: {data['score']}"
    title = "Part of a layer's scores that its strongest neurons hold"
    return [line_plot("inspect_neurons", title, more, [Panel("part of all scores (%)", lines)])]


def _overlap(data: Record, small: str) -> list[Plot]:
    names = {
        "jaccard": "A and B",
        "same_text": "halves of one text",
        "across": "halves of A and B",
        "chance": "by chance",
    }
    lines = {words: [layer[key] for layer in data["layers"]] for key, words in names.items()}
    panel = Panel("Jaccard of the kept neurons", lines, limits=(0, 1))
    title = "Overlap of the neurons that are kept for A and for B"
    return [line_plot("inspect_overlap", title, f"{small} · method {data['method']}", [panel])]


def _ablation(data: Record, small: str) -> list[Plot]:
    rows = [row for row in data["rows"] if row["neurons"] and row["arm"] in ARMS]
    if not rows:
        return []
    labels = list(dict.fromkeys(row["text"] for row in rows))

    def draw(figure: Figure, palette: Palette, narrow: bool) -> None:
        drawn = _places(figure, len(labels), narrow)
        for axes, label in zip(drawn, labels, strict=True):
            _draw_bars(axes, palette, [row for row in rows if row["text"] == label])
            axes.set_title(f"loss on {label}", loc="left", fontsize=9, color=INK, pad=18)
            legend(axes, 2)
        low, high = zip(*(axes.get_ylim() for axes in drawn), strict=True)
        for axes in drawn:
            axes.set_ylim(min(low), max(high))

    more = (
        f"{small} · bars: 95 % bootstrap intervals of the difference to dense, paired by blocks of "
        f"{data['block_tokens']} tokens; random: mean of {data['random_seeds']} draws (points)"
    )
    title = "Loss with the neurons of one topic removed"
    return [Plot("inspect_ablation", title, f"Bars: {title}.", more, 3.4, draw, 5.8)]


def _draw_bars(axes: Axes, palette: Palette, rows: Sequence[Record]) -> None:
    """Beside each arm's rise as many random neurons', and every draw of these."""
    x, rises = range(len(rows)), [row["loss"] - row["dense_loss"] for row in rows]
    known = [row["over_dense"] or {"low": None} for row in rows]
    ends = [None if one["low"] is None else (one["low"], one["high"]) for one in known]
    own: dict[str, Any] = {"color": palette[3], "label": "these neurons", "capsize": 3}
    axes.bar(
        [at - 0.2 for at in x], rises, 0.38, yerr=whisker_lengths(rises, ends), edgecolor=INK, **own
    )
    random = [row["random_loss"] - row["dense_loss"] for row in rows]
    other: dict[str, Any] = {"color": "white", "hatch": HATCHES[1], "label": "random ones"}
    axes.bar([at + 0.2 for at in x], random, 0.38, edgecolor=INK, **other)
    for at, row in enumerate(rows):
        draws = [loss - row["dense_loss"] for loss in row["random_losses"]]
        axes.plot([at + 0.2] * len(draws), draws, "o", color=INK, markersize=3)
    axes.set_xticks(x, [ARMS[row["arm"]] for row in rows])
    axes.set_ylabel("loss over dense (nats per token)")
    axes.grid(axis="y")
    axes.axhline(0.0, color=INK, linewidth=0.8)


def _space(data: Record, small: str) -> list[Plot]:
    heads = {
        "cosine": "cosine",
        "distance": "distance",
        "norm_ratio": "norm of B over A",
        "jaccard": f"Jaccard of top {data['top_dims']} dims",
    }
    sinks, layer = data["sinks"], f"layer {data['layer']}"
    tokens = data["tokens"]
    if len(tokens) > sinks:
        tokens = tokens[sinks:]  # their extremes would hide all others
    after = f"Token by token, {layer} (the first {sinks} left out)"

    def plot(part: str, title: str, rows: Sequence[Record], xlabel: str, **more: Any) -> Plot:
        panels = [
            Panel(head, {"_": [row[key] for row in rows]}, level=1.0 if "ratio" in key else None)
            for key, head in heads.items()
        ]
        return line_plot(f"inspect_space_{part}", title, small, panels, xlabel, **more)

    middle, aside = (
        "tokens to each side of the middle",
        [str(row["half_width"]) for row in data["windows"]],
    )
    return [
        plot("layers", "Mean vectors of A and B", data["layers"], "layer"),
        plot("windows", f"Windows, {layer}", data["windows"], middle, ticks=aside),
        plot("tokens", after, tokens, "position (token)", x=[row["position"] for row in tokens]),
    ]


MAKERS: dict[str, Callable[[Record, str], list[Plot]]] = {
    "layers": _layers,
    "weights": _weights,
    "neurons": _neurons,
    "overlap": _overlap,
    "ablation": _ablation,
    "space": _space,
}
