"""What an inspection shows of each section: tables, and the columns of theirs that are drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dart_llm.reporting.figures import (
    HATCHES,
    INK,
    LOOKS,
    Palette,
    Plot,
    legend,
    log_axis,
    mark,
    whisker_lengths,
)
from dart_llm.reporting.page import flat
from dart_llm.reporting.table import Column, Record, Table, keys_of, value_columns
from dart_llm.reporting.words import percent, with_interval
from dart_llm.studies.inspection.analyses import ARMS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Panel:
    """Lines over the rows of a table, told apart by marker and line style.

    ``lines``: keys of the rows by label.  ``band``: keys of the ends around the first line.
    ``where``: what the drawn rows have in common.
    """

    ylabel: str
    lines: Mapping[str, str]
    log: bool = False
    limits: tuple[float, float] | None = None
    band: tuple[str, str] | None = None
    where: Record | None = None


@dataclass(frozen=True)
class Shown:
    """A table, and what is drawn of it over ``x`` without the first ``skip`` rows."""

    table: Table
    panels: Sequence[Panel] = ()
    x: str = "layer"
    skip: int = 0

    def plot(self, small: str) -> Plot:
        """The panels in twos."""
        table, heights = self.table, 1.1 + 2.1 * math.ceil(len(self.panels) / 2)

        def draw(figure: Figure, palette: Palette) -> None:
            columns = min(2, len(self.panels))
            grid = figure.subplots(-(-len(self.panels) // columns), columns, squeeze=False)
            for axes, panel in zip(grid.flat, self.panels, strict=False):
                self._draw(axes, palette, panel)
            for spare in grid.flat[len(self.panels) :]:
                spare.remove()

        alt = f"Lines by {self.x}: {', '.join(panel.ylabel for panel in self.panels)}."
        return Plot(f"inspect_{table.name}", table.caption, alt, small, heights, draw)

    def _draw(self, axes: Axes, palette: Palette, panel: Panel) -> None:
        wanted = (panel.where or {}).items()
        every = [row for row in self.table.rows if all(row[k] == v for k, v in wanted)]
        rows = [row for row in every if isinstance(row[self.x], int)][self.skip :]
        x = [row[self.x] for row in rows]
        for look, (label, key) in zip(LOOKS, panel.lines.items(), strict=False):
            style = {**mark(look, palette), "markersize": 4.5, "markevery": max(1, len(x) // 12)}
            if len(x) > MANY:
                style |= {"marker": "", "linewidth": 0.8}
            axes.plot(x, [row[key] for row in rows], label=label, **style)
        if panel.band is not None:
            low, high = ([row[end] for row in rows] for end in panel.band)
            axes.fill_between(x, low, high, color=palette[0], alpha=0.18, linewidth=0)
        axes.grid(axis="y")
        axes.margins(x=0.02)
        axes.set(xlabel=self.x.replace("_", " "), ylabel=panel.ylabel)
        if panel.limits is not None:
            axes.set_ylim(*panel.limits)
        axes.locator_params(axis="x", integer=True)
        if panel.log:
            log_axis(axes)
        legend(axes, 2)


MANY = 100
"""Points above which a line is thin and has no marks."""

LAYER = Column("layer", "layer")

FIGURE = ".3g"


def _by_layer(layers: Sequence[Record]) -> list[dict[str, Any]]:
    return [{"layer": number, **flat(layer)} for number, layer in enumerate(layers)]


def layers(data: Record) -> list[Shown]:
    """What each FFN does to the residual stream."""
    heads = (
        *("cos(x, x+r)", "median", "|r|/|x|", "median", "S residual"),
        *("cos(x, z)", "median", "|z-x|/|x|", "median", "S output"),
    )
    names = ("cosine.mean", "cosine.median", "change.mean", "change.median", "s")
    keys = " ".join(f"{variant}.{name}" for variant in ("residual", "output") for name in names)
    caption = f"Each FFN and the residual stream, text {data['text']} (band: 5 to 95 % of tokens)"
    columns = (LAYER, *value_columns(keys, heads, FIGURE))
    panels = [
        Panel(
            ylabel,
            {name: f"{one}.{what}.median" for one, name in variants.items()},
            log=what == "change",
            band=(f"residual.{what}.q05", f"residual.{what}.q95"),
        )
        for what, ylabel, variants in (
            ("cosine", "cosine with x", {"residual": "x + r", "output": "z"}),
            ("change", "relative change", {"residual": "|r| / |x|", "output": "|z - x| / |x|"}),
        )
    ]
    return [Shown(Table("layers", caption, columns, _by_layer(data["layers"])), panels)]


def weights(data: Record) -> list[Shown]:
    """Norms of the neurons' weights, and the activations where a text was read."""
    keys = "min q05 median q95 max mean std skewness kurtosis"
    heads = ("min", "5 %", "median", "95 %", "max", "mean", "sd", "skewness", "excess kurtosis")
    rows = [
        {"layer": number, "matrix": matrix, **norms}
        for number, layer in enumerate(data["weights"])
        for matrix, norms in layer.items()
    ]
    columns = (LAYER, Column("matrix", "matrix"), *value_columns(keys, heads, FIGURE))
    lines, band = {"median": "median", "largest": "max"}, ("q05", "q95")
    panels = [
        Panel(f"norms of {name}", lines, band=band, where={"matrix": name})
        for name in data["weights"][0]
    ]
    norms = Shown(
        Table("weights", "L2 norms of the neurons' weights (band: 5 to 95 %)", columns, rows),
        panels,
    )
    if not data["activations"]:
        return [norms]
    sizes = "absolute.median absolute.q95 absolute.max"
    shares = ("exact zeros", "|u| < 1 % of RMS", "< 10 %", "neurons with 90 % of u²")
    columns = (
        LAYER,
        *value_columns(sizes, ("median |u|", "95 %", "max"), FIGURE),
        Column("excess kurtosis", "moments.kurtosis", ".1f"),
        *value_columns("zero near.0.01 near.0.1 holds", shares, percent),
    )
    names = ("median", "95 %", "largest")
    panels = [
        Panel("|u|", dict(zip(names, sizes.split(), strict=True)), log=True),
        Panel("share of neurons", {"with 90 % of u²": "holds", "|u| < 0.1 RMS": "near.0.1"}),
    ]
    caption, rows = f"Activations u on text {data['text']}", _by_layer(data["activations"])
    return [norms, Shown(Table("activations", caption, columns, rows), panels)]


def neurons(data: Record) -> list[Shown]:
    """The strongest and weakest neurons, and how much of the scores the strongest have."""
    rows = [
        {"layer": layer["layer"], "kind": kind, "rank": rank, **neuron}
        for layer in data["layers"]
        for kind in ("strong", "weak")
        for rank, neuron in enumerate(layer[kind], 1)
    ]
    columns = (
        LAYER,
        *value_columns("kind rank neuron", ("kind", "rank", "neuron"), str),
        Column("score", "score", ".2f"),
        Column("mean u", "mean_activation", FIGURE),
        Column("writes towards", "tokens", lambda tokens: " ".join(map(repr, tokens))),
    )
    heads = ("strongest 1 %", "strongest 10 %")
    parts = (LAYER, *value_columns("0.01 0.1", heads, percent))
    about = f"by forward proxy ({data['score']})"
    shares = _by_layer([layer["concentration"] for layer in data["layers"]])
    panel = Panel("part of all scores", dict(zip(heads, ("0.01", "0.1"), strict=True)))
    return [
        Shown(Table("concentration", f"Part of all scores {about}", parts, shares), [panel]),
        Shown(Table("neurons", f"Strongest and weakest neurons {about}", columns, rows)),
    ]


def overlap(data: Record) -> list[Shown]:
    """Jaccard of the neurons that are kept for A and for B."""
    heads = {
        "jaccard": "Jaccard of A and B",
        "chance": "by chance",
        "same_text": "halves of one text",
        "across": "halves of A and B",
    }
    columns = (
        LAYER,
        *value_columns("width kept_a kept_b", ("neurons", "kept for A", "for B"), ",.0f"),
        *value_columns(" ".join(heads), [*heads.values()], FIGURE),
    )
    rows = [*data["layers"], {"layer": "mean", **data["mean"]}]
    lines = {head: key for key, head in heads.items()}
    panel = Panel("Jaccard of the kept neurons", lines, limits=(0, 1))
    caption = f"Neurons that {data['method']} keeps for A and for B"
    return [Shown(Table("overlap", caption, columns, rows), [panel])]


def space(data: Record) -> list[Shown]:
    """A beside B in the residual stream: by layer, by window, by token."""
    heads = ("cosine", "distance", "|B| / |A|", f"Jaccard of top {data['top_dims']} dimensions")
    keys = "cosine distance norm_ratio jaccard"
    measures = value_columns(keys, heads, FIGURE)
    sizes = ("tokens to each side", "of A", "of B")
    windows = value_columns("half_width tokens_a tokens_b", sizes, str)
    layer, tokens, sinks = f"layer {data['layer']}", data["tokens"], data["sinks"]
    panels = [Panel(head, {"_": key}) for key, head in zip(keys.split(), heads, strict=True)]
    skip = sinks if len(tokens) > sinks else 0  # their extremes would hide all others
    return [
        Shown(
            Table(f"space_{part}", f"A beside B: {words}", (*first, *measures), data[part]),
            panels,
            x,
            skip if part == "tokens" else 0,
        )
        for part, words, first, x in (
            ("layers", "mean vectors per layer", (LAYER,), "layer"),
            ("windows", f"windows around the middle, {layer}", windows, "half_width"),
            ("tokens", f"token by token, {layer}", (Column("position", "position"),), "position"),
        )
    ]


def _with_ends(interval: Record) -> str:
    return with_interval(interval["estimate"], interval, "+.3f")


class Bars(Shown):
    """The rises of the loss without some neurons beside those without as many random ones."""

    def plot(self, small: str) -> Plot:
        rows = [row for row in self.table.rows if row["neurons"] and row["arm"] != "a_top"]
        texts = list(dict.fromkeys(row["text"] for row in rows))

        def draw(figure: Figure, palette: Palette) -> None:
            drawn = figure.subplots(1, max(1, len(texts)), sharey=True, squeeze=False)[0]
            for axes, text in zip(drawn, texts, strict=False):
                _draw_bars(axes, palette, [row for row in rows if row["text"] == text])
                axes.set_title(f"loss on {text}", loc="left", fontsize=9, color=INK, pad=18)
                legend(axes, 2)

        more = "bars: 95 % intervals of the difference to dense; random: mean of the draws (points)"
        title = "Loss with the neurons of one topic removed"
        return Plot("inspect_ablation", title, f"Bars: {title}.", f"{small} · {more}", 3.4, draw)


def _draw_bars(axes: Axes, palette: Palette, rows: Sequence[Record]) -> None:
    x, rises = range(len(rows)), [row["loss"] - row["dense_loss"] for row in rows]
    intervals = [row["over_dense"] or {"low": None} for row in rows]
    ends = [
        None if interval["low"] is None else (interval["low"], interval["high"])
        for interval in intervals
    ]
    look: dict[str, Any] = {"color": palette[3], "label": "these neurons", "capsize": 3}
    whiskers = whisker_lengths(rises, ends)
    axes.bar([at - 0.2 for at in x], rises, 0.38, yerr=whiskers, edgecolor=INK, **look)
    random = [row["random_loss"] - row["dense_loss"] for row in rows]
    other: dict[str, Any] = {"color": "white", "hatch": HATCHES[1], "label": "random ones"}
    axes.bar([at + 0.2 for at in x], random, 0.38, edgecolor=INK, **other)
    for at, row in enumerate(rows):
        draws = [loss - row["dense_loss"] for loss in row["random_losses"]]
        axes.plot([at + 0.2] * len(draws), draws, "o", color=INK, markersize=3)
    axes.set_xticks(x, [row["removes"] for row in rows])
    axes.set_ylabel("loss over dense (nats per token)")
    axes.grid(axis="y")
    axes.axhline(0.0, color=INK, linewidth=0.8)


def ablation(data: Record) -> list[Shown]:
    """Losses with neurons removed, beside dense and beside random neurons."""
    losses = ("dense loss", "loss", "random neurons")
    columns = (
        *value_columns("removes text", ("removed neurons", "loss on"), str),
        Column("achieved sparsity", "achieved_sparsity", percent),
        Column("dense tokens", "dense_token_share", percent),
        Column("re-masks", "remasks"),
        *value_columns("dense_loss loss random_loss", losses, FIGURE),
        Column("over dense (95 %)", "over_dense", _with_ends),
        Column("over random (95 %)", "over_random", _with_ends),
    )
    caption = (
        "Loss (nats per token) with neurons removed, on the second half of each text; A's own: "
        "among A's strongest and not among B's"
    )
    rows = [{"removes": ARMS[row["arm"]], **row, **flat(row)} for row in data["rows"]]
    fields = keys_of([{"removes": "", **flat(row)} for row in data["rows"]])
    panel = Panel("loss over dense", {})
    return [Bars(Table("ablation", caption, columns, rows, fields=fields), [panel])]
