"""One row per method: means, paired intervals, sentence.

The summary of a drift study as Markdown, CSV, a table for the terminal, and one sentence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from rich.table import Table

from dart_llm.experiments import stats
from dart_llm.experiments.index import ACCOUNTING
from dart_llm.experiments.rows import DENSE as UNTOUCHED
from dart_llm.experiments.stats import Sample, Value
from dart_llm.pruning.records import merge_reports
from dart_llm.reporting.table import table_lines
from dart_llm.reporting.words import count
from dart_llm.studies.drift.methods import DENSE, NEVER
from dart_llm.studies.drift.record import DONE
from dart_llm.studies.drift.settings import FORCED

# A drift study in one row per method: means over its sources with 95 % intervals.
#
# A source (a prompt or a passage) is one item, whatever the seeds: several seeds of it are
# averaged first.  Differences to dense and to ``never`` are paired by source.


Row = Mapping[str, Any]


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """The summary of the lines of results.jsonl; ``rows`` in its answer are in their order.

    Without scipy the intervals are null and ``notes`` says so.
    """
    labels = list(dict.fromkeys(row["label"] for row in rows))
    done = {
        name: [r for r in rows if r["label"] == name and r["status"] == DONE] for name in labels
    }
    forced = any(row["cell"]["mode"] == FORCED for row in rows)
    lines = []
    for label in labels:
        own = done[label]
        cell = next(row["cell"] for row in rows if row["label"] == label)
        line: dict[str, Any] = {
            "label": label,
            "method": cell["method"],
            "sparsity": cell["sparsity"],
            "cells": len(own),
            "failed": sum(row["label"] == label for row in rows) - len(own),
            "sources": len({row["cell"]["source"] for row in own}),
            **accounting(own),
            "loss": None,
            "metrics": None,
        }
        if own and forced:
            never = done.get(f"{NEVER}@{label.partition('@')[2]}", [])
            line["loss"] = losses(own, done.get(DENSE, []), never)
        elif own:
            line |= _lengths(own)
            line["metrics"] = metrics(own)
        lines.append(line)
    sources = {row["cell"]["source"] for row in rows}
    notes = (
        []
        if stats.available()
        else ["no intervals: this needs scipy (pip install 'dart-llm[drift]')"]
    )
    return {
        "mode": rows[0]["cell"]["mode"] if rows else None,
        "model": rows[0]["cell"]["model"] if rows else None,
        "dtype": rows[0]["cell"]["dtype"] if rows else None,
        "sources": len(sources),
        "rows": lines,
        "notes": notes,
    }


def accounting(rows: Sequence[Row]) -> dict[str, Any]:
    """Over all cells, weighted by decoded tokens; ``remasks_per_cell``: their mean."""
    reports = [{**row["accounting"], "sequences": []} for row in rows if row["accounting"]]
    merged = merge_reports(reports) if reports else UNTOUCHED
    found: dict[str, Any] = {name: merged[name] for name in ACCOUNTING}
    found["remask_causes"] = dict(merged.get("remask_causes", {}))
    found["remasks_per_cell"] = merged["remasks"] / len(rows) if rows else None
    return found


def losses(rows: Sequence[Row], dense: Sequence[Row], never: Sequence[Row]) -> dict[str, Any]:
    """Mean losses in nats before, after and some time after the changes, and recovery.

    ``after``: all tokens of all topics but the first.  ``later``: those from ``from`` tokens after
    each change on.  ``..._minus_dense`` and ``..._minus_never``: paired by source.
    """
    found: dict[str, Any] = {}
    for name in ("before", "after", "later"):
        own = _losses(rows, name)
        found[name] = _mean(own)
        for other, others in (("dense", dense), ("never", never)):
            if name != "before":
                found[f"{name}_minus_{other}"] = _paired(own, _losses(others, name))
    froms = [t["later"]["from"] for r in rows for t in r["loss"]["topics"] if t["later"]]
    found["from"] = froms[0] if froms else None
    changes = [change for row in rows for change in row["loss"]["recovery"] or ()]
    tokens = [change["tokens"] for change in changes if change["tokens"] is not None]
    found["recovery"] = {
        "changes": len(changes),
        "recovered": len(tokens),
        "mean_tokens": math.fsum(tokens) / len(tokens) if tokens else None,
    }
    return found


def _losses(rows: Iterable[Row], name: str) -> dict[str, Value]:
    """Mean loss and tokens of every source, over its seeds and the topics in question."""
    sums: dict[str, list[tuple[float, int]]] = {}
    for row in rows:
        for topic in row["loss"]["topics"]:
            part = topic["later"] if name == "later" else topic
            wanted = (topic["topic"] == 0) == (name == "before")
            if wanted and part is not None and part["mean_loss"] is not None:
                sums.setdefault(row["cell"]["source"], []).append(
                    (part["mean_loss"], part["tokens"])
                )
    return {
        source: (
            math.fsum(loss * tokens for loss, tokens in parts) / sum(t for _, t in parts),
            float(sum(t for _, t in parts)),
        )
        for source, parts in sums.items()
    }


def metrics(rows: Sequence[Row]) -> dict[str, Any] | None:
    """Every number of text_metrics.py, averaged over the sources that have it; None of dense."""
    names = dict.fromkeys(name for row in rows for name in row["metrics"] or ())
    found = {}
    for name in names:
        values: dict[str, list[float]] = {}
        for row in rows:
            value = (row["metrics"] or {}).get(name)
            if value is not None:
                values.setdefault(row["cell"]["source"], []).append(value)
        found[name] = _mean({key: math.fsum(own) / len(own) for key, own in values.items()})
    return found or None


def _lengths(rows: Sequence[Row]) -> dict[str, Any]:
    tokens = {f"{r['cell']['source']}/{r['cell']['seed']}": r["decoded_tokens"] for r in rows}
    ended = sum(row["finish"] == "eos" for row in rows)
    return {"mean_tokens": sum(tokens.values()) / len(tokens), "ended_share": ended / len(rows)}


def _mean(values: Sample) -> dict[str, Any] | None:
    """``mean`` with its interval over ``n`` sources; None of nothing."""
    if not values:
        return None
    found = stats.known(values)
    low, high = (None, None) if found is None else (found.low, found.high)
    return {"mean": stats.mean(values), "low": low, "high": high, "n": len(values)}


def _paired(own: Sample, other: Sample) -> dict[str, Any] | None:
    """The mean difference over shared sources, weighted by their tokens; None without any."""
    shared = own.keys() & other.keys()
    first, second = ({name: values[name] for name in shared} for values in (own, other))
    one, two = stats.mean(first), stats.mean(second)
    if one is None or two is None:
        return None
    found = stats.known(first, second)
    return {
        "mean": one - two,
        "low": None if found is None else found.low,
        "high": None if found is None else found.high,
        "n": len(shared),
        "significant": None if found is None else found.significant,
    }


Line = Mapping[str, Any]

Column = tuple[str, Callable[[Line], str]]

SHOWN = {
    "rougeL": "ROUGE-L",
    "bleu": "BLEU",
    "bertscore": "BERTScore",
    "document_similarity": "document",
    "sentence_coverage": "coverage",
}
"""Metrics in the tables and their heads; summary.json and summary.csv have all of them."""

NONE = "-"

NEAR = 0.05
"""Methods whose achieved sparsities lie so near are called comparable."""


def columns(summary: Mapping[str, Any], brief: bool = False) -> list[Column]:
    """Heads and how each is made from a row of the summary.

    ``brief``: intervals of the differences to ``never`` alone, for a terminal's width.
    """
    found: list[Column] = [
        ("method", lambda line: str(line["label"])),
        ("achieved", lambda line: f"{line['achieved_sparsity']:.1%}"),
        ("dense tokens", lambda line: f"{line['dense_token_share']:.1%}"),
        ("re-masks", lambda line: _number(line["remasks_per_cell"], 1)),
    ]
    if summary["mode"] == FORCED:
        found += _loss_columns(summary, brief)
    else:
        found.append(("tokens", lambda line: _number(line.get("mean_tokens"), 0)))
        known = {name for line in summary["rows"] for name in line["metrics"] or ()}
        found += [(head, _metric(name, brief)) for name, head in SHOWN.items() if name in known]
    if any(line["failed"] for line in summary["rows"]):
        found.append(("failed", lambda line: str(line["failed"])))
    return found


def _loss_columns(summary: Mapping[str, Any], brief: bool) -> list[Column]:
    moment = next((line["loss"]["from"] for line in summary["rows"] if line["loss"]), None)
    later = "later" if moment is None else f"from token {moment}"
    return [
        ("before", _loss("before", brief)),
        ("after", _loss("after", brief)),
        *([] if brief else [("after minus dense", _loss("after_minus_dense"))]),
        ("after minus never", _loss("after_minus_never")),
        (later, _loss("later", brief)),
        (f"{later} minus never", _loss("later_minus_never")),
        ("recovered in", _recovery),
    ]


def _loss(name: str, brief: bool = False) -> Callable[[Line], str]:
    other = name.partition("_minus_")[2]

    def show(line: Line) -> str:
        if line["method"] == other:
            return NONE  # against itself
        return _interval((line["loss"] or {}).get(name), bool(other), brief)

    return show


def _metric(name: str, brief: bool) -> Callable[[Line], str]:
    return lambda line: _interval((line["metrics"] or {}).get(name), brief=brief)


def _interval(value: Mapping[str, Any] | None, signed: bool = False, brief: bool = False) -> str:
    if value is None or value["mean"] is None:
        return NONE
    show = "{:+.3f}" if signed else "{:.3f}"
    text = show.format(value["mean"])
    if value["low"] is None or brief:
        return text
    return f"{text} ({show.format(value['low'])} to {show.format(value['high'])})"


def _number(value: float | None, digits: int) -> str:
    return NONE if value is None else f"{value:.{digits}f}"


def _recovery(line: Line) -> str:
    found = (line["loss"] or {}).get("recovery")
    if line["method"] == DENSE or not found or not found["changes"]:
        return NONE
    recovered = f"{found['recovered']} of {found['changes']}"
    mean = found["mean_tokens"]
    return recovered if mean is None else f"{mean:.0f} tokens ({recovered})"


def table(summary: Mapping[str, Any], title: str) -> Table:
    """For the terminal; losses in nats."""
    found = Table(title=title, title_justify="left")
    shown = columns(summary, brief=True)
    for place, (head, _) in enumerate(shown):
        side: Literal["left", "right"] = "right" if place else "left"
        found.add_column(head, justify=side, overflow="fold", no_wrap=not place)
    for line in summary["rows"]:
        found.add_row(*(make(line) for _, make in shown))
    return found


def markdown(summary: Mapping[str, Any], title: str) -> str:
    """summary.md."""
    shown = columns(summary)
    rows = ([make(line) for _, make in shown] for line in summary["rows"])
    body = "\n".join(table_lines([head for head, _ in shown], rows))
    notes = "".join(f"- {note}\n" for note in [sentence(summary), *summary["notes"]] if note)
    return f"# {title}\n\n{body}\n\n{notes}"


def flat(summary: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Header and rows of summary.csv: every number of summary.json, names joined by dots."""
    rows = [dict(_flat(line)) for line in summary["rows"]]
    header = list(dict.fromkeys(name for row in sorted(rows, key=len)[::-1] for name in row))
    return header, [[row.get(name) for name in header] for row in rows]


def _flat(data: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in data.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{prefix}{name}.")
        elif value is not None:
            found.append((f"{prefix}{name}", value))
    return found


def sentence(summary: Mapping[str, Any]) -> str:
    """What the table says, in one plain sentence; "" where it says nothing yet."""
    rows = [line for line in summary["rows"] if line["method"] != DENSE and line["cells"]]
    return _of_losses(summary, rows) if summary["mode"] == FORCED else _of_texts(summary, rows)


def _of_losses(summary: Mapping[str, Any], rows: Sequence[Line]) -> str:
    dense = next((line["loss"] for line in summary["rows"] if line["method"] == DENSE), None)
    known = [line for line in rows if line["loss"] and line["loss"]["after"]]
    if not known or not dense or not dense["after"]:
        return ""
    least = min(known, key=_loss_after)
    best = min(comparable(known), key=_loss_after)
    gap = best["loss"]["after_minus_never"]
    beside = ""
    if gap is not None and not best["label"].startswith("never@"):
        sure = "" if gap["significant"] else ", which its interval does not tell from none"
        beside = f", {gap['mean']:+.3f} against never re-masking{sure}"
    other = "" if least is best else _beside(least, _loss_after)
    return (
        f"After the changes of {count(summary['sources'], 'passage')} the mean loss was "
        f"{dense['after']['mean']:.3f} nats dense and{_among(other)} least with {best['label']}, "
        f"{_loss_after(best):.3f} at {best['achieved_sparsity']:.1%} achieved "
        f"sparsity{beside}{other}."
    )


def comparable(rows: Sequence[Line]) -> list[Line]:
    """Those that removed about as much as the one that removed most: NEAR or less below it."""
    most = max(float(line["achieved_sparsity"]) for line in rows)
    return [line for line in rows if line["achieved_sparsity"] >= most - NEAR]


def _beside(line: Line, value: Callable[[Line], float]) -> str:
    """A method that removed too little to be compared."""
    return f"; {line['label']} had {value(line):.3f}, and removed {line['achieved_sparsity']:.1%}"


def _among(other: str) -> str:
    return f", of the methods within {NEAR * 100:.0f} points of the most removed," if other else ""


def _loss_after(line: Line) -> float:
    return float(line["loss"]["after"]["mean"])


def _of_texts(summary: Mapping[str, Any], rows: Sequence[Line]) -> str:
    name = next((n for n in ("document_similarity", "rougeL") if _any_has(rows, n)), None)
    if name is None:
        return ""
    known = [line for line in rows if (line["metrics"] or {}).get(name)]

    def close(line: Line) -> float:
        return float(line["metrics"][name]["mean"])

    ranked, closest = sorted(comparable(known), key=close, reverse=True), max(known, key=close)
    best = ranked[0]
    second = f", before {ranked[1]['label']} with {close(ranked[1]):.3f}" if ranked[1:] else ""
    what = "document similarity" if name == "document_similarity" else "ROUGE-L"
    other = "" if closest is best else _beside(closest, close)
    return (
        f"Over {count(summary['sources'], 'prompt')}{_among(other)} {best['label']} wrote closest "
        f"to the dense text ({what} {close(best):.3f}, at {best['achieved_sparsity']:.1%} achieved "
        f"sparsity, {best['dense_token_share']:.1%} of the decoded tokens dense){second}{other}."
    )


def _any_has(rows: Sequence[Line], name: str) -> bool:
    """Whether a row has a value of the metric ``name``."""
    return any((line["metrics"] or {}).get(name) for line in rows)
