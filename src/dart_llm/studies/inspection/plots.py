"""Plots of an inspection: layer impact, distributions, concentration, overlap, ablation, space."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
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
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


Record = Mapping[str, Any]

Line = tuple[str, Sequence[float]]

MANY = 100
"""Points above which a line is thin and has no marks."""

HEAT = "cmc.oslo_r"
"""Colour map of counts: white for none, and darker with every step, in grey too."""

ARMS = {"a_only": "A's own", "b_only": "B's own"}
"""What is drawn; A's strongest neurons, whose loss dwarfs these, stand in the table."""


def make(document: Record, small: str) -> list[Plot]:
    """Every plot that inspect.json allows; ``small``: the checkpoint in one line."""
    sections, told = document["sections"], document["sentences"]
    found: list[Plot] = []
    for name, maker in MAKERS.items():
        if name in sections:
            found += maker(sections[name], told[name], small)
    return found


def panels(figure: Figure, count: int, narrow: bool) -> list[Axes]:
    """Side by side in twos; below each other where the figure is narrow."""
    columns = 1 if narrow else min(2, count)
    found = list(figure.subplots(-(-count // columns), columns, squeeze=False).flat)
    for spare in found[count:]:
        spare.remove()
    return found[:count]


def log_axis(axes: Axes) -> None:
    """A log axis whose decades are written as plain numbers."""
    axes.set_yscale("log")
    low, high = (math.log10(end) for end in axes.get_ylim())
    ticks = [10.0**power for power in range(math.ceil(low), math.floor(high) + 1)]
    if len(ticks) < 2:
        ticks = [10.0**low, 10.0**high]
    axes.set_yticks(ticks, [f"{tick:,.0f}" if tick >= 10 else f"{tick:.3g}" for tick in ticks])
    axes.set_yticks([], minor=True)


def lines(axes: Axes, palette: Palette, x: Sequence[float], drawn: Sequence[Line]) -> None:
    """One line per entry, told apart by marker and line style; few marks where many points are."""
    every = max(1, len(x) // 12)
    for place, (label, values) in enumerate(drawn):
        look = {**mark(LOOKS[place], palette), "markersize": 4.5, "markevery": every}
        if len(x) > MANY:
            look |= {"marker": "", "linewidth": 0.8}
        axes.plot(x, values, label=label, **look)
    axes.grid(axis="y")
    axes.margins(x=0.02)


def by_layer(axes: Axes, palette: Palette, drawn: Sequence[Line], ylabel: str) -> None:
    """``lines`` over the layers."""
    lines(axes, palette, range(len(drawn[0][1])), drawn)
    axes.set(xlabel="layer", ylabel=ylabel)
    axes.locator_params(axis="x", integer=True)
    legend(axes, 2)


def _layers(data: Record, words: str, small: str) -> list[Plot]:
    layers = data["layers"]

    def draw(figure: Figure, palette: Palette, narrow: bool) -> None:
        parts = (
            ("cosine", "cosine with the stream before", ("x + r", "z")),
            ("change", "relative change", ("r: |r| / |x|", "z: |z - x| / |x|")),
        )
        for axes, (what, ylabel, names) in zip(panels(figure, 2, narrow), parts, strict=True):
            found = [
                [layer[variant][what] for layer in layers] for variant in ("residual", "output")
            ]
            drawn = [
                (name, [one["median"] for one in own])
                for name, own in zip(names, found, strict=True)
            ]
            by_layer(axes, palette, drawn, ylabel)
            low, high = ([one[end] for one in found[0]] for end in ("q05", "q95"))
            look: dict[str, Any] = {"color": palette[0], "alpha": 0.18, "linewidth": 0}
            axes.fill_between(range(len(layers)), low, high, **look)
            if what == "change":
                log_axis(axes)

    more = f"{small} · lines: medians over the tokens of text {data['text']}; band: 5 to 95 % (r)"
    alt = f"Lines: the FFNs' effect on the residual stream by layer. {words}"
    return [Plot("inspect_layers", words, alt, more, 3.4, draw, 5.6)]


def _weights(data: Record, words: str, small: str) -> list[Plot]:
    ranges, layers = data["weights"]["range"], data["weights"]["layers"]

    def draw(figure: Figure, palette: Palette, narrow: bool) -> None:
        drawn = panels(figure, len(ranges), narrow)
        for axes, (matrix, ends) in zip(drawn, ranges.items(), strict=True):
            counts = [layer[matrix]["histogram"] for layer in layers]
            shares = [[100 * n / max(1, sum(one)) for n in one] for one in counts]
            heat = axes.imshow(
                list(zip(*shares, strict=True)),
                origin="lower",
                aspect="auto",
                cmap=HEAT,
                extent=(-0.5, len(layers) - 0.5, *ends),
            )
            bar = figure.colorbar(heat, ax=axes, pad=0.02)
            bar.set_label("neurons (%)")
            medians = [layer[matrix]["median"] for layer in layers]
            for colour, width in (("white", 3.2), (INK, 1.4)):
                axes.plot(range(len(layers)), medians, color=colour, linewidth=width)
            axes.set(xlabel="layer", ylabel=f"norm of a neuron's {matrix} weights")
            axes.locator_params(axis="x", integer=True)

    rows = -(-len(ranges) // 2)
    more = (
        f"{small} · shading: neurons of a layer in each of 40 bins (ends: and beyond); line: median"
    )
    alt = f"Heat maps: norms of the neurons' weights by layer. {words}"
    height = 0.6 + 2.6 * rows
    found = [Plot("inspect_weights", words, alt, more, height, draw, 0.6 + 2.4 * len(ranges))]
    return found + (_activations(data, small) if data["activations"] else [])


def _activations(data: Record, small: str) -> list[Plot]:
    layers = data["activations"]
    words = f"Activations u of the neurons on text {data['text']}"

    def draw(figure: Figure, palette: Palette, narrow: bool) -> None:
        left, right = panels(figure, 2, narrow)
        names = {"median": "median", "q95": "95 %", "max": "largest"}
        drawn = [(n, [one["absolute"][key] for one in layers]) for key, n in names.items()]
        by_layer(left, palette, drawn, "|u|")
        log_axis(left)
        shares = [
            ("hold 90 % of u²", [100 * one["holds"] for one in layers]),
            ("|u| < 0.1 RMS", [100 * one["near"]["0.1"] for one in layers]),
        ]
        by_layer(right, palette, shares, "share of neurons (%)")
        right.set_ylim(0, 100)

    alt = f"Lines: {words} by layer: quantiles of |u|, and how sparse it is."
    return [Plot("inspect_activations", words, alt, small, 3.4, draw, 5.6)]


def _neurons(data: Record, words: str, small: str) -> list[Plot]:
    def draw(figure: Figure, palette: Palette, narrow: bool) -> None:
        drawn = [
            (f"strongest {name}", [100 * layer["concentration"][key] for layer in data["layers"]])
            for key, name in (("0.01", "1 %"), ("0.1", "10 %"))
        ]
        by_layer(figure.subplots(), palette, drawn, "part of all scores (%)")

    more = f"{small} · forward proxy: {data['score']}"
    return [Plot("inspect_neurons", words, f"Lines by layer. {words}", more, 3.0, draw)]


def _overlap(data: Record, words: str, small: str) -> list[Plot]:
    names = {
        "jaccard": "A and B",
        "same_text": "halves of one text",
        "across": "halves of A and B",
        "chance": "by chance",
    }

    def draw(figure: Figure, palette: Palette, narrow: bool) -> None:
        drawn = [(name, [layer[key] for layer in data["layers"]]) for key, name in names.items()]
        axes = figure.subplots()
        by_layer(axes, palette, drawn, "Jaccard of the kept neurons")
        axes.set_ylim(0, 1)

    more = f"{small} · method {data['method']}"
    return [Plot("inspect_overlap", words, f"Lines by layer. {words}", more, 3.4, draw)]


def _ablation(data: Record, words: str, small: str) -> list[Plot]:
    rows = [row for row in data["rows"] if row["neurons"] and row["arm"] in ARMS]
    if not rows:
        return []

    def draw(figure: Figure, palette: Palette, narrow: bool) -> None:
        labels = list(dict.fromkeys(row["text"] for row in rows))
        drawn = panels(figure, len(labels), narrow)
        for axes, label in zip(drawn, labels, strict=True):
            _bars(axes, palette, [row for row in rows if row["text"] == label])
            axes.set_title(f"loss on {label}", loc="left", fontsize=9, color=INK, pad=18)
            legend(axes, 2)
        low, high = zip(*(axes.get_ylim() for axes in drawn), strict=True)
        for axes in drawn:
            axes.set_ylim(min(low), max(high))

    more = (
        f"{small} · bars: 95 % bootstrap intervals of the difference to dense, paired by blocks of "
        f"{data['block_tokens']} tokens; random: mean of {data['random_seeds']} draws (points)"
    )
    return [Plot("inspect_ablation", words, f"Bars. {words}", more, 3.4, draw, 5.8)]


def _bars(axes: Axes, palette: Palette, rows: Sequence[Record]) -> None:
    for place, row in enumerate(rows):
        dense, found = row["dense_loss"], row["over_dense"]
        rise = row["loss"] - dense
        ends = [[0.0], [0.0]] if found is None else [[rise - found["low"]], [found["high"] - rise]]
        first = place == 0
        axes.bar(
            place - 0.2,
            rise,
            0.38,
            yerr=[[max(0.0, end[0])] for end in ends],
            capsize=3,
            color=palette[3],
            edgecolor=INK,
            label="these neurons" if first else "_",
        )
        axes.bar(
            place + 0.2,
            row["random_loss"] - dense,
            0.38,
            color="white",
            edgecolor=INK,
            hatch=HATCHES[1],
            label="random ones" if first else "_",
        )
        draws = [loss - dense for loss in row["random_losses"]]
        axes.plot([place + 0.2] * len(draws), draws, "o", color=INK, markersize=3)
    axes.set_xticks(range(len(rows)), [ARMS[row["arm"]] for row in rows])
    axes.set_ylabel("loss over dense (nats per token)")
    axes.grid(axis="y")
    axes.axhline(0.0, color=INK, linewidth=0.8)


def _space(data: Record, words: str, small: str) -> list[Plot]:
    layer = f"layer {data['layer']}"
    views = (
        ("layers", "layer", "layer", words),
        ("windows", "half_width", "tokens to each side of the middle", f"Windows, {layer}"),
        (
            "tokens",
            "position",
            "position (token)",
            f"Token by token, {layer} (the first {data['sinks']} left out)",
        ),
    )
    heads = {
        "cosine": "cosine",
        "distance": "distance",
        "norm_ratio": "norm of B over A",
        "jaccard": f"Jaccard of top {data['top_dims']} dims",
    }

    def plot(part: str, key: str, xlabel: str, title: str) -> Plot:
        rows = data[part]
        if part == "tokens" and len(rows) > data["sinks"]:
            rows = rows[data["sinks"] :]  # their extremes would hide all others

        def draw(figure: Figure, palette: Palette, narrow: bool) -> None:
            for axes, (measure, head) in zip(panels(figure, 4, narrow), heads.items(), strict=True):
                x = [float(row[key]) for row in rows] if part != "windows" else range(len(rows))
                lines(axes, palette, x, [("_", [row[measure] for row in rows])])
                axes.set(xlabel=xlabel, ylabel=head)
                if measure == "norm_ratio":
                    reference_line(axes, y=1.0, label="_")
                if part == "windows":
                    step = 2 if narrow else 1
                    labels = [str(row[key]) for row in rows]
                    axes.set_xticks(range(0, len(rows), step), labels[::step])

        alt = f"Lines: cosine, distance, norm ratio and top dimensions of A and B by {xlabel}."
        return Plot(f"inspect_space_{part}", title, alt, small, 4.4, draw, 8.0)

    return [plot(*view) for view in views if data[view[0]]]


MAKERS: dict[str, Callable[[Record, str, str], list[Plot]]] = {
    "layers": _layers,
    "weights": _weights,
    "neurons": _neurons,
    "overlap": _overlap,
    "ablation": _ablation,
    "space": _space,
}
