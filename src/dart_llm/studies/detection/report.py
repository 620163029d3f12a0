"""Tables, conclusion and figures of detection.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

from dart_llm.experiments.store import mapping
from dart_llm.reporting.figures import (
    DASHES,
    INK,
    LOOKS,
    Drawing,
    Palette,
    Plot,
    heights,
    key,
    looks,
    mark,
    name_bars,
    panels,
)
from dart_llm.reporting.table import Column, Table
from dart_llm.reporting.words import count, dtype_text, file_text, intervals_over

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


Row = Mapping[str, Any]

RULES = (
    Column("signal", "signal", wrap=False),
    Column("rule", "rule", wrap=False),
    Column("found", lambda row: f"{row['detected']}/{row['changes']}"),
    Column("rate", "rate", ".0%", "rate_interval"),
    Column("delay, median", "delay_median", ".0f", "delay_interval"),
    Column("delay with misses", "delay_with_misses", ".0f", "delay_with_misses_interval"),
    Column("false alarms / 1,000", "false_alarms_per_1000", ".1f", "fa_interval"),
    Column("late", "late"),
    Column("blind", "blind_rate", ".0%"),
    Column("gain", "gain", "+.0%", "gain_interval"),
)

SIGNALS = (
    Column("signal", "signal"),
    Column(
        "layers",
        "layers",
        lambda own: "-".join(map(str, dict.fromkeys((own[0], own[-1])))) if own else "",
    ),
    Column("window", "window"),
    Column("AUC of one window", "auc", ".2f", "auc_interval"),
)

POINTS = (
    Column("signal", "signal"),
    Column("W", "window"),
    Column("n0", "n0"),
    Column("k", "k", "g"),
    Column("rate", "rate", ".0%"),
    Column("delay, median", "delay", ".0f"),
    Column("delay with misses", "delay_with_misses", ".0f"),
    Column("f.a. / 1,000", "false_alarms_per_1000", ".1f"),
)


def rules_table(document: Row) -> Table:
    """The rows; delays in tokens, intervals in brackets."""
    caption = table_title(document)
    return Table("detection", caption, RULES, document["rows"], left=2, nothing="-")


def table_title(document: Row) -> str:
    """What was tried on what."""
    passages, settings = document["passages"], document["settings"]
    name = str(document["checkpoint"].get("name") or settings["model"]).rstrip("/")
    changes = sum(len(passage["changes"]) for passage in passages)
    return (
        f"{name.rsplit('/', 1)[-1]}, dense: {count(changes, 'change')} in "
        f"{count(len(passages), 'passage')}, prompt {settings['prompt_tokens']} tokens, "
        f"horizon {settings['horizon']} tokens"
    )


def conclusion(document: Row) -> str:
    """One plain sentence about the rules, and one about the signals."""
    rows: Sequence[Row] = document["rows"]
    best = max(rows, key=lambda row: (row["gain"], -row["false_alarms_per_1000"]))
    sure = [row for row in rows if row["gain_interval"] and row["gain_interval"][0] > 0]
    found = (
        f"Largest gain over a blind rule that fires as often: {name(best)}, "
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


def name(row: Row) -> str:
    """Rule, and the signal that it watches if any."""
    return f"{row['rule']} on {row['signal']}" if row["signal"] != "none" else str(row["rule"])


def markdown(document: Row) -> str:
    """The tables, what their columns mean, and the conclusion."""
    points = [{**curve, **point} for curve in document["curves"] for point in curve["points"]]
    signals = Table("", "", SIGNALS, document["signals"], left=2, nothing="-")
    curves = Table("", "", POINTS, points, nothing="-")
    definitions = (f"- `{name}`: {words}" for name, words in document["definitions"].items())
    lines = ["# Detection quality", "", f"{table_title(document)}.", ""]
    lines += [*rules_table(document).lines(), "", conclusion(document), ""]
    lines += ["## Signals", "", *signals.lines(), "", "## Curves", "", *curves.lines(), ""]
    return "\n".join([*lines, "## What the columns mean", "", *definitions, ""])


# Detection rate and delay against false alarms, a curve per signal.


BLIND = "blind rule"

QUANTITIES = {
    "rate": ("changes detected (%)", 100.0),
    "delay_with_misses": ("mean delay (tokens),\na miss = horizon", 1.0),
}
"""Of a curve's points: axis and factor."""


def make_curves(document: Row) -> list[Plot]:
    """One plot per window length, the first named ``detection``; a row of panels per n0."""
    windows = list(dict.fromkeys(curve["window"] for curve in document["curves"]))
    return [_plot(document, window, first=number == 0) for number, window in enumerate(windows)]


def _plot(document: Row, window: int, first: bool) -> Plot:
    curves = [curve for curve in document["curves"] if curve["window"] == window]
    names = list(dict.fromkeys(curve["signal"] for curve in curves))
    counts = dict.fromkeys(curve["n0"] for curve in curves)
    order = [(n0, quantity) for n0 in counts for quantity in QUANTITIES]
    lines = len(names) // 3 + 1

    def draw(figure: Figure, palette: Palette, narrow: bool) -> None:
        looks = {name: mark(look, palette) for name, look in zip(names, cycle(LOOKS), strict=False)}
        above, *drawn = panels(figure, len(order), narrow, lines)
        for place, (axes, (n0, quantity)) in enumerate(zip(drawn, order, strict=True)):
            if place >= len(QUANTITIES):
                axes.sharex(drawn[place % len(QUANTITIES)])
                axes.sharey(drawn[place % len(QUANTITIES)])
            own = [curve for curve in curves if curve["n0"] == n0]
            _draw(axes, own, looks, quantity, int(document["settings"]["horizon"]))
            axes.set_title(f"n0 = {n0}", loc="left", fontsize=9, color=INK)
        key(above, drawn, 2 if narrow else 3)

    steps = [point["k"] for curve in curves[:1] for point in curve["points"]]
    small = (
        f"theta = mu - k sigma, k from {min(steps):g} to {max(steps):g}; n0 low windows of "
        f"{window} tokens to a trigger · blind rule: fires at equal distances, with as many false "
        f"alarms · {table_title(document)} · {_checkpoint(document)}"
    )
    alt = (
        "Panels: detection rate and mean delay over false alarms per 1,000 tokens, one line per "
        f"signal. {conclusion(document)}"
    )
    heading = f"How early a change of topic is noticed, for how many false alarms (W = {window})"
    name = "detection" if first else f"detection-w{window}"
    return Plot(name, heading, alt, small, *heights(len(order), draw, lines))


def _checkpoint(document: Row) -> str:
    known = mapping(document["checkpoint"])
    parts = [file_text(known)]
    parts += [dtype_text(known)] if known.get("dtype") else []
    if known.get("sha256"):
        parts.append(f"sha256 {str(known['sha256'])[:12]}")
    return " · ".join(parts)


def _draw(axes: Axes, curves: Sequence[Row], looks: Row, name: str, horizon: int) -> None:
    label, factor = QUANTITIES[name]
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


NUMBERS: tuple[tuple[str, str, str, float], ...] = (
    ("rate", "rate_interval", "changes detected (%)", 100.0),
    ("delay_median", "delay_interval", "median delay (tokens)", 1.0),
    ("false_alarms_per_1000", "fa_interval", "false alarms\nper 1,000 tokens", 1.0),
)
"""Key, field of the interval, axis, factor."""


def make_drawings(document: Row) -> Iterator[Drawing]:
    """The rates, then the curves of each window length, if there is a detection.json."""
    if document.get("rows"):
        yield Drawing(_rates(document))
    if document.get("curves"):
        yield from map(Drawing, make_curves(document))


def _rates(document: Row) -> Plot:
    rows = document["rows"]
    signals = list(dict.fromkeys(str(row["signal"]) for row in rows))
    drawn = intervals_over("whiskers", len(document["passages"]), "passages")
    small = f"{drawn} · {table_title(document)}"

    def draw(figure: Figure, palette: Palette, narrow: bool) -> None:
        styles = looks(signals, palette)
        grid = figure.subplots(3 if narrow else 1, 1 if narrow else 3, sharey=True, squeeze=False)
        for axes, (field, ends, label, factor) in zip(grid.flat, NUMBERS, strict=True):
            for place, row in enumerate(rows):
                look = {**styles[str(row["signal"])], "linestyle": "none", "markersize": 6.5}
                if row[field] is not None:
                    axes.plot(factor * row[field], place, zorder=3, **look)
                if row.get(ends):
                    x = [factor * end for end in row[ends]]
                    axes.plot(x, [place, place], color=INK, linewidth=1.3, zorder=2)
            axes.set_xlabel(label.replace("\n", " ") if narrow else label)
            axes.set_xlim(left=-3 if factor > 1 else None, right=105 if factor > 1 else None)
            name_bars(axes, [name(row) for row in rows])

    listed = "; ".join(f"{name(row)}: {100 * row['rate']:.0f} %" for row in rows)
    alt = f"Points: detection rate, delay and false alarms. {listed}."
    tall = 0.24 * len(rows)
    title = "Changes detected, delay and false alarms, by rule and signal"
    return Plot("detection_rates", title, alt, small, 1.2 + tall, draw, 1.6 + 3 * (tall + 0.5))
