"""Pictures of one run: kept share per layer, perplexity by method and sparsity, times.

Drift over time is drawn by ``experiments/drift_plot.py``.
"""

from __future__ import annotations

import math
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
    NARROW,
    WIDE,
    Palette,
    Plot,
    _log_ticks,
    draw_whisker,
    legend,
    looks_of,
    mark,
    name_bars,
    reference_line,
    save,
    write_beside,
)
from dart_llm.reporting.speed_up import DISTURBED
from dart_llm.reporting.words import percent, times

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]


def perplexity(view: ResultsView) -> Plot | None:
    """A dot per row on a log axis, dense as a line; one panel per text."""
    texts = [(document, words.measured(document["rows"])) for document in view.perplexity]
    shown = [(document, rows) for document, rows in texts if rows][:MAX_PANELS]
    if not shown:
        return None
    counts = [len(rows) for _, rows in shown]

    def draw(figure: Figure, palette: Palette, narrow: bool) -> None:
        panels = figure.subplots(
            len(shown), 1, squeeze=False, gridspec_kw={"height_ratios": [n + 1 for n in counts]}
        )[:, 0]
        for axes, (document, rows) in zip(panels, shown, strict=True):
            _draw_perplexity(axes, palette, rows, narrow)
            title = protocol(document)
            axes.set_title(title.partition(":")[0] if narrow else title, loc="left", fontsize=8.5)
        scored = "perplexity" if narrow else "perplexity of the scored tokens"
        panels[-1].set_xlabel(f"{scored} (log axis; lower is better)")

    listed = ", ".join(f"{words.row_name(r)} {words.figure(r['perplexity'])}" for r in shown[0][1])
    alt = f"Dots: perplexity on a log axis. {listed}."
    height = 1.25 + sum(0.55 + 0.34 * number for number in counts)
    title = "Perplexity, dense beside pruned"
    small = f"{_whiskers([row for _, rows in shown for row in rows])} · {view.small_print}"
    return Plot("perplexity", title, alt, small, height, draw)


def _whiskers(rows: Sequence[Row]) -> str:
    """What the whiskers are intervals of, or why there are none."""
    if any(row.get("interval") for row in rows):
        return "whiskers: 95 % intervals of the ratio to dense (x), paired by slice"
    reason = next((row["no_interval"] for row in rows if row.get("no_interval")), "not computed")
    return f"no whiskers: slices {reason}"


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
    looks = looks_of(list(dict.fromkeys(str(row.get("method")) for row in rows)), palette)
    looks["dense"] = {**mark((0, "o", "-"), palette), "color": INK}
    ends: list[tuple[float, float, str]] = []
    for place, row in enumerate(rows):
        low = high = float(row["perplexity"])
        look = {**looks[str(row.get("method"))], "markersize": 7.5, "zorder": 4}
        axes.plot([low], [place], **look)
        if dense is not None and row.get("interval"):  # of the ratio to dense
            low, high = (bound * dense["perplexity"] for bound in row["interval"])
            draw_whisker(axes, low, high, place)
        text = _dot_text(row, rows, "\n" if narrow else "  ")
        ends.append((min(low, row["perplexity"]), max(high, row["perplexity"]), text))
        write_beside(axes, text, ends[-1][1], place, gap=8)
    if dense is not None:
        reference_line(axes, x=dense["perplexity"], label="dense")
    low, high = _limits(ends, 72 * (NARROW if narrow else WIDE) - 110)
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    ticks = _log_ticks(low, high, 5 if narrow else 8)
    labels = [f"{tick:,g}" if tick < 1e5 else words.figure(tick) for tick in ticks]
    axes.set_xticks(ticks, labels)
    axes.set_xticks([], minor=True)
    name_bars(axes, [words.row_name(row) for row in rows])


def _limits(ends: Sequence[tuple[float, float, str]], points: float) -> tuple[float, float]:
    """Limits of a log axis of that many points, with room for what stands right of each whisker.

    ``ends``: of every row its whisker's, and the text beside it.
    """
    least, most = min(low for low, _, _ in ends), max(high for _, high, _ in ends)
    low = least / max(1.02, (most / least) ** 0.08)
    spans = [
        math.log(high / low) / (1 - (12 + 4.9 * max(map(len, text.split("\n")))) / points)
        for _, high, text in ends
    ]
    return low, low * math.exp(max(spans))


def _dot_text(row: Row, rows: Sequence[Row], between: str) -> str:
    """The number, and over dense with its interval, as the table has them."""
    text, ratio = words.figure(row["perplexity"]), words.ratio(row, rows)
    if row.get("method") == "dense" or ratio is None:
        return text
    over = f"{ratio:.2f}" if ratio < 10 else times(ratio)
    if not row.get("interval"):
        return f"{text}{between}x {over}"
    return f"{text}{between}x {over} ({' to '.join(f'{end:.2f}' for end in row['interval'])})"


def time_per_token(view: ResultsView) -> Plot | None:
    """A bar for each way of decoding, a dot for each of its turns, a line for its bytes' limit.

    Where timings were disturbed, bar and title say so, and there is no limit.
    """
    each = mapping(view.timing.get("seconds_per_token"))
    known = {name: number(value) for name, value in each.items()}
    times_ms = {name: 1000 * value for name, value in known.items() if value}
    if not times_ms:
        return None
    measured = mapping(view.timing.get("turns"))
    turns = {name: [1000 * float(one) for one in measured.get(name, ())] for name in times_ms}
    speed_ups = mapping(view.timing.get("speed_ups"))
    judged = {name: one for name, one in speed_ups.items() if name in times_ms}
    disturbed = {name for name, one in judged.items() if one.get("disturbed")}
    limits = {
        name: times_ms["dense"] / limit
        for name, one in judged.items()
        if name not in disturbed and "dense" in times_ms and (limit := number(one["bytes_limit"]))
    }

    def draw(figure: Figure, palette: Palette, narrow: bool) -> None:
        axes = figure.subplots()
        looks = zip(COLOURS, HATCHES[1:], strict=False)
        ends = {name: max([value, *turns[name]]) for name, value in times_ms.items()}
        for place, (name, value) in enumerate(times_ms.items()):
            colour, hatch = (
                (None, "") if name.startswith("dense") else next(looks, (COLOURS[0], ""))
            )
            look: dict[str, Any] = {"color": GREY if colour is None else palette[colour]}
            axes.barh(place, value, 0.62, hatch=hatch, edgecolor="white", linewidth=0, **look)
            dots: dict[str, Any] = {"color": "white", "markeredgecolor": INK, "markersize": 4}
            axes.plot(turns[name], [place] * len(turns[name]), "o", zorder=4, **dots)
            text = f"{value:.1f} ms{' (disturbed)' if name in disturbed else ''}"
            write_beside(axes, text, ends[name], place)
            if name in limits:
                _draw_least(axes, limits[name], place, named=name == next(iter(limits)))
        room = (0.3 if narrow else 0.14) * (2 if disturbed else 1)
        axes.set_xlim(0, (1 + room) * max(ends.values()))
        axes.set_xlabel("milliseconds per decoded token (lower is better)")
        name_bars(axes, list(times_ms))
        legend(axes, 1)

    title = "Milliseconds per decoded token" + (f" ({DISTURBED})" if disturbed else "")
    alt = f"Bars: milliseconds per decoded token. {words.timing_sentence(view.timing)}"
    how = "dots: turns, one way after the other" if any(turns.values()) else "one run"
    height = 1.5 + 0.4 * len(times_ms)
    return Plot("time_per_token", title, alt, f"{how} · {view.small_print}", height, draw)


def _draw_least(axes: Axes, least: float, place: int, *, named: bool) -> None:
    label = f"{'' if named else '_'}least that the bytes read allow: {least:.1f} ms"
    for colour, width, name in (("white", 3.4, "_"), (INK, 1.7, label)):
        axes.plot(
            [least] * 2, [place - 0.42, place + 0.42], color=colour, linewidth=width, label=name
        )


# Plot: the share of its FFN neurons that each layer keeps.


def make(view: ResultsView) -> Plot | None:
    """Bars for the first mask, steps for the last where it differs, a line for an even spread.

    None where all layers keep the same share.
    """
    widths, masks = _widths(view), _masks(view)
    if not widths or not all(widths) or not masks or uniform(view):
        return None

    def draw(figure: Figure, palette: Palette, narrow: bool) -> None:
        axes = figure.subplots()
        _draw(axes, palette, masks, widths)
        legend(axes, 1 if narrow else 3)

    title = "FFN neurons kept in each layer"
    alt = f"Bars: share of the FFN neurons kept in each of {len(widths)} layers."
    return Plot("kept_neurons", title, alt, view.small_print, 3.4, draw)


def _widths(view: ResultsView) -> list[int]:
    return [int(layer.get("width") or 0) for layer in view.layers]


def _masks(view: ResultsView) -> list[Row]:
    return [mask for mask in view.remasks if len(mask.get("kept") or ()) == len(view.layers)]


def uniform(view: ResultsView) -> bool:
    """Whether every mask keeps the same share of each layer, so that a line per layer says nothing.

    Shares that differ by less than half a point are rounding.
    """
    widths = _widths(view)
    if not all(widths):
        return False
    shares = [_shares(mask["kept"], widths) for mask in _masks(view)]
    return bool(shares) and all(max(own) - min(own) < 0.5 for own in shares)


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
