"""Tables, headline and curves of detection.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dart_llm.reporting.figures import DASHES, INK, LOOKS, Palette, Plot, key, mark, panels
from dart_llm.reporting.table import Column, Table
from dart_llm.reporting.words import checkpoint_line, count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]

RULES = (
    Column("signal", "signal"),
    Column("rule", "rule"),
    Column("detected", lambda row: f"{row['detected']}/{row['changes']}"),
    Column("rate", "rate", ".0%", "rate_interval"),
    Column("delay, median", "delay_median", ".0f"),
    Column("delay with misses", "delay_with_misses", ".0f", "delay_with_misses_interval"),
    Column("false alarms / 1,000", "false_alarms_per_1000", ".1f", "fa_interval"),
    Column("late", "late"),
    Column("blind", "blind_rate", ".0%"),
    Column("gain", "gain", "+.0%", "gain_interval"),
)

SIGNALS = (
    Column("signal", "signal"),
    Column("window", "window"),
    Column("AUC of one window", "auc", ".2f", "auc_interval"),
)


def rules_table(document: Row) -> Table:
    """The rows; delays in tokens, intervals in brackets."""
    caption = table_title(document)
    return Table("detection", caption, RULES, document["rows"], left=2, nothing="-")


def table_title(document: Row) -> str:
    """What was tried on what."""
    passages, settings = document["passages"], document["settings"]
    name = Path(str(document["checkpoint"].get("name") or settings["model"]).rstrip("/")).name
    changes = sum(len(passage["changes"]) for passage in passages)
    return (
        f"{name}, dense: {count(changes, 'change')} in {count(len(passages), 'passage')}, prompt "
        f"{settings['prompt_tokens']} tokens, horizon {settings['horizon']} tokens"
    )


def headline(document: Row) -> str:
    """The rule with the largest gain over a blind one."""
    rows: Sequence[Row] = document["rows"]
    best = max(rows, key=lambda row: (row["gain"], -row["false_alarms_per_1000"]))
    return (
        f"Largest gain over a blind rule that fires as often: {name(best)}, "
        f"{best['detected']} of {count(best['changes'], 'change')} against "
        f"{best['blind_rate']:.0%}, with {best['false_alarms_per_1000']:.1f} false alarms per "
        "1,000 tokens."
    )


def name(row: Row) -> str:
    """Rule, and the signal that it watches if any."""
    return f"{row['rule']} on {row['signal']}" if row["signal"] != "none" else str(row["rule"])


def signals_table(document: Row) -> Table:
    """How well one window of each signal tells old topic from new; in detection.md alone."""
    return Table("", "Signals", SIGNALS, document["signals"], nothing="-", terminal=False)


# Detection rate and delay against false alarms, a curve per signal.

QUANTITIES = {
    "rate": ("changes detected (%)", 100.0),
    "delay_with_misses": ("mean delay (tokens),\na miss = horizon", 1.0),
}
"""Of a curve's points: axis and factor."""


def make_curves(document: Row) -> list[Plot]:
    """One plot per window length, the first named ``detection``; a row of panels per n0."""
    windows = list(dict.fromkeys(curve["window"] for curve in document.get("curves", ())))
    return [_plot(document, window, first=number == 0) for number, window in enumerate(windows)]


def _plot(document: Row, window: int, first: bool) -> Plot:
    curves = [curve for curve in document["curves"] if curve["window"] == window]
    names = list(dict.fromkeys(curve["signal"] for curve in curves))
    counts = list(dict.fromkeys(curve["n0"] for curve in curves))
    horizon = int(document["settings"]["horizon"])

    def draw(figure: Figure, palette: Palette) -> None:
        styles = {
            name: mark(look, palette) for name, look in zip(names, cycle(LOOKS), strict=False)
        }
        above, *drawn = panels(figure, 2 * len(counts), 1 + len(names) // 3)
        for number, axes in enumerate(drawn):
            if number > 1:
                axes.sharex(drawn[number % 2])
                axes.sharey(drawn[number % 2])
            n0, name = counts[number // 2], [*QUANTITIES][number % 2]
            shown = [curve for curve in curves if curve["n0"] == n0]
            _draw(axes, shown, styles, name, horizon)
            axes.set_title(f"n0 = {n0}", loc="left", fontsize=9, color=INK)
            axes.set_xlabel("false alarms per 1,000 tokens" if number >= len(drawn) - 2 else "")
        key(above, drawn, 3)

    small = (
        f"theta = mu - k sigma, a marker per k; n0 low windows of {window} tokens to a trigger · "
        "blind rule: fires at equal distances, with as many false alarms · "
        f"{checkpoint_line(table_title(document), document['checkpoint'])}"
    )
    alt = (
        "Panels: detection rate and mean delay over false alarms per 1,000 tokens, one line per "
        f"signal. {headline(document)}"
    )
    heading = f"How early a change of topic is noticed, for how many false alarms (W = {window})"
    name = "detection" if first else f"detection-w{window}"
    return Plot(name, heading, alt, small, 1.4 + 2.3 * len(counts), draw)


def _draw(axes: Axes, curves: Sequence[Row], styles: Row, name: str, horizon: int) -> None:
    label, factor = QUANTITIES[name]
    for curve in curves:
        x = [point["false_alarms_per_1000"] for point in curve["points"]]
        y = [factor * point[name] for point in curve["points"]]
        axes.plot(x, y, label=curve["signal"], **styles[curve["signal"]])
    most = max((p["false_alarms_per_1000"] for c in curves for p in c["points"]), default=0.0)
    x = [max(1.0, most) * step / 50 for step in range(51)]
    blind = [factor * blind_rule(name, rate / 1000, horizon) for rate in x]
    look: dict[str, Any] = {"color": INK, "linestyle": DASHES, "linewidth": 1.3, "zorder": 1}
    axes.plot(x, blind, label="blind rule", **look)
    axes.set_ylabel(label)
    axes.grid()
    axes.set_ylim(bottom=0)


def blind_rule(name: str, per_token: float, horizon: int) -> float:
    """A rule that fires every 1 / ``per_token`` tokens, the change anywhere between two alarms.

    ``rate``: min(1, H f).  The wait w is uniform on (0, 1 / f], a miss counts as H: the mean of
    min(w, H) is H - f H^2 / 2 for H f <= 1, and 1 / (2 f) beyond.
    """
    expected = horizon * per_token
    if name == "rate":
        return min(1.0, expected)
    return horizon * (1 - expected / 2) if expected <= 1 else 1 / (2 * per_token)
