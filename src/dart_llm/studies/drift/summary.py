"""A drift study in one row per method: means over its sources with 95 % intervals; its headline.

A source (a prompt or a passage) is one item, whatever the seeds: several seeds of it are averaged
first.  Differences to dense and to ``never`` are paired by source.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from dart_llm.experiments import stats
from dart_llm.experiments.comparison import UNTOUCHED
from dart_llm.experiments.stats import Interval, Value
from dart_llm.experiments.store import ResultLine
from dart_llm.pruning.records import merge_reports
from dart_llm.reporting.page import flat
from dart_llm.reporting.table import Column, Table, keys_of
from dart_llm.reporting.words import count, percent, with_interval
from dart_llm.studies.drift.cell import DONE, SOURCES
from dart_llm.studies.drift.settings import DENSE, FORCED, NEVER

Row = Mapping[str, Any]

ACCOUNTING = (
    "achieved_sparsity",
    "sparsity_while_pruned",
    "dense_token_share",
    "remasks",
    "ffn_bytes_share",
)
"""What is taken of the merged reports of a method."""


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """The summary of the lines of results.jsonl; its ``rows`` are in their order."""
    first = rows[0]["cell"]
    labels = dict.fromkeys(row["label"] for row in rows)
    done = {
        name: [r for r in rows if r["label"] == name and r["status"] == DONE] for name in labels
    }
    lines = []
    for label in labels:
        finished, every = done[label], [row for row in rows if row["label"] == label]
        line: dict[str, Any] = {
            "label": label,
            "method": every[0]["cell"]["method"],
            "sparsity": every[0]["cell"]["sparsity"],
            "cells": len(finished),
            "failed": len(every) - len(finished),
            "sources": len({row["cell"]["source"] for row in finished}),
            **accounting(finished),
            "loss": None,
            "metrics": None,
        }
        if finished and first["mode"] == FORCED:
            never = done.get(f"{NEVER}@{label.partition('@')[2]}", [])
            line["loss"] = losses(finished, done.get(DENSE, []), never)
        elif finished:
            line["mean_tokens"] = fmean(row["decoded_tokens"] for row in finished)
            line["ended_share"] = fmean(row["finish"] == "eos" for row in finished)
            line["metrics"] = metrics(finished)
        lines.append(line)
    return {
        **{name: first[name] for name in ("mode", "model", "dtype")},
        "sources": len({row["cell"]["source"] for row in rows}),
        "rows": lines,
        "notes": [],
    }


def accounting(rows: Sequence[Row]) -> dict[str, Any]:
    """Over all cells, weighted by decoded tokens; ``remasks_per_cell``: their mean."""
    reports = [{**row["accounting"], "sequences": []} for row in rows if row["accounting"]]
    merged = merge_reports(reports) if reports else UNTOUCHED
    return {
        **{name: merged[name] for name in ACCOUNTING},
        "remask_causes": dict(merged.get("remask_causes", {})),
        "remasks_per_cell": merged["remasks"] / len(rows) if rows else None,
    }


def losses(rows: Sequence[Row], dense: Sequence[Row], never: Sequence[Row]) -> dict[str, Any]:
    """Mean losses in nats before, after and some time after the changes, and recovery.

    ``after``: all tokens of all topics but the first.  ``later``: those from ``from`` tokens after
    each change on.  ``..._minus_dense`` and ``..._minus_never``: paired by source.
    """
    numbers: dict[str, Any] = {}
    for name in ("before", "after", "later"):
        values = _losses(rows, name)
        numbers[name] = _with_mean(stats.interval(values))
        for other, others in (("dense", dense), ("never", never)):
            if name != "before":
                difference = stats.paired_interval(values, _losses(others, name))
                numbers[f"{name}_minus_{other}"] = _with_mean(difference)
    froms = [t["later"]["from"] for r in rows for t in r["loss"]["topics"] if t["later"]]
    numbers["from"] = froms[0] if froms else None
    changes = [change for row in rows for change in row["loss"]["recovery"] or ()]
    tokens = [change["tokens"] for change in changes if change["tokens"] is not None]
    numbers["recovery"] = {
        "changes": len(changes),
        "recovered": len(tokens),
        "mean_tokens": fmean(tokens) if tokens else None,
    }
    return numbers


def _losses(rows: Iterable[Row], name: str) -> dict[str, Value]:
    """Mean loss and tokens of every source, over its seeds and the topics in question."""
    sums: dict[str, list[tuple[float, int]]] = {}
    for row in rows:
        for topic in row["loss"]["topics"]:
            part = topic["later"] if name == "later" else topic
            wanted = (topic["topic"] == 0) == (name == "before")
            if wanted and part is not None and part["mean_loss"] is not None:
                source = sums.setdefault(row["cell"]["source"], [])
                source.append((part["mean_loss"], part["tokens"]))
    values: dict[str, Value] = {}
    for name, parts in sums.items():
        weight = sum(tokens for _, tokens in parts)
        values[name] = math.fsum(loss * tokens for loss, tokens in parts) / weight, float(weight)
    return values


def metrics(rows: Sequence[Row]) -> dict[str, Any] | None:
    """Every number of text_metrics.py, averaged over the sources that have it; None of dense."""
    values: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        for name, value in (row["metrics"] or {}).items():
            sources = values.setdefault(name, {})
            if value is not None:
                sources.setdefault(row["cell"]["source"], []).append(value)
    return {
        name: _with_mean(stats.interval([fmean(seeds) for seeds in sources.values()]))
        for name, sources in values.items()
    } or None


def _with_mean(interval: Interval | None) -> dict[str, Any] | None:
    """``mean`` over ``n`` sources, weighted by their tokens, and its interval; None of nothing."""
    if interval is None:
        return None
    entry = interval.to_dict()
    return {"mean": entry.pop("estimate"), **entry}


CLOSEST = ("document_similarity", "rougeL")
"""Metrics that may stand for a study in mode free, the first that it has."""


def _main(line: Row) -> tuple[str, Mapping[str, Any]] | None:
    """Name and estimate of the number that stands for a method."""
    if line["loss"]:
        return "loss_after", line["loss"]["after"] or {"mean": None}
    names = [name for name in CLOSEST if (line["metrics"] or {}).get(name)]
    return (names[0], line["metrics"][names[0]]) if names else None


def result_lines(summary: Row) -> list[ResultLine]:
    """The loss after the changes, or the closeness to the dense text, of every method."""
    lines = []
    for line in summary["rows"]:
        tokens = ("tokens", {"mean": line.get("mean_tokens")})
        metric, estimate = _main(line) or tokens
        failed = f"all {line['failed']} cells failed: results.jsonl says why"
        lines.append(
            ResultLine(
                label=line["label"],
                method=line["method"],
                model=_short(summary),
                task=f"drift:{summary['mode']}",
                metric=metric,
                value=estimate["mean"],
                higher_is_better=metric != "loss_after",
                requested=line["sparsity"],
                achieved=line["achieved_sparsity"],
                low=estimate.get("low"),
                high=estimate.get("high"),
                dense_share=line["dense_token_share"],
                remasks=line["remasks"],
                dtype=summary["dtype"],
                error=None if line["cells"] else failed,
            )
        )
    return lines


def _short(summary: Row) -> str:
    """The model's short name."""
    return Path(str(summary["model"]).rstrip("/")).name


SHOWN = {
    "rougeL": "ROUGE-L",
    "bleu": "BLEU",
    "bertscore": "BERTScore",
    "document_similarity": "document",
    "sentence_coverage": "coverage",
}
"""Metrics in the tables and their heads; summary.json and summary.csv have all of them."""


def table(summary: Row) -> Table:
    """One row per method; losses in nats.  Its CSV has every number, names joined by dots."""
    every = [flat(line) for line in summary["rows"]]
    rows = [{**line, **own} for line, own in zip(summary["rows"], every, strict=True)]
    columns = [
        Column("method", "label"),
        Column("achieved", "achieved_sparsity", ".1%"),
        Column("dense tokens", "dense_token_share", ".1%"),
        Column("re-masks", "remasks_per_cell", ".1f"),
    ]
    if summary["mode"] == FORCED:
        moment = next((line["loss"]["from"] for line in summary["rows"] if line["loss"]), None)
        later = "later" if moment is None else f"from token {moment}"
        columns += [
            _estimate("before", "loss", "before", terminal=False),
            _estimate("after", "loss", "after"),
            _estimate("after minus dense", "loss", "after_minus_dense", terminal=False),
            _estimate("after minus never", "loss", "after_minus_never"),
            _estimate(later, "loss", "later", terminal=False),
            _estimate(f"{later} minus never", "loss", "later_minus_never", terminal=False),
            Column("recovered in", _recovery),
        ]
    else:
        columns.append(Column("tokens", "mean_tokens", ".0f"))
        known = {name for line in rows for name in line["metrics"] or ()}
        shown = ((name, head) for name, head in SHOWN.items() if name in known)
        columns += [_estimate(head, "metrics", name) for name, head in shown]
    if any(line["failed"] for line in rows):
        columns.append(Column("failed", "failed"))
    caption, fields = title(summary), keys_of(every)
    return Table("summary", caption, tuple(columns), rows, nothing="-", fields=fields)


def _estimate(head: str, group: str, name: str, terminal: bool = True) -> Column:
    """A mean with its interval; differences have a sign, and none to the method itself."""
    other = name.partition("_minus_")[2]
    form = "+.3f" if other else ".3f"

    def value(line: Row) -> Any:
        estimate = None if line["method"] == other else (line[group] or {}).get(name)
        return estimate if estimate and estimate["mean"] is not None else None

    def text(estimate: Row) -> str:
        return with_interval(estimate["mean"], estimate, form)

    return Column(head, value, text, terminal=terminal)


def _recovery(line: Row) -> str | None:
    recovery = (line["loss"] or {}).get("recovery")
    if line["method"] == DENSE or not recovery or not recovery["changes"]:
        return None
    share = f"{recovery['recovered']} of {recovery['changes']}"
    mean = recovery["mean_tokens"]
    return share if mean is None else f"{mean:.0f} tokens ({share})"


def title(summary: Row) -> str:
    """What was studied, for the heads of the tables."""
    unit = ", losses in nats" if summary["mode"] == FORCED else ""
    return (
        f"drift, mode {summary['mode']}: {count(summary['sources'], SOURCES[summary['mode']])}, "
        f"{_short(summary)} ({summary['dtype']}), means with 95 % intervals{unit}"
    )


def notes(rows: Sequence[Row]) -> list[str]:
    """What a reader of the numbers must know: cells that ended before any pruning."""
    pruned = [row["accounting"] for row in rows if row["accounting"] and row["cell"]["sparsity"]]
    unpruned = sum(not accounting["achieved_sparsity"] for accounting in pruned)
    return (
        [f"{unpruned} of {len(pruned)} pruned cells ended before a token ran pruned"]
        if unpruned
        else []
    )


NEAR = 0.05
"""Methods whose achieved sparsities lie so near are called comparable."""


def headline(summary: Row) -> str:
    """The best of the methods that removed about as much; "" where nothing can be compared."""
    measured = [line for line in summary["rows"] if line["method"] != DENSE and _main(line)]
    if not measured:
        return ""
    alike = comparable(measured)
    line, metric, value = min(((line, *_value(line)) for line in alike), key=lambda one: one[2])
    name = {"loss_after": "loss after the changes"}.get(metric, metric)
    return (
        f"{line['label']}: {name} {abs(value):.3f} at {percent(line['achieved_sparsity'])} "
        f"achieved sparsity, the best of {count(len(alike), 'method')} that removed about as much."
    )


def _value(line: Row) -> tuple[str, float]:
    """The number that stands for a method, as one of which less is better."""
    metric, estimate = _main(line) or ("", {"mean": math.inf})
    return metric, float(estimate["mean"]) * (1 if metric == "loss_after" else -1)


def comparable(lines: Sequence[Row]) -> list[Row]:
    """Those that removed about as much as the one that removed most: NEAR or less below it."""
    most = max(float(line["achieved_sparsity"]) for line in lines)
    return [line for line in lines if line["achieved_sparsity"] >= most - NEAR]
