"""The pictures of a drift study: methods compared, loss, similarity, mask overlap and raster."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dart_llm.evaluation.text_metrics import NUMBERS
from dart_llm.experiments import stats
from dart_llm.experiments.artifacts import draw_checks, worth_drawing
from dart_llm.experiments.stats import Interval
from dart_llm.reporting import page
from dart_llm.reporting.figures import (
    GREY,
    HATCHES,
    INK,
    MAX_PANELS,
    SOFT,
    Palette,
    Plot,
    draw_whisker,
    legend,
    looks_of,
    name_bars,
    write_beside,
)
from dart_llm.reporting.table import grouped
from dart_llm.reporting.words import intervals_over, percent
from dart_llm.studies.drift.cell import BIN, SOURCES, DriftCell
from dart_llm.studies.drift.masks import (
    LiveNeurons,
    MaskSpan,
    chance,
    mask_spans,
    overlap,
    read_masks,
)
from dart_llm.studies.drift.settings import DART, DENSE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class DriftView:
    """What pictures and page are made of: ``cells`` are measured, ``failed`` are sentences by key.

    ``folder``, ``config``: the study's.  ``summary``: of the cells, empty of ``dart-llm detect``.
    ``detection``: a document of ``dart-llm detect``, or nothing.
    """

    folder: Path
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    cells: Sequence[DriftCell] = ()
    failed: Mapping[str, str] | None = None
    detection: Mapping[str, Any] | None = None

    @property
    def mode(self) -> str:
        return str(self.summary["mode"])

    @property
    def lines(self) -> list[Mapping[str, Any]]:
        """The summary's rows of pruned methods that have a finished cell."""
        rows = self.summary.get("rows", ())
        return [row for row in rows if row["method"] != DENSE and row["cells"]]

    def noted(self, words: str) -> str:
        """A picture's small print: ``words``, then what was run."""
        return f"{words} · {page.small_print(self.config)}"


def plural(remasks: float | None) -> str:
    """A mean number of re-masks: "1 re-mask", "1.3 re-masks"."""
    text = f"{remasks or 0:.1f}".removesuffix(".0")
    return f"{text} re-mask{'' if text == '1' else 's'}"


def accounted(record: Mapping[str, Any]) -> str:
    """Removed, dense and re-masks of a summary's row or of a cell's accounting."""
    remasks = record.get("remasks_per_cell", record.get("remasks"))
    return (
        f"{percent(record['achieved_sparsity'])} of the FFN neurons removed, "
        f"{percent(record['dense_token_share'])} of the decoded tokens dense, {plural(remasks)}"
    )


TIME = "decoded tokens"
BAND = "#eef0f3"

CHANGE = (0, (7, 2.5))
"""The line of a change of topic: long dashes, white between them."""


def _bands(axes: Axes, cell: DriftCell, inside: bool = False) -> None:
    """Topics as light and white stretches with their names, changes as lines.

    ``inside``: names are at the bottom of the axes, else above them.
    """
    axes.set_xlim(0, max(1, cell.decoded))
    pixels = axes.get_window_extent().width / 9
    for number, (name, start, end) in enumerate(cell.topics):
        if inside and number % 2 == 0:
            axes.axvspan(start, end, facecolor=BAND, linewidth=0, zorder=0)
        if number:
            for colour, style, width in (("white", "-", 2.6), (INK, CHANGE, 1.5)):
                axes.axvline(start, color=colour, linestyle=style, linewidth=width, zorder=3)
        room = max(6, round(pixels * (end - start) / max(1, cell.decoded)))
        look: dict[str, Any] = {"xytext": (0, 4), "textcoords": "offset points", "fontsize": 8.5}
        look |= {"ha": "center", "va": "bottom", "color": INK, "zorder": 5}
        look["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.8}
        at, short = (start + end) / 2, textwrap.shorten(name, room, placeholder="…")
        height, along = 0.0 if inside else 1.0, axes.get_xaxis_transform()
        axes.annotate(short, (at, height), xycoords=along, **look)


def _over_time(axes: Axes, cell: DriftCell, rows: Any, values: Any, **look: Any) -> Any:
    """A mesh of ``values`` [rows, spans]: hatches where all neurons live, lines at masks."""
    spans = mask_spans(cell)
    edges = [*(float(span.start) for span in spans), float(spans[-1].end)]
    mesh = axes.pcolormesh(edges, rows, values, rasterized=True, **look)
    dense = [span for span in spans if span.mask is None]
    hatches: dict[str, Any] = {"facecolor": "white", "edgecolor": SOFT, "hatch": "////"}
    for number, span in enumerate(dense):
        label = "_" if number else "dense: all neurons live"
        axes.axvspan(span.start, span.end, linewidth=0, zorder=2, label=label, **hatches)
    for mask in cell.record["remasks"]:
        axes.axvline(mask["step"], color="white", linewidth=1.1, zorder=2)
    _bands(axes, cell)
    axes.set_xlabel(TIME)
    if dense:
        axes.legend(loc="lower left", fontsize=8, frameon=True, framealpha=1)
    return mesh


# The loss over dense around changes of topic, in bins of tokens, with bootstrap intervals.  A
# passage is one item: its changes and seeds are averaged first, because what varies within a
# passage says little about other passages.

BEFORE, AFTER = 128, 256
"""Tokens shown before and after a change."""

EXCESS = "loss over dense (nats per token)"


@dataclass(frozen=True)
class Point:
    """Mean loss over dense, nats per token, of the ``BIN`` tokens from ``start`` on.

    ``start``: tokens after the change, negative before it.  ``n``: passages with that bin.
    """

    start: int
    value: float
    interval: Interval | None
    n: int


Curves = Mapping[str, Sequence[Point]]


def excess_curves(cells: Sequence[DriftCell]) -> Curves:
    """By method; bins lie within the two topics, and all their tokens have a loss.

    Empty where dense was not measured on the same passages.
    """
    dense = {cell.key: cell for cell in cells if cell.dense and "losses" in cell.record}
    bins: dict[str, dict[int, dict[str, list[float]]]] = {}
    for cell in cells:
        reference = None if cell.dense else dense.get(cell.dense_key)
        for start, value in _bins(cell, reference) if reference else ():
            sources = bins.setdefault(cell.label, {}).setdefault(start, {})
            sources.setdefault(cell.source.id, []).append(value)
    return {
        label: [
            _point(start, {name: fmean(values) for name, values in sources.items()})
            for start, sources in sorted(starts.items())
        ]
        for label, starts in bins.items()
    }


def _point(start: int, means: Mapping[str, float]) -> Point:
    return Point(start, fmean(means.values()), stats.interval(means), len(means))


def _bins(cell: DriftCell, dense: DriftCell) -> Iterator[tuple[int, float]]:
    losses, reference, topics = cell.record["losses"], dense.record["losses"], cell.topics
    for (_, low, change), (_, _, high) in zip(topics, topics[1:], strict=False):
        for start in range(-BEFORE, AFTER, BIN):
            first, last = change + start, change + start + BIN
            if first < low or last > high:
                continue
            pairs = zip(losses[first:last], reference[first:last], strict=True)
            excess = [a - b for a, b in pairs if a is not None and b is not None]
            if len(excess) == BIN:
                yield start, fmean(excess)


def make_loss(view: DriftView) -> Plot | None:
    """A method at a time before the others, where dense was measured on the same passages."""
    curves = excess_curves(view.cells)
    if not curves:
        return None
    most = max(point.n for points in curves.values() for point in points)
    small = f"means of {BIN}-token bins; {intervals_over('bands', most, 'passages')}"
    columns = min(len(curves), 3)
    rows = math.ceil(len(curves) / columns)

    def draw(figure: Figure, palette: Palette) -> None:
        panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for axes, label in zip(panels.flat, curves, strict=False):
            _loss_panel(axes, label, curves, looks_of(list(curves), palette)[label])
        for axes in panels.flat[len(curves) :]:
            axes.axis("off")
        figure.supylabel(EXCESS, fontsize=9.5)
        for axes in panels[-1]:
            axes.set_xlabel("tokens after the change")

    title = "Loss over dense around the change of topic, by method"
    alt = f"Lines: {EXCESS} over tokens after the change, by method."
    return Plot("loss", title, alt, view.noted(small), 0.9 + 2.0 * rows, draw)


def _loss_panel(axes: Axes, label: str, curves: Curves, look: Mapping[str, Any]) -> None:
    for other, points in curves.items():
        x, y = [point.start + BIN / 2 for point in points], [point.value for point in points]
        if other == label:
            axes.plot(x, y, zorder=3, **{**look, "markersize": 4})
            ends = [(p.interval and p.interval.ends) or (math.nan, math.nan) for p in points]
            low, high = zip(*ends, strict=True)
            axes.fill_between(x, low, high, color=look["color"], alpha=0.25, linewidth=0, zorder=2)
        else:
            axes.plot(x, y, color=GREY, linewidth=0.9, zorder=1)
    axes.axvline(0, color=INK, linestyle=CHANGE, linewidth=1.3)
    axes.axhline(0, color=SOFT, linewidth=0.8)
    axes.set_title(label, loc="left", fontsize=9.5)
    axes.grid(axis="y")


# The methods compared: each quality with its interval, achieved sparsity beside it.

METRICS = ("document_similarity", "rougeL", "bertscore", "sentence_coverage")
"""Shown of the free mode; the table has the others."""

TITLES = {name: f"{title} against the dense text" for name, title in NUMBERS.items()}

Bars = list[tuple[Mapping[str, Any], Mapping[str, Any]]]
"""The summary's row of each method, and its estimate of one number."""


def make_methods(view: DriftView) -> Plot | None:
    """A panel per number: the loss after the change, or metrics against dense."""
    panels = _quality_panels(view)
    if not panels:
        return None
    axis, first = next(iter(panels.items()))
    counts = [len(bars) for bars in panels.values()]

    def draw(figure: Figure, palette: Palette) -> None:
        ratios = [count + 1.2 for count in counts]
        shape = {"height_ratios": ratios, "width_ratios": (2.4, 1.2)}
        rows = figure.subplots(len(panels), 2, squeeze=False, gridspec_kw=shape)
        for (quality, removed), (words, bars) in zip(rows, panels.items(), strict=True):
            _draw_quality(quality, bars, palette)
            quality.set_xlabel(words)
            for row, (line, _) in enumerate(bars):
                share, dense = line["achieved_sparsity"], percent(line["dense_token_share"])
                removed.barh(row, 100 * share, 0.62, color=GREY)
                words = f"{percent(share)}\n{dense} dense, {plural(line['remasks_per_cell'])}"
                write_beside(removed, words, 0, row, 7.2)
            removed.set_xlim(0, 100)
            name_bars(removed, [""] * len(bars))
        rows[-1][1].set_xlabel("achieved sparsity (%)")

    listed = "; ".join(
        f"{line['label']} {estimate['mean']:.3f} with {accounted(line)}" for line, estimate in first
    )
    title = "Quality of each method, beside what it removed"
    small = intervals_over("whiskers", first[0][1]["n"], f"{SOURCES[view.mode]}s")
    height = 0.7 + sum(0.75 + 0.36 * count for count in counts)
    return Plot("methods", title, f"Bars: {axis}. {listed}.", view.noted(small), height, draw)


def _quality_panels(view: DriftView) -> dict[str, Bars]:
    """Bars by the words of their axis."""

    def bars(group: str, name: str) -> Bars:
        return [(line, line[group][name]) for line in view.lines if (line[group] or {}).get(name)]

    panels = {f"{EXCESS}, after the change": bars("loss", "after_minus_dense")}
    panels |= {TITLES[name]: bars("metrics", name) for name in METRICS}
    return {words: shown for words, shown in panels.items() if shown}


def _draw_quality(axes: Axes, bars: Bars, palette: Palette) -> None:
    labels = [str(line["label"]) for line, _ in bars]
    colours = looks_of(labels, palette)
    for row, (label, (_, estimate)) in enumerate(zip(labels, bars, strict=True)):
        mean, low, high = (estimate[name] for name in ("mean", "low", "high"))
        look = {"color": colours[label]["color"], "hatch": HATCHES[row % len(HATCHES)]}
        axes.barh(row, mean, 0.62, edgecolor="white", linewidth=0, **look)
        if low is not None:
            draw_whisker(axes, low, high, row)
        write_beside(axes, f"{mean:.2f}", max(0.0, mean, high or 0.0), row, 8.5)
    low, high = axes.get_xlim()
    axes.set_xlim(low, high + 0.16 * (high - low))
    axes.axvline(0, color=INK, linewidth=0.9)
    name_bars(axes, labels)


# Masks of a cell over time: how much of each layer's first mask is left, and who lives when.

Masks = tuple[DriftCell, tuple[LiveNeurons, ...]]

OVERLAP = "Jaccard overlap with the first mask"


def remasked(view: DriftView) -> Iterator[Masks]:
    """Cells whose masks were rebuilt: dart's first, then those with fewer, legible re-masks."""
    cells = [cell for cell in view.cells if len(cell.record["remasks"]) > 1]
    cells.sort(key=lambda c: (c.candidate.name != DART, abs(len(c.record["remasks"]) - 3)))
    for cell in cells:
        if masks := read_masks(cell, view.folder):
            yield cell, masks


def make_overlap(view: DriftView, cell: DriftCell, masks: Sequence[LiveNeurons]) -> Plot:
    """How much of each layer's first mask is still in force."""
    values, expected = overlap(masks), chance(masks)
    low = min(0.9, np.floor(10 * min(expected, float(values.min()))) / 10)

    def draw(figure: Figure, palette: Palette) -> None:
        axes = figure.subplots()
        columns = [span.mask or 0 for span in mask_spans(cell)]
        rows = np.arange(len(masks) + 1) - 0.5
        shades = {"cmap": "GnBu", "vmin": low, "vmax": 1}
        mesh = _over_time(axes, cell, rows, values[:, columns], **shades)
        bar = figure.colorbar(mesh, ax=axes, label=OVERLAP, pad=0.02)
        bar.ax.axhline(expected, color="white", linewidth=3.0)
        bar.ax.axhline(expected, color=INK, linewidth=1.4)
        near = [tick for tick in np.arange(low, 1.01, 0.2) if abs(tick - expected) > 0.05]
        bar.set_ticks([*near, expected], labels=[*(f"{t:.1f}" for t in near), "chance"])
        axes.set_ylabel("layer")
        axes.locator_params(axis="y", integer=True)

    last = float(values[:, -1].mean())
    ends = f"mean over layers at the end {last:.2f}, of independent masks {expected:.2f}"
    small = f"Jaccard: neurons in both masks over neurons in either · {ends}"
    title = f"{cell.name}: overlap of the masks with the first ones, by layer"
    alt = f"Heat map: {OVERLAP}, by layer and decoded token; {ends}."
    return Plot("overlap", title, alt, view.noted(small), 3.9, draw)


def raster(live: LiveNeurons, spans: Sequence[MaskSpan]) -> NDArray[np.uint8]:
    """[width, spans]: 1 where a neuron lives, dense tokens use all.

    Rows are sorted by their pattern over the masks, those that live first on top.
    """
    order = np.lexsort((np.arange(live.shape[1]), *(~live)[::-1]))
    everything = np.ones(live.shape[1], dtype=np.bool_)
    shown = [everything if span.mask is None else live[span.mask] for span in spans]
    return np.stack(shown)[:, order].T.astype(np.uint8)


def make_raster(view: DriftView, cell: DriftCell, masks: Sequence[LiveNeurons]) -> Plot:
    """Which neurons live when, in the layer whose masks overlap least with its first one."""
    layer = int(overlap(masks)[:, 1:].mean(1).argmin())
    live = masks[layer]
    width = live.shape[1]

    def draw(figure: Figure, palette: Palette) -> None:
        axes, rows = figure.subplots(), np.arange(width + 1)
        shades = {"cmap": "Greys", "vmin": -0.06, "vmax": 1.15}
        _over_time(axes, cell, rows, raster(live, mask_spans(cell)), **shades)
        axes.set_ylim(width, 0)
        axes.set_ylabel(f"neurons of layer {layer}, sorted")

    always, never = percent(live.all(0).mean(), 0), percent((~live).all(0).mean(), 0)
    shares = f"{always} of {width:,} neurons live under every mask, {never} under none"
    words = "dark: live, light: pruned · the layer whose masks moved most"
    title = f"{cell.name}: the neurons of layer {layer} that live"
    alt = f"Raster: the neurons of layer {layer} that live, over decoded tokens; {shares}."
    return Plot("neurons", title, alt, view.noted(f"{words} · {shares}"), 3.9, draw)


# Similarity over time by method, with thresholds and re-masks, over the topics.

Cells = Sequence[DriftCell]


def make_timelines(view: DriftView) -> Iterator[Plot]:
    """One per source, those with most triggers first; a panel per method with a detector.

    Texts with few windows, and detectors that never armed, are left out.
    """
    checked = (cell for cell in view.cells if worth_drawing(cell.checks))
    groups = grouped(checked, lambda cell: (cell.source.id, cell.seed))

    def rank(cells: Cells) -> tuple[int, int]:
        return -len(cells), -sum(check.trigger for cell in cells for check in cell.checks)

    return (_timeline(view, cells) for cells in sorted(groups.values(), key=rank))


def _timeline(view: DriftView, cells: Cells) -> Plot:
    shown = cells[:MAX_PANELS]
    layers = sorted({check.layer for cell in shown for check in cell.checks})
    small = f"layer{'s'[: len(layers) > 1]} {', '.join(map(str, layers))} watched"
    if len(cells) > len(shown):
        small = f"{len(shown)} of {len(cells)} methods shown · {small}"

    def draw(figure: Figure, palette: Palette) -> None:
        panels = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
        for axes, cell in zip(panels, shown, strict=True):
            draw_checks(axes, palette, cell.checks, cell.record["remasks"])
            low, high = axes.get_ylim()
            axes.set_ylim(low - 0.2 * (high - low), high)
            axes.set_title(cell.label, loc="right", fontsize=9)
            _bands(axes, cell, inside=True)
        panels[-1].set_xlabel(TIME)
        if len(shown[0].topics) > 1:
            panels[0].plot([], [], color=INK, linestyle=CHANGE, label="change of topic")
        legend(panels[0], 4, list(panels[1:]))

    built = ", ".join(f"{cell.label} {plural(cell.rebuilt)}" for cell in shown)
    title = f"Similarity to the reference on {cells[0].source_name}"
    alt = f"Marks: cosine similarity of each window to its reference, over decoded tokens; {built}."
    return Plot("similarity", title, alt, view.noted(small), 1.1 + 1.9 * len(shown), draw)
