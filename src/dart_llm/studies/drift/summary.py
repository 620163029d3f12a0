"""A drift study in one row per method: means over its sources with 95 % intervals; its sentence.

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
from dart_llm.experiments.index import ACCOUNTING
from dart_llm.experiments.rows import DENSE as UNTOUCHED
from dart_llm.experiments.stats import Interval, Sample, Value
from dart_llm.experiments.store import flat
from dart_llm.pruning.records import merge_reports
from dart_llm.reporting.table import Column, Table, keys_of
from dart_llm.reporting.words import count, too_few
from dart_llm.studies.drift.record import DONE
from dart_llm.studies.drift.settings import DENSE, FORCED, NEVER

Row = Mapping[str, Any]


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """The summary of the lines of results.jsonl; ``rows`` in its answer are in their order."""
    first = rows[0]["cell"]
    labels = list(dict.fromkeys(row["label"] for row in rows))
    done = {
        name: [r for r in rows if r["label"] == name and r["status"] == DONE] for name in labels
    }
    lines = []
    for label in labels:
        own, every = done[label], [row for row in rows if row["label"] == label]
        line: dict[str, Any] = {
            "label": label,
            "method": every[0]["cell"]["method"],
            "sparsity": every[0]["cell"]["sparsity"],
            "cells": len(own),
            "failed": len(every) - len(own),
            "sources": len({row["cell"]["source"] for row in own}),
            **accounting(own),
            "loss": None,
            "metrics": None,
        }
        if own and first["mode"] == FORCED:
            never = done.get(f"{NEVER}@{label.partition('@')[2]}", [])
            line["loss"] = losses(own, done.get(DENSE, []), never)
        elif own:
            line |= _lengths(own)
            line["metrics"] = metrics(own)
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
        "mean_tokens": fmean(tokens) if tokens else None,
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
                own = sums.setdefault(row["cell"]["source"], [])
                own.append((part["mean_loss"], part["tokens"]))
    found: dict[str, Value] = {}
    for source, parts in sums.items():
        weight = sum(tokens for _, tokens in parts)
        total = math.fsum(loss * tokens for loss, tokens in parts)
        found[source] = (total / weight, float(weight))
    return found


def metrics(rows: Sequence[Row]) -> dict[str, Any] | None:
    """Every number of text_metrics.py, averaged over the sources that have it; None of dense."""
    values: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        for name, value in (row["metrics"] or {}).items():
            sources = values.setdefault(name, {})
            if value is not None:
                sources.setdefault(row["cell"]["source"], []).append(value)
    return {
        name: _mean({source: fmean(own) for source, own in sources.items()})
        for name, sources in values.items()
    } or None


def _lengths(rows: Sequence[Row]) -> dict[str, Any]:
    tokens = {f"{r['cell']['source']}/{r['cell']['seed']}": r["decoded_tokens"] for r in rows}
    ended = sum(row["finish"] == "eos" for row in rows)
    return {"mean_tokens": sum(tokens.values()) / len(tokens), "ended_share": ended / len(rows)}


def _mean(values: Sample) -> dict[str, Any] | None:
    """``mean`` with its interval over ``n`` sources; None of nothing."""
    if not values:
        return None
    return {"mean": stats.mean(values), **_ends(stats.interval(values), len(values))}


def _paired(own: Sample, other: Sample) -> dict[str, Any] | None:
    """The mean difference over shared sources, weighted by their tokens; None without any."""
    shared = own.keys() & other.keys()
    first, second = ({name: values[name] for name in shared} for values in (own, other))
    one, two = stats.mean(first), stats.mean(second)
    if one is None or two is None:
        return None
    found = stats.paired_interval(first, second)
    significant = found.significant if found and found.ends else None
    return {"mean": one - two, **_ends(found, len(shared)), "significant": significant}


def _ends(found: Interval | None, n: int) -> dict[str, Any]:
    low, high = (found and found.ends) or (None, None)
    return {"low": low, "high": high, "n": n, "no_interval": too_few(n)}


Line = Mapping[str, Any]

SHOWN = {
    "rougeL": "ROUGE-L",
    "bleu": "BLEU",
    "bertscore": "BERTScore",
    "document_similarity": "document",
    "sentence_coverage": "coverage",
}
"""Metrics in the tables and their heads; summary.json and summary.csv have all of them."""

NEAR = 0.05
"""Methods whose achieved sparsities lie so near are called comparable."""


def table(summary: Mapping[str, Any], title: str, brief: bool = False) -> Table:
    """One row per method; losses in nats.  Its CSV has every number, names joined by dots.

    ``brief``: intervals of the differences to ``never`` alone, for a terminal's width.
    """
    every = [flat(line) for line in summary["rows"]]
    rows = [{**line, **own} for line, own in zip(summary["rows"], every, strict=True)]
    columns = [
        Column("method", "label", wrap=not brief),
        Column("achieved", "achieved_sparsity", ".1%"),
        Column("dense tokens", "dense_token_share", ".1%"),
        Column("re-masks", "remasks_per_cell", ".1f"),
    ]
    if summary["mode"] == FORCED:
        columns += _loss_columns(summary, brief)
    else:
        columns.append(Column("tokens", "mean_tokens", ".0f"))
        known = {name for line in rows for name in line["metrics"] or ()}
        columns += [
            _estimate(head, "metrics", name, brief) for name, head in SHOWN.items() if name in known
        ]
    if any(line["failed"] for line in rows):
        columns.append(Column("failed", "failed"))
    name, fields = "" if brief else "summary", keys_of(every)
    return Table(name, title, tuple(columns), rows, nothing="-", terminal=brief, fields=fields)


def _loss_columns(summary: Mapping[str, Any], brief: bool) -> list[Column]:
    moment = next((line["loss"]["from"] for line in summary["rows"] if line["loss"]), None)
    later = "later" if moment is None else f"from token {moment}"
    versus_dense = [] if brief else [_estimate("after minus dense", "loss", "after_minus_dense")]
    return [
        _estimate("before", "loss", "before", brief),
        _estimate("after", "loss", "after", brief),
        *versus_dense,
        _estimate("after minus never", "loss", "after_minus_never"),
        _estimate(later, "loss", "later", brief),
        _estimate(f"{later} minus never", "loss", "later_minus_never"),
        Column("recovered in", _recovery),
    ]


def _estimate(head: str, group: str, name: str, brief: bool = False) -> Column:
    """A mean with its interval; differences have a sign, and none to the method itself."""
    other = name.partition("_minus_")[2]
    form = "+.3f" if other else ".3f"

    def value(line: Line) -> Any:
        estimate = None if line["method"] == other else (line[group] or {}).get(name)
        return estimate if estimate and estimate["mean"] is not None else None

    def text(estimate: Mapping[str, Any]) -> str:
        mean, low, high = (estimate[key] for key in ("mean", "low", "high"))
        if brief:
            return f"{mean:{form}}"
        if low is None:
            return f"{mean:{form}} {too_few(estimate['n']) or ''}".rstrip()
        return f"{mean:{form}} ({low:{form}} to {high:{form}})"

    return Column(head, value, text)


def _recovery(line: Line) -> str | None:
    recovery = (line["loss"] or {}).get("recovery")
    if line["method"] == DENSE or not recovery or not recovery["changes"]:
        return None
    share = f"{recovery['recovered']} of {recovery['changes']}"
    mean = recovery["mean_tokens"]
    return share if mean is None else f"{mean:.0f} tokens ({share})"


def title(summary: Mapping[str, Any]) -> str:
    """What was studied, for the heads of the tables."""
    forced = summary["mode"] == FORCED
    model = Path(str(summary["model"]).rstrip("/")).name
    sources = f"{summary['sources']} {'passages' if forced else 'prompts'}"
    unit = ", losses in nats" if forced else ""
    return (
        f"drift, mode {summary['mode']}: {sources}, {model} ({summary['dtype']}), "
        f"means with 95 % intervals{unit}"
    )


def markdown(summary: Mapping[str, Any]) -> str:
    """summary.md."""
    body = "\n".join(table(summary, title(summary)).lines())
    notes = "".join(f"- {note}\n" for note in [sentence(summary), *summary["notes"]] if note)
    return f"# {title(summary)}\n\n{body}\n\n{notes}"


CONCLUDED = (
    ("loss", "after", "had the least loss after the changes: {:.3f} nats per token"),
    ("metrics", "document_similarity", "wrote closest to dense: document similarity {:.3f}"),
    ("metrics", "rougeL", "wrote closest to dense: ROUGE-L {:.3f}"),
)
"""The quality that the sentence is about, the first that was measured, and its words."""


def sentence(summary: Mapping[str, Any]) -> str:
    """What the table says, in one plain sentence; "" where it says nothing yet."""
    rows = [line for line in summary["rows"] if line["method"] != DENSE and line["cells"]]
    for group, name, words in CONCLUDED:
        known = [line for line in rows if (line[group] or {}).get(name)]
        if known:
            line, alike = best(known, group, name), count(len(comparable(known)), "method")
            sources = count(summary["sources"], "passage" if group == "loss" else "prompt")
            return (
                f"Of {alike} that removed about as much, over {sources}, {line['label']} "
                f"{words.format(line[group][name]['mean'])}, at {line['achieved_sparsity']:.1%} "
                f"achieved sparsity{_against_never(line) if group == 'loss' else ''}."
            )
    return ""


def best(rows: Sequence[Line], group: str, name: str) -> Line:
    """The row with the least loss, or with the highest metric, among comparable ones."""
    sign = 1 if group == "loss" else -1
    return min(comparable(rows), key=lambda line: sign * float(line[group][name]["mean"]))


def comparable(rows: Sequence[Line]) -> list[Line]:
    """Those that removed about as much as the one that removed most: NEAR or less below it."""
    most = max(float(line["achieved_sparsity"]) for line in rows)
    return [line for line in rows if line["achieved_sparsity"] >= most - NEAR]


def _against_never(line: Line) -> str:
    """How a loss stands to that without re-masks at the same sparsity, if there is one."""
    gap = line["loss"]["after_minus_never"]
    if gap is None or line["method"] == NEVER:
        return ""
    why = too_few(gap.get("n")) or "no interval"
    sure = {True: "", False: " (within noise)", None: f", {why}"}[gap["significant"]]
    return f", {gap['mean']:+.3f} against never re-masking{sure}"
