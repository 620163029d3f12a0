"""Tables and curves of detection.

Pictures of detection: rates, delays and false alarms by rule; delay against false alarms.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from dart_llm.experiments.store import mapping
from dart_llm.files import write_csv, write_text
from dart_llm.reporting.figures import (
    DASHES,
    INK,
    KEY_LINE,
    LOOKS,
    Drawing,
    Kit,
    Palette,
    Plot,
    key,
    looks,
    mark,
    web_looks,
)
from dart_llm.reporting.table import table_lines
from dart_llm.reporting.words import count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# The tables of detection.json: Markdown, CSV, and the one on the terminal.


HEADS = (
    "signal",
    "rule",
    "found",
    "rate",
    "delay, median",
    "delay with misses",
    "false alarms / 1,000",
    "late",
    "blind",
    "gain",
)

Rows = Sequence[Mapping[str, Any]]


def cells(row: Mapping[str, Any]) -> list[str]:
    """One row for people, under ``HEADS``; intervals in brackets."""
    delay = row["delay_median"]
    return [
        row["signal"],
        row["rule"],
        f"{row['detected']}/{row['changes']}",
        _with(f"{row['rate']:.0%}", row["rate_interval"], "{:.0%}"),
        "-" if delay is None else _with(f"{delay:.0f}", row["delay_interval"], "{:.0f}"),
        _with(f"{row['delay_with_misses']:.0f}", row["delay_with_misses_interval"], "{:.0f}"),
        _with(f"{row['false_alarms_per_1000']:.1f}", row["fa_interval"], "{:.1f}"),
        str(row["late"]),
        f"{row['blind_rate']:.0%}",
        _with(f"{row['gain']:+.0%}", row["gain_interval"], "{:+.0%}"),
    ]


def _with(text: str, ends: Sequence[float] | None, form: str) -> str:
    return text if ends is None else f"{text} [{form.format(ends[0])}, {form.format(ends[1])}]"


def rich_table(document: Mapping[str, Any]) -> Table:
    """The rows; delays in tokens."""
    table = Table(title=table_title(document), title_justify="left")
    for number, head in enumerate(HEADS):
        table.add_column(
            head, justify="left" if number < 2 else "right", no_wrap=number < 2, min_width=4
        )
    for row in document["rows"]:
        table.add_row(*cells(row))
    return table


def table_title(document: Mapping[str, Any]) -> str:
    """What was tried on what."""
    passages, settings = document["passages"], document["settings"]
    name = str(document["checkpoint"].get("name") or settings["model"]).rstrip("/")
    changes = sum(len(passage["changes"]) for passage in passages)
    return (
        f"{name.rsplit('/', 1)[-1]}, dense: {count(changes, 'change')} in "
        f"{count(len(passages), 'passage')}, prompt {settings['prompt_tokens']} tokens, "
        f"horizon {settings['horizon']} tokens"
    )


def conclusion(document: Mapping[str, Any]) -> str:
    """One plain sentence about the rules, and one about the signals."""
    rows: Rows = document["rows"]
    best = max(rows, key=lambda row: (row["gain"], -row["false_alarms_per_1000"]))
    sure = [row for row in rows if row["gain_interval"] and row["gain_interval"][0] > 0]
    found = (
        f"Largest gain over a blind rule that fires as often: {_name(best)}, "
        f"{best['detected']} of {count(best['changes'], 'change')} against "
        f"{best['blind_rate']:.0%}, with {best['false_alarms_per_1000']:.1f} false alarms per "
        "1,000 tokens."
    )
    if any(row["gain_interval"] for row in rows):
        found += (
            f" {len(sure)} of {count(len(rows), 'row')} gain with an interval above 0"
            " (of twenty rules without merit, about one would)."
        )
    known = [signal for signal in document["signals"] if signal["auc"] is not None]
    if known:
        top = max(known, key=lambda signal: signal["auc"])
        found += (
            f" One window of {top['window']} tokens tells the topics apart best in {top['signal']}"
            f" (AUC {top['auc']:.2f})."
        )
    return found


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['rule']} on {row['signal']}" if row["signal"] != "none" else str(row["rule"])


def markdown(document: Mapping[str, Any]) -> str:
    """The tables, what their columns mean, and the conclusion."""
    lines = ["# Detection quality", "", table_title(document) + ".", ""]
    lines += table_lines(HEADS, [cells(row) for row in document["rows"]], left=2)
    lines += ["", conclusion(document), "", "## Signals", ""]
    heads: tuple[str, ...] = ("signal", "layers", "window", "AUC of one window")
    lines += table_lines(heads, [_signal_cells(row) for row in document["signals"]], left=2)
    lines += ["", "## Curves", ""]
    heads = ("signal", "W", "n0", "k", "rate", "delay, median", "delay with misses", "f.a. / 1,000")
    lines += table_lines(heads, [_point_cells(*point) for point in points(document)], left=1)
    lines += ["", "## What the columns mean", ""]
    lines += [f"- `{name}`: {words}" for name, words in document["definitions"].items()]
    return "\n".join([*lines, ""])


def _signal_cells(row: Mapping[str, Any]) -> list[str]:
    layers = row["layers"]
    ends = f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else "".join(map(str, layers))
    value = row["auc"]
    auc = "-" if value is None else _with(f"{value:.2f}", row["auc_interval"], "{:.2f}")
    return [row["signal"], ends, str(row["window"]), auc]


def points(document: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Every point of every curve, with its curve."""
    return [(curve, point) for curve in document["curves"] for point in curve["points"]]


def _point_cells(curve: Mapping[str, Any], point: Mapping[str, Any]) -> list[str]:
    delay = point["delay"]
    return [
        curve["signal"],
        str(curve["window"]),
        str(curve["n0"]),
        f"{point['k']:g}",
        f"{point['rate']:.0%}",
        "-" if delay is None else f"{delay:.0f}",
        f"{point['delay_with_misses']:.0f}",
        f"{point['false_alarms_per_1000']:.1f}",
    ]


def write(folder: Path, document: Mapping[str, Any]) -> None:
    """``detection.md`` and ``detection.csv`` (the rows, intervals as two columns)."""
    write_text(folder / "detection.md", markdown(document))
    rows = [_flat(row) for row in document["rows"]]
    write_csv(folder / "detection.csv", rows[0], [list(row.values()) for row in rows])


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in row.items():
        if name.endswith("_interval"):
            low, high = value or (None, None)
            found.update({f"{name}.low": low, f"{name}.high": high})
        else:
            found[name] = value
    return found


# Plots of detection.json: detection rate and delay against false alarms, a curve per signal.


BLIND = "blind rule"

QUANTITIES = (
    ("rate", "changes detected (%)", 100.0),
    ("delay_with_misses", "mean delay (tokens),\na miss = horizon", 1.0),
)

Curve = Mapping[str, Any]


def make_curves(document: Mapping[str, Any]) -> list[Plot]:
    """One plot per window length, the first named ``detection``; a column of panels per n0."""
    windows = list(dict.fromkeys(curve["window"] for curve in document["curves"]))
    return [_plot(document, window, first=number == 0) for number, window in enumerate(windows)]


def _plot(document: Mapping[str, Any], window: int, first: bool) -> Plot:
    curves = [curve for curve in document["curves"] if curve["window"] == window]
    counts = list(dict.fromkeys(curve["n0"] for curve in curves))
    names = list(dict.fromkeys(curve["signal"] for curve in curves))
    horizon = int(document["settings"]["horizon"])

    def draw(figure: Figure, palette: Palette, narrow: bool) -> None:
        looks = {name: mark(look, palette) for name, look in zip(names, cycle(LOOKS), strict=False)}
        drawn, above = _panels(figure, counts, narrow, len(names) + 1)
        for (n0, name), axes in drawn.items():
            own = [curve for curve in curves if curve["n0"] == n0]
            _draw(axes, own, looks, name, horizon)
            axes.set_title(f"n0 = {n0}", loc="left", fontsize=9, color=INK)
            axes.label_outer()
        key(above, list(drawn.values()), 2 if narrow else 3)

    steps = [point["k"] for curve in curves[:1] for point in curve["points"]]
    small = (
        f"theta = mu - k sigma, k from {min(steps):g} to {max(steps):g}; n0 low windows of "
        f"{window} tokens to a trigger · blind rule: fires at equal distances, with as many false "
        f"alarms · {table_title(document)} · {_checkpoint(document)}"
    )
    words = conclusion(document)
    alt = (
        "Panels: detection rate and mean delay over false alarms per 1,000 tokens, one line per "
        f"signal. {words}"
    )
    heading = f"How early a change of topic is noticed, for how many false alarms (W = {window})"
    return Plot(
        "detection" if first else f"detection-w{window}",
        heading,
        alt,
        small,
        5.4,
        draw,
        0.9 + 4.3 * len(counts),
    )


def _checkpoint(document: Mapping[str, Any]) -> str:
    known = mapping(document["checkpoint"])
    parts = [f"file quantisation {known.get('file_quantisation') or 'none'}", known.get("dtype")]
    if known.get("sha256"):
        parts.append(f"sha256 {str(known['sha256'])[:12]}")
    return " · ".join(str(part) for part in parts if part)


def _panels(
    figure: Figure, counts: Sequence[int], narrow: bool, lines: int
) -> tuple[dict[tuple[int, str], Axes], Axes]:
    """Panels by n0 and quantity, and the legend's place above them."""
    names = [name for name, _, _ in QUANTITIES]
    columns = 1 if narrow else len(counts)
    order = [(n0, name) for n0 in counts for name in names]
    if not narrow:
        order = [(n0, name) for name in names for n0 in counts]
    rows = len(order) // columns
    height = KEY_LINE * (lines // (2 if narrow else 3) + 1)
    grid = figure.add_gridspec(rows + 1, columns, height_ratios=[height, *[2.2] * rows])
    above = figure.add_subplot(grid[0, :])
    above.axis("off")
    found: dict[tuple[int, str], Axes] = {}
    for place, panel in enumerate(order):
        row, column = divmod(place, columns)
        same = next((axes for (_, name), axes in found.items() if name == panel[1]), None)
        found[panel] = figure.add_subplot(grid[row + 1, column], sharey=same, sharex=same)
    return found, above


def _draw(
    axes: Axes, curves: Sequence[Curve], looks: Mapping[str, Any], name: str, horizon: int
) -> None:
    label, factor = next((words, factor) for key_, words, factor in QUANTITIES if key_ == name)
    for curve in curves:
        x = [point["false_alarms_per_1000"] for point in curve["points"]]
        y = [factor * point[name] for point in curve["points"]]
        axes.plot(x, y, label=curve["signal"], **looks[curve["signal"]])
    most = max((p["false_alarms_per_1000"] for c in curves for p in c["points"]), default=0.0)
    x = [max(1.0, most) * step / 50 for step in range(51)]
    axes.plot(
        x,
        [factor * blind_rules(name, rate / 1000, horizon) for rate in x],
        color=INK,
        linestyle=DASHES,
        linewidth=1.3,
        zorder=1,
        label=BLIND,
    )
    axes.set_xlabel("false alarms per 1,000 tokens")
    axes.set_ylabel(label)
    axes.grid()
    axes.set_ylim(bottom=0)


def blind_rules(name: str, per_token: float, horizon: int) -> float:
    """A rule that fires every 1 / ``per_token`` tokens, the change anywhere between two alarms.

    ``rate``: min(1, H f).  The wait w is uniform on (0, 1 / f], a miss counts as H: the mean of
    min(w, H) is H - f H^2 / 2 for H f <= 1, and 1 / (2 f) beyond.
    """
    expected = horizon * per_token
    if name == "rate":
        return min(1.0, expected)
    return horizon * (1 - expected / 2) if expected <= 1 else 1 / (2 * per_token)


Row = Mapping[str, Any]

NUMBERS: tuple[tuple[str, str, str, float], ...] = (
    ("rate", "rate_interval", "changes detected (%)", 100.0),
    ("delay_median", "delay_interval", "median delay (tokens)", 1.0),
    ("false_alarms_per_1000", "fa_interval", "false alarms\nper 1,000 tokens", 1.0),
)
"""Key, field of the interval, axis, factor."""


def make_drawings(found: Row) -> Iterator[Drawing]:
    """The rates, then the curves of each window length, if the folder holds a detection.json."""
    if found.get("rows"):
        yield _rates(found)
    windows = list(dict.fromkeys(curve["window"] for curve in found.get("curves") or ()))
    for plot, window in zip(make_curves(found) if windows else (), windows, strict=True):
        yield _curves(plot, found, window)


def name(row: Row) -> str:
    return str(row["rule"]) if row["signal"] == "none" else f"{row['signal']}, {row['rule']}"


def _rates(found: Mapping[str, Any]) -> Drawing:
    rows = found["rows"]
    signals = list(dict.fromkeys(str(row["signal"]) for row in rows))
    bounded = any(row.get(ends) for row in rows for _, ends, _, _ in NUMBERS)
    words = "whiskers: 95 % intervals over passages" if bounded else "no intervals"
    small = f"{words} · {table_title(found)}"

    def draw(figure: Figure, palette: Palette, narrow: bool) -> None:
        styles = looks(signals, palette)
        panels = figure.subplots(3 if narrow else 1, 1 if narrow else 3, sharey=True, squeeze=False)
        for axes, (field, ends, label, factor) in zip(panels.flat, NUMBERS, strict=True):
            for place, row in enumerate(rows):
                look = {**styles[str(row["signal"])], "linestyle": "none", "markersize": 6.5}
                if row[field] is not None:
                    axes.plot(factor * row[field], place, zorder=3, **look)
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
    title = conclusion(found).partition(". ")[0]
    plot = Plot("detection_rates", title, alt, small, 1.2 + tall, draw, 1.6 + 3 * (tall + 0.5))
    return Drawing(plot, lambda kit: _web_rates(kit, rows, signals), "", 160 + 24 * len(rows), 3)


def _web_rates(kit: Kit, rows: Sequence[Row], signals: Sequence[str]) -> Any:
    figure = kit.subplots(rows=1, cols=3, shared_yaxes=True, horizontal_spacing=0.03)
    found = web_looks(signals, kit)
    for column, (field, ends, label, factor) in enumerate(NUMBERS, start=1):
        known = [row for row in rows if row[field] is not None]
        low, high = ([_end(row, field, ends, side) * factor for row in known] for side in (0, 1))
        markers = [found[str(row["signal"])]["marker"] for row in known]
        trace = kit.go.Scatter(
            x=[factor * row[field] for row in known],
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


def _end(row: Row, field: str, ends: str, side: int) -> float:
    """The length of one whisker."""
    return abs(row[ends][side] - row[field]) if row.get(ends) else 0.0


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
    for column, n0 in enumerate(counts, start=1):
        for curve in curves:
            if curve["n0"] == n0:
                figure.add_trace(_web_curve(kit, curve, found, column == 1), row=1, col=column)
        trace = kit.go.Scatter(
            x=blind,
            y=[blind_rules("delay", rate / 1000, horizon) for rate in blind],
            name=BLIND,
            legendgroup="blind",
            showlegend=column == 1,
            mode="lines",
            line={"color": INK, "width": 1.5, "dash": "6px,4px"},
            hoverinfo="skip",
        )
        figure.add_trace(trace, row=1, col=column)
        title = f"n0 = {n0}: false alarms<br>per 1,000 tokens"
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
