"""Plots: perplexity by method and sparsity, and milliseconds per token."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dart_llm import sentences
from dart_llm.plot_base import INK, MAX_PANELS, SOFT, Palette, Plot, legend, reference_line
from dart_llm.results_view import ResultsView, mapping, number
from dart_llm.sentences import times

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HATCHES = ("", "///", "...", "\\\\\\", "xx", "++")
COLOURS = (3, 4, 2, 0, 1, 8)
GREY = "#c9cdd2"


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
            _draw_perplexity(axes, palette, rows)
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
    name = f"{document.get('text', 'text')}, protocol {document.get('protocol', 'not known')}"
    if narrow or not document.get("slices"):
        return name
    return (
        f"{name}: {document['slices']} slices of {document.get('prompt_tokens', '?')} prompt + "
        f"{document.get('scored_tokens', '?')} scored tokens"
    )


def _draw_perplexity(axes: Axes, palette: Palette, rows: Sequence[Mapping[str, Any]]) -> None:
    values = [float(row["perplexity"]) for row in rows]
    dense = sentences.dense_row(rows)
    floor = min(values) / 1.25
    ceiling = max(values) * (max(values) / floor) ** 0.3
    methods = [m for m in dict.fromkeys(str(row.get("method")) for row in rows) if m != "dense"]
    for place, row in enumerate(rows):
        value, method = values[place], str(row.get("method"))
        index = methods.index(method) % len(HATCHES) if method in methods else None
        axes.barh(
            place,
            value - floor,
            left=floor,
            height=0.66,
            color=GREY if index is None else palette[COLOURS[index]],
            hatch="" if index is None else HATCHES[index],
            edgecolor="white",
            linewidth=0,
        )
        _interval(axes, place, row, dense)
        axes.annotate(
            _bar_text(row, rows),
            (_end(row, dense), place),
            xytext=(5, 0),
            va="center",
            fontsize=9,
            textcoords="offset points",
        )
    if dense is not None:
        reference_line(axes, x=dense["perplexity"], label="dense")
    axes.set_xscale("log")
    axes.set_xlim(floor, ceiling)
    axes.set_yticks(range(len(rows)), [sentences.row_name(row) for row in rows])
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.tick_params(axis="y", length=0)
    ticks = _log_ticks(floor, ceiling)
    axes.set_xticks(ticks, [f"{tick:,g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.grid(axis="x")


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
    return f"{text}  (x {times(ratio)})"


def _log_ticks(low: float, high: float) -> list[float]:
    """Round numbers between two perplexities, about three to seven of them."""
    for steps in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), tuple(range(1, 10))):
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [step * 10.0**d for d in decades for step in steps if low <= step * 10.0**d <= high]
        if len(ticks) >= 3:
            return ticks
    step = 10.0 ** math.floor(math.log10((high - low) / 2))
    first = math.ceil(low / step)
    return [step * n for n in range(first, math.floor(high / step) + 1)]


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
        _draw_times(axes, palette, times_ms, limit)
        legend(axes, 1)

    alt = f"Bars: milliseconds per decoded token. {words}"
    small = f"medians of one run · {view.small_print}"
    return Plot("time_per_token", title, alt, small, 2.3, draw)


def _draw_times(
    axes: Axes, palette: Palette, times_ms: Mapping[str, float], limit: float | None
) -> None:
    looks = {"dense": (GREY, ""), "pruned": (palette[3], "///")}
    for place, (name, value) in enumerate(times_ms.items()):
        colour, hatch = looks[name]
        axes.barh(place, value, 0.62, color=colour, hatch=hatch, edgecolor="white", linewidth=0)
        axes.annotate(
            f"{value:.1f} ms",
            (value, place),
            xytext=(5, 0),
            va="center",
            textcoords="offset points",
        )
    if limit and "dense" in times_ms:
        least = times_ms["dense"] / limit
        label = f"least time that the bytes read allow: {least:.1f} ms ({limit:.2f} x)"
        reference_line(axes, x=least, label=label)
    axes.set_xlim(0, 1.17 * max(times_ms.values()))
    axes.set_yticks(range(len(times_ms)), list(times_ms))
    axes.set_ylim(len(times_ms) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("milliseconds per decoded token (lower is better)")
    axes.grid(axis="x")
