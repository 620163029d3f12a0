"""The pictures of a drift study: methods compared, loss, similarity, mask overlap and raster.

matplotlib draws every picture on paper; of those over time where pointing helps (similarity,
raster) plotly makes a figure too.  Neither library is imported here: ``reporting/figures.py`` hands
over figures and makers of figures.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dart_llm.evaluation.text_metrics import NUMBERS
from dart_llm.experiments.drift_plot import draw_checks, stretches, window_kind, worth_drawing
from dart_llm.pruning.records import DriftCheck
from dart_llm.reporting.figures import (
    GREY,
    HATCHES,
    INK,
    MAX_PANELS,
    SOFT,
    Drawing,
    Kit,
    Palette,
    Plot,
    draw_whisker,
    legend,
    looks,
    name_bars,
    write_beside,
)
from dart_llm.reporting.table import grouped
from dart_llm.reporting.words import intervals_over, percent
from dart_llm.studies.drift.record import BIN
from dart_llm.studies.drift.view import (
    MODES,
    ActiveNeurons,
    DriftCell,
    DriftView,
    Masks,
    MaskSpan,
    Point,
    accounted,
    around,
    cell_name,
    chance,
    moved,
    overlap,
    periods,
    plural,
    read_masks,
    source_name,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TIME = "decoded tokens"
BAND = "#eef0f3"

HAZE = "#b9bec5"
"""Dense stretches of interactive figures."""

CHANGE = (0, (7, 2.5))
"""The line of a change of topic: long dashes, white between them."""

# Topics and dense stretches on an axis of time.


def bands(axes: Axes, cell: DriftCell, inside: bool = False) -> None:
    """Topics as light and white stretches with their names, changes as lines.

    ``inside``: names stand at the bottom of the axes, else above them.
    """
    axes.set_xlim(0, max(1, cell.decoded_tokens))
    pixels = axes.get_window_extent().width / 9
    for place, (name, start, end) in enumerate(cell.placed_topics):
        if inside and place % 2 == 0:
            axes.axvspan(start, end, facecolor=BAND, linewidth=0, zorder=0)
        if place:
            for colour, style, width in (("white", "-", 2.6), (INK, CHANGE, 1.5)):
                axes.axvline(start, color=colour, linestyle=style, linewidth=width, zorder=3)
        room = max(6, round(pixels * (end - start) / max(1, cell.decoded_tokens)))
        axes.annotate(
            textwrap.shorten(name, room, placeholder="…"),
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


def edges(spans: Sequence[MaskSpan]) -> list[float]:
    """Where the columns of a picture over time begin and end."""
    return [*(float(span.start) for span in spans), float(spans[-1].end)]


def _over_time(axes: Axes, cell: DriftCell, rows: Any, values: Any, **look: Any) -> Any:
    """A mesh of ``values`` [rows, spans]: hatches where all neurons live, lines at masks."""
    spans = periods(cell)
    mesh = axes.pcolormesh(edges(spans), rows, values, rasterized=True, **look)
    dense = [span for span in spans if span.mask is None]
    for place, span in enumerate(dense):
        axes.axvspan(
            span.start,
            span.end,
            facecolor="white",
            edgecolor=SOFT,
            hatch="////",
            linewidth=0,
            zorder=2,
            label="_" if place else "dense: all neurons live",
        )
    for mask in cell.remasks:
        axes.axvline(mask.step, color="white", linewidth=1.1, zorder=2)
    bands(axes, cell)
    axes.set_xlabel(TIME)
    if dense:
        axes.legend(loc="lower left", fontsize=8, frameon=True, framealpha=1)
    return mesh


def web_time(figure: Any, cell: DriftCell, row: int | None = None) -> None:
    """Topics and grey dense stretches on a plotly figure; ``row``: of its subplots, from 1."""
    where = {} if row is None else {"row": row, "col": 1}
    crowded = sum(len(name) for name, _, _ in cell.placed_topics) > 40
    for place, (name, start, end) in enumerate(cell.placed_topics):
        if place % 2 == 0 and row is not None:
            figure.add_vrect(start, end, fillcolor=BAND, line_width=0, layer="below", **where)
        if place:
            for colour, width, dash in (("white", 3, "solid"), (INK, 1.6, "10px,4px")):
                line = {"color": colour, "width": width, "dash": dash}
                figure.add_vline(start, line=line, **where)
        if row in (None, 1):
            figure.add_annotation(
                text=textwrap.shorten(name, 26, placeholder="…"),
                x=(start + end) / 2,
                xref="x",
                y=1.0,
                yref="paper",
                yanchor="bottom",
                yshift=2 + (14 * (place % 2) if crowded else 0),
                showarrow=False,
                font={"size": 12},
            )
    layer = "above" if row is None else "below"
    for span in periods(cell):
        if span.mask is None:
            look = {"fillcolor": HAZE, "opacity": 0.7, "line_width": 0, "layer": layer}
            figure.add_vrect(span.start, span.end, **look, **where)
    figure.update_xaxes(range=[0, max(1, cell.decoded_tokens)], **where)


def web_keys(kit: Kit, figure: Any, colours: Mapping[str, str]) -> None:
    """Squares in the legend: points that are nowhere, for what has no legend of its own."""
    for word, colour in colours.items():
        marker = {"symbol": "square", "size": 11, "color": colour, "line_width": 1}
        figure.add_trace(
            kit.go.Scatter(x=[None], y=[None], mode="markers", name=word, marker=marker)
        )


# The loss over dense around a change of topic, a method at a time before the others.

Curves = Mapping[str, Sequence[Point]]

EXCESS = "loss over dense (nats per token)"


def make_loss(view: DriftView) -> Drawing | None:
    """Where dense and another method were measured on the same passages (forced mode)."""
    curves = around(view)
    if not curves:
        return None
    most = max(point.n for points in curves.values() for point in points)
    small = f"means of {BIN}-token bins; {intervals_over('bands', most, 'passages')}"

    def draw(figure: Figure, palette: Palette, narrow: bool) -> None:
        columns = min(len(curves), 1 if narrow else 3)
        rows = math.ceil(len(curves) / columns)
        panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for axes, label in zip(panels.flat, curves, strict=False):
            _loss_panel(axes, label, curves, looks(list(curves), palette)[label])
        for axes in panels.flat[len(curves) :]:
            axes.axis("off")
        figure.supylabel(EXCESS, fontsize=9.5)
        for axes in panels[-1]:
            axes.set_xlabel("tokens after the change" + (" of topic" if columns < 3 else ""))

    title = "Loss over dense around the change of topic, by method"
    alt = f"Lines: {EXCESS} over tokens after the change, by method."
    height = 0.9 + 2.0 * math.ceil(len(curves) / 3)
    tall = 0.9 + 1.7 * len(curves)
    return Drawing(Plot("loss", title, alt, view.noted(small), height, draw, tall))


def _loss_panel(axes: Axes, label: str, curves: Curves, look: Mapping[str, Any]) -> None:
    for other, points in curves.items():
        x, y = [point.middle for point in points], [point.value for point in points]
        if other == label:
            axes.plot(x, y, zorder=3, **{**look, "markersize": 4})
        else:
            axes.plot(x, y, color=GREY, linewidth=0.9, zorder=1)
    bounded = [
        (p.middle, *p.interval.ends) for p in curves[label] if p.interval and p.interval.ends
    ]
    if bounded:
        middles, low, high = zip(*bounded, strict=True)
        axes.fill_between(
            middles, low, high, color=look["color"], alpha=0.25, linewidth=0, zorder=2
        )
    axes.axvline(0, color=INK, linestyle=CHANGE, linewidth=1.3)
    axes.axhline(0, color=SOFT, linewidth=0.8)
    axes.set_title(label, loc="left", fontsize=9.5)
    axes.grid(axis="y")


# The methods compared: each quality with its interval, achieved sparsity beside it.

LOSSES = (
    ("after_minus_dense", "loss after the change, over dense (nats per token)"),
    ("after", "loss after the change (nats per token)"),
)
"""The first that was measured is shown."""

METRICS = ("document_similarity", "rougeL", "bertscore", "sentence_coverage")
"""Shown of the free mode; the table has the others."""

TITLES = {number.name: f"{number.title} against the dense text" for number in NUMBERS}

Bars = list[tuple[Mapping[str, Any], Mapping[str, Any]]]
"""The summary's row of each method, and its estimate of one number."""


def make_methods(view: DriftView) -> Drawing | None:
    """A panel per number: the loss after the change, or metrics against dense."""
    panels = quality_panels(view)
    if not panels:
        return None
    axis, first = next(iter(panels.items()))
    counts = [len(bars) for bars in panels.values()]

    def draw(figure: Figure, palette: Palette, narrow: bool) -> None:
        shape = {
            "height_ratios": [count + 1.2 for count in counts],
            "width_ratios": (1.7, 1.0) if narrow else (2.4, 1.2),
        }
        rows = figure.subplots(len(panels), 2, squeeze=False, gridspec_kw=shape)
        for (quality, removed), (words, bars) in zip(rows, panels.items(), strict=True):
            _draw_quality(quality, bars, palette)
            _draw_removed(removed, [line for line, _ in bars], narrow)
            quality.set_xlabel(textwrap.fill(words, 28) if narrow else words)
        rows[-1][1].set_xlabel("achieved\nsparsity (%)" if narrow else "achieved sparsity (%)")

    listed = "; ".join(
        f"{line['label']} {estimate['mean']:.3f} with {accounted(line)}" for line, estimate in first
    )
    title = "Quality of each method, beside what it removed"
    small = intervals_over("whiskers", first[0][1]["n"], f"{MODES[view.mode]}s")
    height = 0.7 + sum(0.75 + 0.36 * count for count in counts)
    alt = f"Bars: {axis}. {listed}."
    return Drawing(Plot("methods", title, alt, view.noted(small), height, draw))


def quality_panels(view: DriftView) -> dict[str, Bars]:
    """Bars by the words of their axis."""

    def bars(group: str, name: str) -> Bars:
        return [(line, line[group][name]) for line in view.lines if (line[group] or {}).get(name)]

    for name, words in LOSSES:
        if bars("loss", name):
            return {words: bars("loss", name)}
    metrics = {TITLES[name]: bars("metrics", name) for name in METRICS}
    return {words: shown for words, shown in metrics.items() if shown}


def _draw_quality(axes: Axes, bars: Bars, palette: Palette) -> None:
    labels = [str(line["label"]) for line, _ in bars]
    colours = looks(labels, palette)
    for place, (label, (_, estimate)) in enumerate(zip(labels, bars, strict=True)):
        mean, low, high = (estimate[name] for name in ("mean", "low", "high"))
        look = {"color": colours[label]["color"], "hatch": HATCHES[place % len(HATCHES)]}
        axes.barh(place, mean, 0.62, edgecolor="white", linewidth=0, **look)
        if low is not None:
            draw_whisker(axes, low, high, place)
        write_beside(axes, f"{mean:.2f}", max(0.0, mean, high or 0.0), place, 8.5)
    low, high = axes.get_xlim()
    axes.set_xlim(low, high + 0.16 * (high - low))
    axes.axvline(0, color=INK, linewidth=0.9)
    name_bars(axes, labels)


def _draw_removed(axes: Axes, lines: Sequence[Mapping[str, Any]], narrow: bool) -> None:
    for place, line in enumerate(lines):
        removed = line["achieved_sparsity"]
        axes.barh(place, 100 * removed, 0.62, color=GREY)
        words = percent(removed)
        if not narrow:
            dense = percent(line["dense_token_share"])
            words += f"\n{dense} dense, {plural(line['remasks_per_cell'])}"
        write_beside(axes, words, 0, place, 7.2)
    axes.set_xlim(0, 100)
    name_bars(axes, [""] * len(lines))


# How much of each layer's first mask is still in force, over time.

OVERLAP = "Jaccard overlap with the first mask"


def remasked(view: DriftView) -> Iterator[tuple[DriftCell, Masks]]:
    """Cells whose masks were rebuilt: dart's first, then those with fewer, legible re-masks."""
    cells = [cell for cell in view.done if cell.masks and len(cell.remasks) > 1]
    cells.sort(key=lambda cell: (cell.method != "dart", abs(len(cell.remasks) - 3)))
    for cell in cells:
        masks = read_masks(cell)
        if masks is not None:
            yield cell, masks


def make_overlap(view: DriftView, cell: DriftCell, masks: Masks) -> Drawing:
    values, expected = overlap(masks), chance(masks)
    low = min(0.9, np.floor(10 * min(expected, float(values.min()))) / 10)
    last = float(values[:, -1].mean())

    def draw(figure: Figure, palette: Palette, narrow: bool) -> None:
        axes = figure.subplots()
        columns = [span.mask or 0 for span in periods(cell)]
        rows = np.arange(len(masks.live) + 1) - 0.5
        shades = {"cmap": "cmc.lapaz_r", "vmin": low, "vmax": 1}
        mesh = _over_time(axes, cell, rows, values[:, columns], **shades)
        bar = figure.colorbar(mesh, ax=axes, label=OVERLAP, pad=0.02)
        bar.ax.axhline(expected, color="white", linewidth=3.0)
        bar.ax.axhline(expected, color=INK, linewidth=1.4)
        near = [tick for tick in np.arange(low, 1.01, 0.2) if abs(tick - expected) > 0.05]
        bar.set_ticks([*near, expected], labels=[*(f"{t:.1f}" for t in near), "chance"])
        axes.set_ylabel("layer")
        axes.locator_params(axis="y", integer=True)

    ends = f"mean over layers at the end {last:.2f}, of independent masks {expected:.2f}"
    small = f"Jaccard: neurons in both masks over neurons in either · {ends}"
    title = f"{cell_name(cell)}: overlap of the masks with the first ones, by layer"
    alt = f"Heat map: {OVERLAP}, by layer and decoded token; {ends}."
    return Drawing(Plot("overlap", title, alt, view.noted(small), 3.9, draw))


# Which neurons of one layer live when.

PRUNED, LIVE = "#f1f2f4", "#114260"


def order(live: ActiveNeurons) -> NDArray[np.intp]:
    """[width]: neurons by their pattern over the masks, those that live first on top."""
    return np.lexsort((np.arange(live.shape[1]), *(~live)[::-1]))


def raster(live: ActiveNeurons, spans: Sequence[MaskSpan]) -> NDArray[np.uint8]:
    """[width, spans]: 1 where a neuron lives, rows in ``order``; dense tokens use all."""
    everything = np.ones(live.shape[1], dtype=np.bool_)
    shown = [everything if span.mask is None else live[span.mask] for span in spans]
    return np.stack(shown)[:, order(live)].T.astype(np.uint8)


def make_raster(view: DriftView, cell: DriftCell, masks: Masks) -> Drawing:
    """Of the layer whose masks moved most."""
    layer = moved(masks)
    live = masks.live[layer]
    width = live.shape[1]
    always, never = percent(live.all(0).mean(), 0), percent((~live).all(0).mean(), 0)

    def draw(figure: Figure, palette: Palette, narrow: bool) -> None:
        axes, rows = figure.subplots(), np.arange(width + 1)
        shades = {"cmap": "Greys", "vmin": -0.06, "vmax": 1.15}
        _over_time(axes, cell, rows, raster(live, periods(cell)), **shades)
        axes.set_ylim(width, 0)
        axes.set_ylabel(f"neurons of layer {layer}, sorted")

    shares = f"{always} of {width:,} neurons live under every mask, {never} under none"
    words = "dark: live, light: pruned · the layer whose masks moved most"
    title = f"{cell_name(cell)}: the neurons of layer {layer} that live"
    alt = f"Raster: the neurons of layer {layer} that live, over decoded tokens; {shares}."
    plot = Plot("neurons", title, alt, view.noted(f"{words} · {shares}"), 3.9, draw)
    return Drawing(plot, lambda kit: _web_raster(kit, cell, live, layer), cell_name(cell), 440)


def _web_raster(kit: Kit, cell: DriftCell, live: ActiveNeurons, layer: int) -> Any:
    spans, width = periods(cell), live.shape[1]
    heat = kit.go.Heatmap(
        x=edges(spans),
        y=np.arange(width + 1),
        z=raster(live, spans),
        customdata=np.repeat(order(live).astype(np.uint16)[:, None], len(spans), axis=1),
        zmin=0,
        zmax=1,
        showscale=False,
        colorscale=[[0, PRUNED], [1, LIVE]],
        hovertemplate="neuron %{customdata}, token %{x:.0f}: live %{z}<extra></extra>",
    )
    figure = kit.go.Figure(heat)
    web_keys(kit, figure, {"live": LIVE, "pruned": PRUNED, "dense: all live": HAZE})
    web_time(figure, cell)
    figure.update_xaxes(title_text=TIME)
    figure.update_yaxes(title_text=f"neurons of layer {layer}, sorted", range=[width, 0])
    return figure


# Similarity over time by method, with thresholds and re-masks, over the topics.

Cells = Sequence[DriftCell]


def make_timeline(view: DriftView) -> Iterator[Drawing]:
    """One per source, those with most triggers first; a panel per method with a detector.

    Texts with few windows, and detectors that never armed, are left out.
    """
    checked = (cell for cell in view.done if worth_drawing(cell.checks))
    groups = grouped(checked, lambda cell: (cell.source, cell.seed))

    def rank(cells: Cells) -> tuple[int, int]:
        return -len(cells), -sum(check.trigger for cell in cells for check in cell.checks)

    return (_timeline(view, cells) for cells in sorted(groups.values(), key=rank))


def _timeline(view: DriftView, cells: Cells) -> Drawing:
    shown = cells[:MAX_PANELS]
    layers = sorted({check.layer for cell in shown for check in cell.checks})
    small = f"layer{'s'[: len(layers) > 1]} {', '.join(map(str, layers))} watched"
    if len(cells) > len(shown):
        small = f"{len(shown)} of {len(cells)} methods shown · {small}"

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
        legend(panels[0], 2 if narrow else 4, list(panels[1:]))

    built = ", ".join(f"{cell.label} {plural(cell.rebuilt)}" for cell in shown)
    title = f"Similarity to the reference on {source_name(cells[0])}"
    alt = f"Marks: cosine similarity of each window to its reference, over decoded tokens; {built}."
    plot = Plot("similarity", title, alt, view.noted(small), 1.1 + 1.9 * len(shown), draw)
    choice = source_name(cells[0]) + (f", seed {cells[0].seed}" if cells[0].seed else "")
    return Drawing(plot, lambda kit: _web_timeline(kit, shown), choice, 150 + 240 * len(shown))


MARKS: dict[str, tuple[str, dict[str, Any]]] = {
    "armed": ("window", {"symbol": "circle", "size": 7}),
    "low": ("low window", {"symbol": "triangle-down", "size": 10}),
    "trigger": ("trigger", {"symbol": "star", "size": 15}),
    "held": ("held: guards put it off", {"symbol": "diamond-open", "size": 9}),
    "arming": ("arming: no threshold yet", {"symbol": "circle-open", "size": 7}),
}


def _web_timeline(kit: Kit, shown: Cells) -> Any:
    spacing = 0.09 / len(shown)
    figure = kit.subplots(rows=len(shown), cols=1, shared_xaxes=True, vertical_spacing=spacing)
    named: set[str] = set()

    def scatter(label: str, **data: Any) -> Any:
        """A trace that stands in the legend once."""
        first = label not in named
        named.add(label)
        return kit.go.Scatter(name=label, legendgroup=label, showlegend=first, **data)

    for row, cell in enumerate(shown, start=1):
        for trace in _traces(kit, cell, scatter):
            figure.add_trace(trace, row=row, col=1)
        for mask in cell.remasks:
            figure.add_vline(mask.step, line={"color": INK, "width": 1.2}, row=row, col=1)
        web_time(figure, cell, row)
        figure.update_yaxes(title_text=f"{cell.label}<br>cosine similarity", row=row, col=1)
    figure.update_xaxes(title_text=TIME, row=len(shown), col=1)
    return figure


def _traces(kit: Kit, cell: DriftCell, scatter: Callable[..., Any]) -> Iterator[Any]:
    """Similarity and threshold as lines broken at masks, then a mark per window and mask."""
    points: list[tuple[Any, Any, Any]] = []
    for stretch in stretches(cell.checks, [mask.step for mask in cell.remasks]):
        points += [(c.step, c.similarity, c.threshold) for c in stretch] + [(None, None, None)]
    x, similarity, threshold = (list(values) for values in zip(*points, strict=True))
    thin = {"color": SOFT, "width": 1}
    yield kit.go.Scatter(
        x=x, y=similarity, mode="lines", line=thin, showlegend=False, hoverinfo="skip"
    )
    dashed = {"color": kit.colours[2], "width": 2, "dash": "6px,3px"}
    yield scatter("threshold", x=x, y=threshold, mode="lines", line=dashed)
    for name, (label, marker) in MARKS.items():
        checks = [check for check in cell.checks if window_kind(check) == name]
        if checks:
            colour = kit.colours[4 if name in ("low", "trigger") else 0]
            yield scatter(
                label,
                x=[check.step for check in checks],
                y=[check.similarity for check in checks],
                mode="markers",
                marker={**marker, "color": colour, "line": {"color": INK, "width": 0.9}},
                customdata=[_told(check) for check in checks],
                hovertemplate="token %{x}: %{y:.3f}<br>%{customdata}",
            )
    yield scatter(
        "mask built",
        x=[mask.step for mask in cell.remasks],
        y=[max(check.similarity for check in cell.checks)] * len(cell.remasks),
        mode="markers",
        marker={"symbol": "line-ns-open", "size": 12, "color": INK},
        customdata=[f"{m.cause}, from {m.evidence_tokens:.0f} tokens" for m in cell.remasks],
        hovertemplate="mask of token %{x}<br>%{customdata}",
    )


def _told(check: DriftCheck) -> str:
    limit = "no threshold yet" if check.threshold is None else f"threshold {check.threshold:.3f}"
    return f"{limit}, counter {check.counter}"
