"""Pictures of detection: rates, delays and false alarms by rule; delay against false alarms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dart_llm import detection_plot, detection_table
from dart_llm.drift_view import DriftView
from dart_llm.plot_base import INK, Palette, Plot
from dart_llm.plot_topics import Drawing, Kit, looks, web_looks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = Mapping[str, Any]

NUMBERS: tuple[tuple[str, str, str, float], ...] = (
    ("rate", "rate_interval", "changes detected (%)", 100.0),
    ("delay_median", "delay_interval", "median delay (tokens)", 1.0),
    ("false_alarms_per_1000", "fa_interval", "false alarms\nper 1,000 tokens", 1.0),
)
"""Key, key of the interval, axis, factor."""


def make(view: DriftView) -> Iterator[Drawing]:
    """The rates, then the curves of each window length, if the folder holds a detection.json."""
    found = view.detection
    if found.get("rows"):
        yield _rates(found)
    windows = list(dict.fromkeys(curve["window"] for curve in found.get("curves") or ()))
    for plot, window in zip(detection_plot.make(found) if windows else (), windows, strict=True):
        yield _curves(plot, found, window)


def name(row: Row) -> str:
    return str(row["rule"]) if row["signal"] == "none" else f"{row['signal']}, {row['rule']}"


def _rates(found: Mapping[str, Any]) -> Drawing:
    rows = found["rows"]
    signals = list(dict.fromkeys(str(row["signal"]) for row in rows))
    bounded = any(row.get(ends) for row in rows for _, ends, _, _ in NUMBERS)
    words = "whiskers: 95 % intervals over passages" if bounded else "no intervals"
    small = f"{words} · {detection_table.title(found)}"

    def draw(figure: Figure, palette: Palette, narrow: bool) -> None:
        styles = looks(signals, palette)
        panels = figure.subplots(3 if narrow else 1, 1 if narrow else 3, sharey=True, squeeze=False)
        for axes, (key, ends, label, factor) in zip(panels.flat, NUMBERS, strict=True):
            for place, row in enumerate(rows):
                look = {**styles[str(row["signal"])], "linestyle": "none", "markersize": 6.5}
                if row[key] is not None:
                    axes.plot(factor * row[key], place, zorder=3, **look)
                if row.get(ends):
                    x = [factor * end for end in row[ends]]
                    axes.plot(x, [place, place], color=INK, linewidth=1.3, zorder=2)
            axes.set_xlabel(label.replace("\n", " ") if narrow else label)
            axes.grid(axis="x")
            axes.set_xlim(left=-3 if factor > 1 else None, right=105 if factor > 1 else None)
            axes.set_yticks(range(len(rows)), [name(row) for row in rows], fontsize=8)
            axes.set_ylim(len(rows) - 0.4, -0.6)
            axes.grid(axis="y", linewidth=0.4)

    listed = "; ".join(f"{name(row)}: {100 * row['rate']:.0f} %" for row in rows)
    alt = f"Points: detection rate, delay and false alarms. {listed}."
    tall = 0.24 * len(rows)
    title = detection_table.conclusion(found).partition(". ")[0]
    plot = Plot("detection_rates", title, alt, small, 1.2 + tall, draw, 1.6 + 3 * (tall + 0.5))
    return Drawing(plot, lambda kit: _web_rates(kit, rows, signals), "", 160 + 24 * len(rows), 3)


def _web_rates(kit: Kit, rows: Sequence[Row], signals: Sequence[str]) -> Any:
    figure = kit.subplots(rows=1, cols=3, shared_yaxes=True, horizontal_spacing=0.03)
    found = web_looks(signals, kit)
    for column, (key, ends, label, factor) in enumerate(NUMBERS, start=1):
        known = [row for row in rows if row[key] is not None]
        low, high = ([_end(row, key, ends, side) * factor for row in known] for side in (0, 1))
        markers = [found[str(row["signal"])]["marker"] for row in known]
        trace = kit.go.Scatter(
            x=[factor * row[key] for row in known],
            y=[name(row) for row in known],
            mode="markers",
            cliponaxis=False,
            marker={
                "symbol": [marker["symbol"] for marker in markers],
                "color": [marker["color"] for marker in markers],
                "size": 9,
                "line": {"color": INK, "width": 0.9},
            },
            error_x={"type": "data", "array": high, "arrayminus": low, "color": INK},
            hovertemplate="%{y}: %{x:.1f}<extra></extra>",
            showlegend=False,
        )
        figure.add_trace(trace, row=1, col=column)
        title = label.replace("\n", "<br>").replace(" (", "<br>(")
        figure.update_xaxes(title_text=title, rangemode="tozero", row=1, col=column)
    order = [name(row) for row in rows][::-1]
    figure.update_yaxes(categoryorder="array", categoryarray=order, tickfont={"size": 11})
    return figure


def _end(row: Row, key: str, ends: str, side: int) -> float:
    """The length of one whisker."""
    return abs(row[ends][side] - row[key]) if row.get(ends) else 0.0


def _curves(plot: Plot, found: Mapping[str, Any], window: int) -> Drawing:
    curves = [curve for curve in found["curves"] if curve["window"] == window]
    counts = list(dict.fromkeys(curve["n0"] for curve in curves))
    horizon = int(found["settings"]["horizon"])
    return Drawing(
        plot, lambda kit: _web_curves(kit, curves, counts, horizon), "", 460, len(counts)
    )


def _web_curves(kit: Kit, curves: Sequence[Row], counts: Sequence[int], horizon: int) -> Any:
    """Mean delay, a miss counting as the horizon, over false alarms; the blind rule dashed."""
    figure = kit.subplots(rows=1, cols=len(counts), shared_yaxes=True, horizontal_spacing=0.04)
    found = web_looks(list(dict.fromkeys(curve["signal"] for curve in curves)), kit)
    most = max(p["false_alarms_per_1000"] for curve in curves for p in curve["points"])
    blind = [max(1.0, most) * step / 40 for step in range(41)]
    for column, count in enumerate(counts, start=1):
        for curve in curves:
            if curve["n0"] == count:
                figure.add_trace(_web_curve(kit, curve, found, column == 1), row=1, col=column)
        trace = kit.go.Scatter(
            x=blind,
            y=[detection_plot.blind("delay", rate / 1000, horizon) for rate in blind],
            name=detection_plot.BLIND,
            legendgroup="blind",
            showlegend=column == 1,
            mode="lines",
            line={"color": INK, "width": 1.5, "dash": "6px,4px"},
            hoverinfo="skip",
        )
        figure.add_trace(trace, row=1, col=column)
        title = f"n0 = {count}: false alarms<br>per 1,000 tokens"
        figure.update_xaxes(title_text=title, rangemode="tozero", row=1, col=column)
    figure.update_yaxes(rangemode="tozero")
    words = "mean delay (tokens),<br>a miss = horizon"
    figure.update_yaxes(title_text=words, row=1, col=1)
    return figure


def _web_curve(kit: Kit, curve: Row, found: Mapping[str, Any], named: bool) -> Any:
    known = sorted(
        curve["points"], key=lambda p: (p["false_alarms_per_1000"], p["delay_with_misses"])
    )
    return kit.go.Scatter(
        x=[point["false_alarms_per_1000"] for point in known],
        y=[point["delay_with_misses"] for point in known],
        name=curve["signal"],
        legendgroup=curve["signal"],
        showlegend=named,
        mode="lines+markers",
        customdata=[
            f"k = {point['k']:g}: {100 * point['rate']:.0f} % detected, "
            f"{point['false_alarms_per_1000']:.2f} false alarms per 1,000"
            for point in known
        ],
        hovertemplate="%{y:.0f} tokens late<br>%{customdata}",
        **found[curve["signal"]],
    )
