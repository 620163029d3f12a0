"""Kept share per layer, drift over time, perplexity and time bars.

Plots: perplexity by method and sparsity, and milliseconds per token.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dart_llm.experiments import drift_plot
from dart_llm.experiments.store import ResultsView, mapping, number, read
from dart_llm.reporting import words as sentences
from dart_llm.reporting.figures import (
    COLOURS,
    GREY,
    HATCHES,
    INK,
    MAX_PANELS,
    SOFT,
    Palette,
    Plot,
    _log_ticks,
    legend,
    reference_line,
    save,
)
from dart_llm.reporting.words import layers_sentence, percent, times

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def perplexity(view: ResultsView) -> Plot | None:
    """A bar per row on a log axis, dense as a line; one panel per text."""
    texts = [(d, sentences.measured(d["rows"])) for d in view.perplexity]
    texts = [(document, rows) for document, rows in texts if rows]
    if not texts:
        return None
    shown = texts[:MAX_PANELS]
    words = sentences.perplexity_title(shown[0][0], view.method)
    bars = [len(rows) for _, rows in shown]

    def draw(figure: Figure, palette: Palette, narrow: bool) -> None:
        panels = figure.subplots(
            len(shown), 1, squeeze=False, gridspec_kw={"height_ratios": [n + 1 for n in bars]}
        )[:, 0]
        for axes, (document, rows) in zip(panels, shown, strict=True):
            _draw_perplexity(axes, palette, rows, narrow)
            axes.set_title(_protocol(document, narrow), loc="left", fontsize=8.5, color=SOFT)
        scored = "perplexity" if narrow else "perplexity of the scored tokens"
        panels[-1].set_xlabel(f"{scored} (log axis; lower is better)")

    listed = ", ".join(
        f"{sentences.row_name(r)} {sentences.figure(r['perplexity'])}" for r in shown[0][1]
    )
    alt = f"Bars: perplexity on a log axis. {listed}. {words}"
    height = 1.25 + sum(0.55 + 0.34 * number for number in bars)
    return Plot("perplexity", words, alt, view.small_print, height, draw)


def _protocol(document: Mapping[str, Any], narrow: bool) -> str:
    text = textwrap.shorten(str(document.get("text", "text")), 30, placeholder=" …")
    name = f"{text}, protocol {document.get('protocol', 'not known')}"
    if narrow or not document.get("slices"):
        return name
    return (
        f"{name}: {document['slices']} slices of {document.get('prompt_tokens', '?')} prompt + "
        f"{document.get('scored_tokens', '?')} scored tokens"
    )


def _draw_perplexity(
    axes: Axes, palette: Palette, rows: Sequence[Mapping[str, Any]], narrow: bool
) -> None:
    dense = sentences.dense_row(rows)
    floor = min(float(row["perplexity"]) for row in rows) / 1.25
    top = max(_end(row, dense) for row in rows)
    ceiling = top * (top / floor) ** (0.8 if narrow else 0.25)  # room for the numbers
    methods = [m for m in dict.fromkeys(str(row.get("method")) for row in rows) if m != "dense"]
    for place, row in enumerate(rows):
        method = str(row.get("method"))
        look: dict[str, Any] = {"color": GREY}
        if method in methods:
            index = methods.index(method) % len(HATCHES)
            look = {"color": palette[COLOURS[index]], "hatch": HATCHES[index]}
        length = row["perplexity"] - floor
        axes.barh(place, length, 0.66, left=floor, edgecolor="white", linewidth=0, **look)
        _interval(axes, place, row, dense)
        _write(axes, _bar_text(row, rows), _end(row, dense), place)
    if dense is not None:
        reference_line(axes, x=dense["perplexity"], label="dense")
    _scale(axes, [sentences.row_name(row) for row in rows], floor, ceiling, 5 if narrow else 8)


def _scale(axes: Axes, names: Sequence[str], low: float, high: float, most: int) -> None:
    """A log axis from ``low`` to ``high`` with at most ``most`` ticks; a name for every bar."""
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    ticks = _log_ticks(low, high, most)
    words = [f"{tick:,g}" if tick < 1e5 else sentences.figure(tick) for tick in ticks]
    axes.set_xticks(ticks, words)
    axes.set_xticks([], minor=True)
    axes.grid(axis="x")
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.tick_params(axis="y", length=0)


def _write(axes: Axes, text: str, x: float, place: int) -> None:
    """A number to the right of its bar; the axes have room for it."""
    axes.annotate(
        text,
        (x, place),
        xytext=(5, 0),
        va="center",
        fontsize=9,
        textcoords="offset points",
        in_layout=False,
    )


def _interval(
    axes: Axes, place: int, row: Mapping[str, Any], dense: Mapping[str, Any] | None
) -> None:
    """The 95 % interval of the ratio to dense, as a whisker."""
    interval = row.get("interval")
    if dense is not None and interval:
        ends = [end * dense["perplexity"] for end in interval]
        for colour, extra in (("white", 2.0), (INK, 0.0)):
            style: dict[str, Any] = {
                "linewidth": 1.4 + extra,
                "markeredgewidth": 1.2 + extra,
                "color": colour,
            }
            axes.plot(ends, [place, place], marker="|", markersize=7 + extra, **style)


def _end(row: Mapping[str, Any], dense: Mapping[str, Any] | None) -> float:
    """Where a bar and its whisker end."""
    interval = row.get("interval")
    top = interval[1] * dense["perplexity"] if dense is not None and interval else 0.0
    return float(max(row["perplexity"], top))


def _bar_text(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    text = sentences.figure(row["perplexity"])
    ratio = sentences.ratio(row, rows)
    if row.get("method") == "dense" or ratio is None:
        return text
    return f"{text}  (x {ratio:.2f})" if ratio < 10 else f"{text}  (x {times(ratio)})"


def time_per_token(view: ResultsView) -> Plot | None:
    """Bars for dense and pruned, a line for the least time that the bytes read allow."""
    each = mapping(view.timing.get("seconds_per_token"))
    found = {name: number(each.get(name)) for name in ("dense", "pruned")}
    times_ms = {name: 1000 * value for name, value in found.items() if value}
    if not times_ms:
        return None
    words = sentences.timing_sentence(view.timing)
    title = sentences.timing_title(view.timing)
    limit = number(view.timing.get("bytes_limit"))

    def draw(figure: Figure, palette: Palette, narrow: bool) -> None:
        axes = figure.subplots()
        _draw_times(axes, palette, times_ms, limit, narrow)
        legend(axes, 1)

    alt = f"Bars: milliseconds per decoded token. {words}"
    small = f"means of one run · {view.small_print}"
    return Plot("time_per_token", title, alt, small, 2.3, draw)


def _draw_times(
    axes: Axes, palette: Palette, times_ms: Mapping[str, float], limit: float | None, narrow: bool
) -> None:
    looks = {"dense": (GREY, ""), "pruned": (palette[3], "///")}
    for place, (name, value) in enumerate(times_ms.items()):
        colour, hatch = looks[name]
        axes.barh(place, value, 0.62, color=colour, hatch=hatch, edgecolor="white", linewidth=0)
        _write(axes, f"{value:.1f} ms", value, place)
    if limit and "dense" in times_ms:
        least = times_ms["dense"] / limit
        label = f"least that the bytes read allow: {least:.1f} ms"
        reference_line(axes, x=least, label=label)
    axes.set_xlim(0, (1.3 if narrow else 1.14) * max(times_ms.values()))
    axes.set_yticks(range(len(times_ms)), list(times_ms))
    axes.set_ylim(len(times_ms) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("milliseconds per decoded token (lower is better)")
    axes.grid(axis="x")


# Plot: the share of its FFN neurons that each layer keeps.


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


def available(view: ResultsView) -> list[Plot]:
    """The plots that can be drawn from what the folder holds; needs no matplotlib."""
    makers = (make, drift_plot.make, perplexity, time_per_token)
    return [plot for plot in (make(view) for make in makers) if plot is not None]


def write_all(folder: Path) -> list[Path]:
    """Write ``plots/<name>.png`` from the files that exist; returns the paths.

    Raises ``MissingExtra`` without matplotlib, ``ResultsError`` when a file cannot be written.
    """
    return save(folder, available(read(folder)))
