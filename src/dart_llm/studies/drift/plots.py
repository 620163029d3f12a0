"""Similarity, loss, methods, mask overlap and raster over time.

Picture: the methods compared: each quality with its interval, achieved sparsity beside it.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dart_llm.evaluation.text_metrics import NUMBERS
from dart_llm.experiments.drift_plot import _draw as draw_checks
from dart_llm.experiments.drift_plot import _kind as kind
from dart_llm.experiments.drift_plot import _stretches as stretches
from dart_llm.pruning.records import DriftCheck
from dart_llm.reporting.figures import (
    GREY,
    HATCHES,
    INK,
    MAX_PANELS,
    PATTERNS,
    SOFT,
    Drawing,
    Kit,
    Palette,
    Plot,
    legend,
    looks,
    web_looks,
)
from dart_llm.reporting.words import percent
from dart_llm.studies.drift import view as drift_around
from dart_llm.studies.drift import view as drift_masks
from dart_llm.studies.drift import view as drift_words
from dart_llm.studies.drift.losses import BIN
from dart_llm.studies.drift.view import (
    ActiveNeurons,
    DriftCell,
    DriftView,
    Estimate,
    Masks,
    MaskSpan,
    Point,
    periods,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# What the pictures of a drift study share: both ways to draw one, topics on the time axis, looks.
#
# A picture is drawn twice from the same numbers: on a matplotlib figure for paper, and as a plotly
# figure to point at.  Neither library is imported here: ``plots.py`` and ``plotly_page.py`` hand
# over figures and makers of figures.


TIME = "decoded tokens"

SHADE = "cmc.lapaz_r"

LAPAZ = (
    "#fef2f3 #eaceb9 #b3ac96 #859e9c #5b8ba3 #3c70a0 #2c5292 #23317d #1a0c64"  # even steps
).split()
"""The colour map of overlaps (cmcrameri, Crameri 2018): from light to dark, so grey reads alike."""

SHADES = [[place / (len(LAPAZ) - 1), colour] for place, colour in enumerate(LAPAZ)]

BAND = "#eef0f3"

HAZE = "#b9bec5"
"""Dense stretches of interactive figures."""

CHANGE = (0, (7, 2.5))
"""The line of a change of topic: long dashes, white between them."""


def bands(axes: Axes, cell: DriftCell, inside: bool = False) -> None:
    """Topics as light and white stretches with their names, changes as lines.

    ``inside``: names stand at the bottom of the axes, else above them.
    """
    axes.set_xlim(0, max(1, cell.decoded_tokens))
    known = [topic for topic in cell.topics if topic.start is not None]
    pixels = axes.get_window_extent().width / 9
    for place, topic in enumerate(known):
        start, end = topic.start or 0, topic.end or 0
        if inside and place % 2 == 0:
            axes.axvspan(start, end, facecolor=BAND, linewidth=0, zorder=0)
        if place:
            for colour, style, width in (("white", "-", 2.6), (INK, CHANGE, 1.5)):
                axes.axvline(start, color=colour, linestyle=style, linewidth=width, zorder=3)
        room = max(6, round(pixels * (end - start) / max(1, cell.decoded_tokens)))
        axes.annotate(
            textwrap.shorten(topic.name, room, placeholder="…"),
            ((start + end) / 2, 0.0 if inside else 1.0),
            xycoords=axes.get_xaxis_transform(),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=8.5,
            color=INK,
            zorder=5,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.8},
        )


def dense_spans(axes: Axes, periods: Sequence[MaskSpan]) -> None:
    """Hatches where all neurons live."""
    label = "dense: all neurons live"
    for period in periods:
        if period.mask is None:
            axes.axvspan(
                period.start,
                period.end,
                facecolor="white",
                edgecolor=SOFT,
                hatch="////",
                linewidth=0,
                zorder=2,
                label=label,
            )
            label = "_"


def web_bands(figure: Any, cell: DriftCell, row: int | None = None) -> None:
    """The same on a plotly figure; ``row``: of its subplots, from 1."""
    where = {} if row is None else {"row": row, "col": 1}
    known = [topic for topic in cell.topics if topic.start is not None]
    for place, topic in enumerate(known):
        if place % 2 == 0 and row is not None:
            figure.add_vrect(
                topic.start, topic.end, fillcolor=BAND, line_width=0, layer="below", **where
            )
        if place:
            figure.add_vline(topic.start, line={"color": "white", "width": 3}, **where)
            line = {"color": INK, "width": 1.6, "dash": "10px,4px"}
            figure.add_vline(topic.start, line=line, **where)
    crowded = sum(len(topic.name) for topic in known) > 40
    if row in (None, 1):
        for place, topic in enumerate(known):
            figure.add_annotation(
                text=textwrap.shorten(topic.name, 26, placeholder="…"),
                x=((topic.start or 0) + (topic.end or 0)) / 2,
                xref="x",
                y=1.0,
                yref="paper",
                yanchor="bottom",
                yshift=2 + (14 * (place % 2) if crowded else 0),
                showarrow=False,
                font={"size": 12},
            )
    figure.update_xaxes(range=[0, max(1, cell.decoded_tokens)], **where)


def web_dense(figure: Any, periods: Sequence[MaskSpan], row: int | None = None) -> None:
    """Grey stretches where all neurons live."""
    where = {} if row is None else {"row": row, "col": 1}
    for period in periods:
        if period.mask is None:
            figure.add_vrect(
                period.start,
                period.end,
                fillcolor=HAZE,
                opacity=0.7,
                line_width=0,
                layer="above" if row is None else "below",
                **where,
            )


def edges(periods: Sequence[MaskSpan]) -> list[float]:
    """Where the columns of a picture over time begin and end."""
    return [*(float(period.start) for period in periods), float(periods[-1].end)]


# Picture: the loss over dense around a change of topic, a method at a time before the others.


X = "tokens after the change of topic"

Y = "loss over dense (nats per token)"

Curves = Mapping[str, Sequence[Point]]


def make_loss(view: DriftView) -> Iterator[Drawing]:
    """One, where dense and another method were measured on the same passages (forced mode)."""
    curves = drift_around.around(view)
    if curves:
        yield _loss_drawing(view, curves)


def _loss_drawing(view: DriftView, curves: Curves) -> Drawing:
    most = max(point.n for points in curves.values() for point in points)
    fewest = min(point.n for points in curves.values() for point in points)
    n = f"{most}" if most == fewest else f"{fewest} to {most}"
    title = _title(curves)
    small = (
        f"means of {BIN}-token bins over {n} passages; bands: 95 % bootstrap intervals over "
        f"passages · {view.results.small_print}"
    )
    bare = all(point.interval is None for points in curves.values() for point in points)
    if bare:
        small = f"means of {BIN}-token bins over {n} passages, no intervals · "
        small += view.results.small_print

    def draw(figure: Figure, palette: Palette, narrow: bool) -> None:
        columns = min(len(curves), 1 if narrow else 3)
        rows = math.ceil(len(curves) / columns)
        panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        found = looks(list(curves), palette)
        for axes, label in zip(panels.flat, curves, strict=False):
            _panel(axes, label, curves, found)
        for axes in panels.flat[len(curves) :]:
            axes.axis("off")
        figure.supylabel(Y, fontsize=9.5)
        for axes in panels[-1]:
            axes.set_xlabel(X if columns < 3 else "tokens after the change")

    alt = f"Lines: {Y}, by method. {title}"
    height = 0.9 + 2.0 * math.ceil(len(curves) / 3)
    plot = Plot("loss", title, alt, small, height, draw, 0.9 + 1.7 * len(curves))
    return Drawing(plot, lambda kit: _loss_web(kit, curves), tall=500)


def _title(curves: Curves) -> str:
    told = []
    for label, points in curves.items():
        after = [point.value for point in points if point.start >= 0]
        if after:
            told.append((sum(after) / len(after), label))
    if not told:
        return "Loss over dense around the change of topic."
    best, worst = min(told), max(told)
    shown = max(point.start for points in curves.values() for point in points) + BIN
    where = f"in the {shown} tokens after a change of topic"
    if best == worst:
        return f"{best[1]} loses {best[0]:.2f} nats per token over dense {where}."
    return (
        f"Loss over dense {where}: lowest with {best[1]} ({best[0]:.2f} nats per token), highest "
        f"with {worst[1]} ({worst[0]:.2f})."
    )


def _panel(axes: Axes, label: str, curves: Curves, found: Mapping[str, Any]) -> None:
    for other, points in curves.items():
        if other != label:
            x, y = [p.middle for p in points], [p.value for p in points]
            axes.plot(x, y, color="#c3c8ce", linewidth=0.9, zorder=1)
    points = curves[label]
    x = [point.middle for point in points]
    bounded = [(p.middle, p.interval.low, p.interval.high) for p in points if p.interval]
    if bounded:
        middles, low, high = zip(*bounded, strict=True)
        axes.fill_between(
            middles, low, high, color=found[label]["color"], alpha=0.25, linewidth=0, zorder=2
        )
    axes.plot(x, [point.value for point in points], zorder=3, **{**found[label], "markersize": 4})
    axes.axvline(0, color=INK, linestyle=(0, (7, 2.5)), linewidth=1.3)
    axes.axhline(0, color=SOFT, linewidth=0.8)
    axes.set_title(label, loc="left", fontsize=9.5)
    axes.grid(axis="y")


def _loss_web(kit: Kit, curves: Curves) -> Any:
    figure, found = kit.go.Figure(), web_looks(list(curves), kit)
    for label, points in curves.items():
        bounded = [(p.middle, p.interval.low, p.interval.high) for p in points if p.interval]
        if bounded:
            x, low, high = (list(values) for values in zip(*bounded, strict=True))
            figure.add_trace(
                kit.go.Scatter(
                    x=x + x[::-1],
                    y=high + low[::-1],
                    fill="toself",
                    fillcolor=found[label]["line"]["color"],
                    opacity=0.14,
                    line={"width": 0},
                    hoverinfo="skip",
                    legendgroup=label,
                    showlegend=False,
                )
            )
        figure.add_trace(
            kit.go.Scatter(
                x=[point.middle for point in points],
                y=[point.value for point in points],
                name=label,
                legendgroup=label,
                mode="lines+markers",
                customdata=[
                    f"{drift_words.ends(p.interval) or 'no interval'}, {p.n} passages"
                    for p in points
                ],
                hovertemplate="%{y:.2f} (%{customdata})",
                **found[label],
            )
        )
    figure.add_vline(0, line={"color": INK, "width": 1.6, "dash": "10px,4px"})
    figure.add_hline(0, line={"color": SOFT, "width": 1})
    figure.add_annotation(
        x=0, y=1, xref="x", yref="paper", yanchor="bottom", text="change of topic", showarrow=False
    )
    figure.update_xaxes(title_text=X)
    figure.update_yaxes(title_text=Y)
    figure.update_layout(hovermode="x unified")
    return figure


LOSSES = (
    ("after_minus_dense", "loss after the change, over dense (nats per token)"),
    ("after", "loss after the change (nats per token)"),
)
"""The first that was measured is shown."""

METRICS = ("document_similarity", "rougeL", "bertscore", "sentence_coverage")
"""Shown of the free mode; the table has the others."""

TITLES = {number.name: number.title for number in NUMBERS}


@dataclass(frozen=True)
class Bar:
    """One method's number, and the summary's row that accounts for it."""

    label: str
    estimate: Estimate
    line: Mapping[str, Any]

    @property
    def top(self) -> float:
        """Where the bar and its whisker end."""
        return float(max(0.0, self.estimate["mean"], self.estimate["high"] or 0.0))


Panels = Mapping[str, Sequence[Bar]]


def make_methods(view: DriftView) -> Iterator[Drawing]:
    """One, with a panel per number: the loss after the change, or metrics against dense."""
    found = panels(view)
    if found:
        yield _methods_drawing(view, found)


def panels(view: DriftView) -> dict[str, list[Bar]]:
    """Bars by the words of their axis."""
    found: dict[str, list[Bar]] = {}
    for group, names in (("loss", LOSSES), ("metrics", [(name, name) for name in METRICS])):
        for name, words in names:
            title = words if group == "loss" else f"{TITLES[name]} against the dense text"
            bars = [
                Bar(str(line["label"]), line[group][name], line)
                for line in view.lines
                if line[group] and line[group].get(name)
            ]
            if bars and not (group == "loss" and found):
                found[title] = bars
    return found


def _methods_drawing(view: DriftView, found: Panels) -> Drawing:
    axis, first = next(iter(found.items()))
    kind = drift_words.MODES.get(view.mode, "source")
    bounded = any(bar.estimate["low"] is not None for bar in first)
    whiskers = "whiskers: 95 % bootstrap intervals" if bounded else "no intervals, means"
    small = f"{whiskers} over {first[0].estimate['n']} {kind}s · {view.results.small_print}"
    counts = [len(bars) for bars in found.values()]

    def draw(figure: Figure, palette: Palette, narrow: bool) -> None:
        shape = {
            "height_ratios": [count + 1.2 for count in counts],
            "width_ratios": (1.7, 1.0) if narrow else (2.4, 1.2),
        }
        drawn = figure.subplots(len(found), 2, squeeze=False, gridspec_kw=shape)
        for (quality, removed), (words, bars) in zip(drawn, found.items(), strict=True):
            _quality(quality, bars, palette)
            _removed(removed, bars, narrow)
            quality.set_xlabel(_folded(words) if narrow else words)
        drawn[-1][1].set_xlabel("achieved\nsparsity (%)" if narrow else "achieved sparsity (%)")

    listed = "; ".join(
        f"{bar.label} {bar.estimate['mean']:.3f} with {drift_words.accounted(bar.line)}"
        for bar in first
    )
    title = drift_words.conclusion(view)
    height = 0.7 + sum(0.75 + 0.36 * count for count in counts)
    plot = Plot("methods", title, f"Bars: {axis}. {listed}.", small, height, draw)
    return Drawing(plot, lambda kit: _methods_web(kit, found), tall=_tall(found))


def _tall(found: Panels) -> int:
    return 80 + sum(95 + 34 * len(bars) for bars in found.values())


def _folded(text: str) -> str:
    return text.replace(", over", ",\nover").replace(" (", "\n(").replace(" against", "\nagainst")


def _quality(axes: Axes, bars: Sequence[Bar], palette: Palette) -> None:
    colours = looks([bar.label for bar in bars], palette)
    for place, bar in enumerate(bars):
        look = {"color": colours[bar.label]["color"], "hatch": HATCHES[place % len(HATCHES)]}
        axes.barh(place, bar.estimate["mean"], 0.62, edgecolor="white", linewidth=0, **look)
        if bar.estimate["low"] is not None:
            x = [bar.estimate["low"], bar.estimate["high"]]
            for ink, extra in (("white", 2.0), (INK, 0.0)):
                style: dict[str, Any] = {"color": ink, "linewidth": 1.4 + extra, "marker": "|"}
                axes.plot(x, [place, place], markersize=7 + extra, **style)
        _write(axes, f"{bar.estimate['mean']:.2f}", bar.top, place, 8.5)
    low, high = axes.get_xlim()
    axes.set_xlim(low, high + 0.16 * (high - low))
    axes.axvline(0, color=INK, linewidth=0.9)
    axes.set_yticks(range(len(bars)), [bar.label for bar in bars])
    _rows(axes, len(bars))


def _removed(axes: Axes, bars: Sequence[Bar], narrow: bool) -> None:
    for place, bar in enumerate(bars):
        removed = bar.line["achieved_sparsity"]
        axes.barh(place, 100 * removed, 0.62, color=GREY)
        words = percent(removed)
        if not narrow:
            dense = percent(bar.line["dense_token_share"])
            words += f"\n{dense} dense, {drift_words.plural(bar.line['remasks_per_cell'])}"
        _write(axes, words, 0, place, 7.2)
    axes.set_xlim(0, 100)
    axes.set_yticks([])
    _rows(axes, len(bars))


def _write(axes: Axes, text: str, x: float, place: int, size: float) -> None:
    look: dict[str, Any] = {"xytext": (5, 0), "textcoords": "offset points", "va": "center"}
    axes.annotate(text, (x, place), fontsize=size, color=INK, in_layout=False, **look)


def _rows(axes: Axes, count: int) -> None:
    axes.set_ylim(count - 0.45, -0.55)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")


def _methods_web(kit: Kit, found: Panels) -> Any:
    figure = kit.subplots(
        rows=len(found),
        cols=2,
        column_widths=[0.66, 0.34],
        horizontal_spacing=0.04,
        vertical_spacing=min(95 / _tall(found), 0.9 / len(found)),
        row_heights=[float(len(bars)) for bars in found.values()],
    )
    for row, (words, bars) in enumerate(found.items(), start=1):
        labels = [bar.label for bar in bars]
        styles = web_looks(labels, kit)
        for place, bar in enumerate(bars):
            colour = styles[bar.label]["line"]["color"]
            trace = _web_bar(kit, bar, colour, HATCHES[place % len(HATCHES)])
            figure.add_trace(trace, row=row, col=1)
        for trace in _web_whiskers(kit, bars):
            figure.add_trace(trace, row=row, col=1)
        removed = kit.go.Bar(
            y=labels,
            x=[100 * bar.line["achieved_sparsity"] for bar in bars],
            orientation="h",
            marker={"color": GREY},
            text=[percent(bar.line["achieved_sparsity"]) for bar in bars],
            textposition="inside",
            textangle=0,
            constraintext="none",
            insidetextanchor="start",
            textfont={"color": INK},
            customdata=[drift_words.accounted(bar.line) for bar in bars],
            hovertemplate="%{y}<br>%{customdata}<extra></extra>",
            showlegend=False,
        )
        figure.add_trace(removed, row=row, col=2)
        figure.update_yaxes(autorange="reversed", row=row)
        figure.update_yaxes(showticklabels=False, row=row, col=2)
        figure.update_xaxes(title_text=_folded(words).replace("\n", "<br>"), row=row, col=1)
        figure.update_xaxes(range=[0, 100], tickvals=[0, 50, 100], row=row, col=2)
    figure.update_xaxes(title_text="achieved<br>sparsity (%)", row=len(found), col=2)
    figure.update_layout(barmode="overlay")
    return figure


def _web_bar(kit: Kit, bar: Bar, colour: str, hatch: str) -> Any:
    pattern = {"shape": PATTERNS[hatch], "fillmode": "overlay", "fgcolor": "white", "size": 7}
    return kit.go.Bar(
        y=[bar.label],
        x=[bar.estimate["mean"]],
        orientation="h",
        marker={"color": colour, "pattern": pattern},
        customdata=[
            f"{drift_words.bounds(bar.estimate)} over {bar.estimate['n']}<br>"
            f"{drift_words.accounted(bar.line)}"
        ],
        hovertemplate="%{y}: %{x:.3f} (%{customdata})<extra></extra>",
        showlegend=False,
    )


def _web_whiskers(kit: Kit, bars: Sequence[Bar]) -> Iterator[Any]:
    """White below ink, to be seen on dark bars too."""
    known = [bar for bar in bars if bar.estimate["low"] is not None]
    for colour, thick in (("white", 5), (INK, 1.8)):
        yield kit.go.Scatter(
            x=[bar.estimate["mean"] for bar in known],
            y=[bar.label for bar in known],
            mode="markers",
            marker={"size": 1, "color": colour},
            error_x={
                "type": "data",
                "array": [bar.estimate["high"] - bar.estimate["mean"] for bar in known],
                "arrayminus": [bar.estimate["mean"] - bar.estimate["low"] for bar in known],
                "color": colour,
                "thickness": thick,
                "width": 4 + thick / 2,
            },
            hoverinfo="skip",
            showlegend=False,
        )


# Picture: how much of each layer's first mask is still in force, over time.


LABEL = "Jaccard overlap with the first mask"


def make_overlap(view: DriftView) -> Iterator[Drawing]:
    """One per cell with two masks or more."""
    for cell, masks in remasked(view):
        yield _overlap_drawing(view, cell, masks)


def remasked(view: DriftView) -> Iterator[tuple[DriftCell, Masks]]:
    """Cells whose masks were rebuilt: dart's first, then those with fewer, legible re-masks."""
    found = [cell for cell in view.done if cell.masks and len(cell.remasks) > 1]
    found.sort(key=lambda cell: (cell.method != "dart", abs(len(cell.remasks) - 3)))
    for cell in found:
        masks = drift_masks.read_masks(cell)
        if masks is not None:
            yield cell, masks


def _overlap_drawing(view: DriftView, cell: DriftCell, masks: Masks) -> Drawing:
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
        plot,
        lambda kit: _overlap_web(kit, cell, masks, low, expected),
        drift_words.choice(cell),
        440,
    )


def _overlap_web(kit: Kit, cell: DriftCell, masks: Masks, low: float, expected: float) -> Any:
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


# Picture: which neurons of one layer live when.


PRUNED, LIVE = "#f1f2f4", "#114260"


def make_raster(view: DriftView) -> Iterator[Drawing]:
    """One per cell with two masks or more, of the layer whose masks moved most."""
    for cell, masks in remasked(view):
        yield _raster_drawing(view, cell, masks)


def order(live: ActiveNeurons) -> NDArray[np.intp]:
    """[width]: neurons by their pattern over the masks, those that live first on top."""
    return np.lexsort((np.arange(live.shape[1]), *(~live)[::-1]))


def _cells(live: ActiveNeurons, own: Sequence[MaskSpan]) -> NDArray[np.uint8]:
    """[width, periods]: 1 where a neuron lives, rows in ``order``; dense tokens use all."""
    everything = np.ones(live.shape[1], dtype=np.bool_)
    shown = [everything if period.mask is None else live[period.mask] for period in own]
    return np.stack(shown)[:, order(live)].T.astype(np.uint8)


def _raster_drawing(view: DriftView, cell: DriftCell, masks: Masks) -> Drawing:
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
    return Drawing(
        plot, lambda kit: _raster_web(kit, cell, live, layer), drift_words.choice(cell), 440
    )


def _raster_web(kit: Kit, cell: DriftCell, live: ActiveNeurons, layer: int) -> Any:
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


# Picture: similarity over time by method, with thresholds and re-masks, over the topics.


Cells = Sequence[DriftCell]

LOOK = ("color", "marker", "linestyle", "markersize", "markeredgecolor", "markeredgewidth")


def make_timeline(view: DriftView) -> Iterator[Drawing]:
    """One per source, those with most triggers first; a panel per method with a detector."""
    found: dict[tuple[str, int], list[DriftCell]] = {}
    for cell in view.done:
        if cell.checks:
            found.setdefault((cell.source, cell.seed), []).append(cell)
    ranked = sorted(found.values(), key=lambda own: (-len(own), -sum(map(_triggers, own))))
    for own in ranked:
        seed = f", seed {own[0].seed}" if own[0].seed else ""
        yield _timeline_drawing(view, own, f"{drift_words.place(own[0])}{seed}")


def _triggers(cell: DriftCell) -> int:
    return sum(check.trigger for check in cell.checks)


def _timeline_drawing(view: DriftView, own: Cells, choice: str) -> Drawing:
    shown = own[:MAX_PANELS]
    title = drift_words.timeline_title(shown)
    small = f"{_layers(shown)} watched · {view.results.small_print}"
    if len(own) > len(shown):
        small = f"{len(shown)} of {len(own)} methods shown · {small}"
    alt = f"Marks: cosine similarity of each window to its reference, over decoded tokens. {title}"

    def draw(figure: Figure, palette: Palette, narrow: bool) -> None:
        panels = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
        for axes, cell in zip(panels, shown, strict=True):
            draw_checks(axes, palette, cell.checks, [asdict(mask) for mask in cell.remasks])
            low, high = axes.get_ylim()
            axes.set_ylim(low - 0.2 * (high - low), high)
            axes.set_title(cell.label, loc="right", fontsize=9)
            bands(axes, cell, inside=True)
        panels[-1].set_xlabel(TIME)
        if shown[0].changes:
            panels[0].plot([], [], color=INK, linestyle=CHANGE, label="change of topic")
        _name_all(list(panels))
        legend(panels[0], 2 if narrow else 4)

    plot = Plot("similarity", title, alt, small, 1.1 + 1.9 * len(shown), draw)
    return Drawing(plot, lambda kit: _timeline_web(kit, shown), choice, 150 + 240 * len(shown))


def _name_all(panels: Sequence[Axes]) -> None:
    """What only lower panels show gets its place in the first one's legend."""
    known = set(panels[0].get_legend_handles_labels()[1])
    for axes in panels[1:]:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            if label not in known and hasattr(handle, "get_marker"):
                known.add(label)
                look = {name: getattr(handle, f"get_{name}")() for name in LOOK}
                panels[0].plot([], [], label=label, **look)


def _layers(shown: Cells) -> str:
    found = sorted({check.layer for cell in shown for check in cell.checks})
    return f"layer{'' if len(found) == 1 else 's'} {', '.join(map(str, found))}"


MARKS: dict[str, tuple[str, dict[str, Any]]] = {
    "armed": ("window", {"symbol": "circle", "size": 7}),
    "low": ("low window", {"symbol": "triangle-down", "size": 10}),
    "trigger": ("trigger", {"symbol": "star", "size": 15}),
    "held": ("held: guards put it off", {"symbol": "diamond-open", "size": 9}),
    "arming": ("arming: no threshold yet", {"symbol": "circle-open", "size": 7}),
}


def _timeline_web(kit: Kit, shown: Cells) -> Any:
    titles = [cell.label for cell in shown]
    figure = kit.subplots(
        rows=len(shown), cols=1, shared_xaxes=True, vertical_spacing=0.09 / len(shown)
    )
    named: set[str] = set()
    for row, cell in enumerate(shown, start=1):
        for trace in _traces(kit, cell, named):
            figure.add_trace(trace, row=row, col=1)
        for mask in cell.remasks:
            figure.add_vline(mask.step, line={"color": INK, "width": 1.2}, row=row, col=1)
        web_bands(figure, cell, row)
        web_dense(figure, periods(cell), row)
        title = f"{titles[row - 1]}<br>cosine similarity"
        figure.update_yaxes(title_text=title, row=row, col=1)
    figure.update_xaxes(title_text=TIME, row=len(shown), col=1)
    return figure


def _traces(kit: Kit, cell: DriftCell, named: set[str]) -> Iterator[Any]:
    """Similarity and threshold as lines broken at masks, then a mark per window."""
    lines: list[list[Any]] = [[], [], []]
    for stretch in stretches(cell.checks, [mask.step for mask in cell.remasks]):
        for check in stretch:
            for line, value in zip(
                lines, (check.step, check.similarity, check.threshold), strict=True
            ):
                line.append(value)
        for line in lines:
            line.append(None)
    x, similarity, threshold = lines
    yield kit.go.Scatter(
        x=x, y=similarity, mode="lines", line={"color": SOFT, "width": 1}, showlegend=False,
        hoverinfo="skip",
    )  # fmt: skip
    dashed = {"color": kit.colours[2], "width": 2, "dash": "6px,3px"}
    yield _legended(kit, named, "threshold", x=x, y=threshold, mode="lines", line=dashed)
    for name, (label, marker) in MARKS.items():
        points = [check for check in cell.checks if kind(check) == name]
        if points:
            colour = kit.colours[4 if name in ("low", "trigger") else 0]
            yield _legended(
                kit,
                named,
                label,
                x=[check.step for check in points],
                y=[check.similarity for check in points],
                mode="markers",
                marker={**marker, "color": colour, "line": {"color": INK, "width": 0.9}},
                customdata=[_told(check) for check in points],
                hovertemplate="token %{x}: %{y:.3f}<br>%{customdata}",
            )
    yield _legended(
        kit,
        named,
        "mask built",
        x=[mask.step for mask in cell.remasks],
        y=[max(check.similarity for check in cell.checks)] * len(cell.remasks),
        mode="markers",
        marker={"symbol": "line-ns-open", "size": 12, "color": INK},
        customdata=[f"{m.cause}, from {m.evidence_tokens:.0f} tokens" for m in cell.remasks],
        hovertemplate="mask of token %{x}<br>%{customdata}",
    )  # fmt: skip


def _told(check: DriftCheck) -> str:
    limit = "no threshold yet" if check.threshold is None else f"threshold {check.threshold:.3f}"
    return f"{limit}, counter {check.counter}"


def _legended(kit: Kit, named: set[str], label: str, **data: Any) -> Any:
    """A trace that stands in the legend once."""
    first = label not in named
    named.add(label)
    return kit.go.Scatter(name=label, legendgroup=label, showlegend=first, **data)
