"""Pictures of one run: kept share per layer, perplexity by method and sparsity, times.

Drift over time is drawn by ``experiments/drift_plot.py``.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dart_llm.experiments import drift_plot
from dart_llm.experiments.store import ResultsView, mapping, number, read
from dart_llm.reporting import words
from dart_llm.reporting.figures import (
    COLOURS,
    GREY,
    HATCHES,
    INK,
    MAX_PANELS,
    Palette,
    Plot,
    _log_ticks,
    draw_whisker,
    legend,
    name_bars,
    reference_line,
    save,
    write_beside,
)
from dart_llm.reporting.words import percent, times

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]


def perplexity(view: ResultsView) -> Plot | None:
    """A bar per row on a log axis, dense as a line; one panel per text."""
    texts = [(document, words.measured(document["rows"])) for document in view.perplexity]
    shown = [(document, rows) for document, rows in texts if rows][:MAX_PANELS]
    if not shown:
        return None
    bars = [len(rows) for _, rows in shown]

    def draw(figure: Figure, palette: Palette, narrow: bool) -> None:
        panels = figure.subplots(
            len(shown), 1, squeeze=False, gridspec_kw={"height_ratios": [n + 1 for n in bars]}
        )[:, 0]
        for axes, (document, rows) in zip(panels, shown, strict=True):
            _draw_perplexity(axes, palette, rows, narrow)
            title = protocol(document)
            axes.set_title(title.partition(":")[0] if narrow else title, loc="left", fontsize=8.5)
        scored = "perplexity" if narrow else "perplexity of the scored tokens"
        panels[-1].set_xlabel(f"{scored} (log axis; lower is better)")

    listed = ", ".join(f"{words.row_name(r)} {words.figure(r['perplexity'])}" for r in shown[0][1])
    alt = f"Bars: perplexity on a log axis. {listed}."
    height = 1.25 + sum(0.55 + 0.34 * number for number in bars)
    title = "Perplexity, dense beside pruned"
    return Plot("perplexity", title, alt, view.small_print, height, draw)


def protocol(document: Row) -> str:
    """The text of a perplexity document, and how it was scored."""
    text = textwrap.shorten(str(document.get("text", "text")), 30, placeholder=" …")
    return (
        f"{text}: {document.get('slices', '?')} slices of {document.get('prompt_tokens', '?')} "
        f"prompt + {document.get('scored_tokens', '?')} scored tokens, protocol "
        f"{document.get('protocol', 'not known')}"
    )


def _draw_perplexity(axes: Axes, palette: Palette, rows: Sequence[Row], narrow: bool) -> None:
    dense = words.dense_row(rows)
    methods = [m for m in dict.fromkeys(str(row.get("method")) for row in rows) if m != "dense"]
    floor = min(float(row["perplexity"]) for row in rows) / 1.25
    top = floor
    for place, row in enumerate(rows):
        method = str(row.get("method"))
        look: dict[str, Any] = {"color": GREY}
        if method in methods:
            index = methods.index(method) % len(HATCHES)
            look = {"color": palette[COLOURS[index]], "hatch": HATCHES[index]}
        end = float(row["perplexity"])
        axes.barh(place, end - floor, 0.66, left=floor, edgecolor="white", linewidth=0, **look)
        if dense is not None and row.get("interval"):  # of the ratio to dense
            low, high = (bound * dense["perplexity"] for bound in row["interval"])
            draw_whisker(axes, low, high, place)
            end = max(end, high)
        write_beside(axes, _bar_text(row, rows), end, place)
        top = max(top, end)
    if dense is not None:
        reference_line(axes, x=dense["perplexity"], label="dense")
    ceiling = top * (top / floor) ** (0.8 if narrow else 0.25)  # room for the numbers
    axes.set_xscale("log")
    axes.set_xlim(floor, ceiling)
    ticks = _log_ticks(floor, ceiling, 5 if narrow else 8)
    labels = [f"{tick:,g}" if tick < 1e5 else words.figure(tick) for tick in ticks]
    axes.set_xticks(ticks, labels)
    axes.set_xticks([], minor=True)
    name_bars(axes, [words.row_name(row) for row in rows])


def _bar_text(row: Row, rows: Sequence[Row]) -> str:
    text, ratio = words.figure(row["perplexity"]), words.ratio(row, rows)
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
    limit = number(view.timing.get("bytes_limit"))

    def draw(figure: Figure, palette: Palette, narrow: bool) -> None:
        axes = figure.subplots()
        looks = {"dense": (GREY, ""), "pruned": (palette[3], "///")}
        for place, (name, value) in enumerate(times_ms.items()):
            colour, hatch = looks[name]
            axes.barh(place, value, 0.62, color=colour, hatch=hatch, edgecolor="white", linewidth=0)
            write_beside(axes, f"{value:.1f} ms", value, place)
        if limit and "dense" in times_ms:
            least = times_ms["dense"] / limit
            label = f"least that the bytes read allow: {least:.1f} ms"
            reference_line(axes, x=least, label=label)
        axes.set_xlim(0, (1.3 if narrow else 1.14) * max(times_ms.values()))
        axes.set_xlabel("milliseconds per decoded token (lower is better)")
        name_bars(axes, list(times_ms))
        legend(axes, 1)

    alt = f"Bars: milliseconds per decoded token. {words.timing_sentence(view.timing)}"
    small = f"means of one run · {view.small_print}"
    return Plot("time_per_token", "Milliseconds per decoded token", alt, small, 2.3, draw)


# Plot: the share of its FFN neurons that each layer keeps.


def make(view: ResultsView) -> Plot | None:
    """Bars for the first mask, steps for the last where it differs, a line for an even spread."""
    widths = [int(layer.get("width") or 0) for layer in view.layers]
    masks = [mask for mask in view.remasks if len(mask.get("kept") or ()) == len(widths)]
    if not widths or not all(widths) or not masks:
        return None

    def draw(figure: Figure, palette: Palette, narrow: bool) -> None:
        axes = figure.subplots()
        _draw(axes, palette, masks, widths)
        legend(axes, 1 if narrow else 3)

    title = "FFN neurons kept in each layer"
    alt = f"Bars: share of the FFN neurons kept in each of {len(widths)} layers."
    return Plot("kept_neurons", title, alt, view.small_print, 3.4, draw)


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
