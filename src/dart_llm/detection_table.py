"""The tables of detection.json: Markdown, CSV, and the one on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from dart_llm.markdown import table_lines
from dart_llm.results import write_csv, write_text
from dart_llm.sentences import count

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
    table = Table(title=title(document), title_justify="left")
    for number, head in enumerate(HEADS):
        table.add_column(
            head, justify="left" if number < 2 else "right", no_wrap=number < 2, min_width=4
        )
    for row in document["rows"]:
        table.add_row(*cells(row))
    return table


def title(document: Mapping[str, Any]) -> str:
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
    lines = ["# Detection quality", "", title(document) + ".", ""]
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
