"""Rows of results.jsonl: one method on one task; their table, notes and JSON document."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dart_llm.evaluation.tasks import short
from dart_llm.experiments import comparison, stats
from dart_llm.pruning.records import merge_reports
from dart_llm.reporting.table import Column, Table
from dart_llm.reporting.words import dtype_text, file_text, mostly_dense, too_few

DENSE: dict[str, Any] = {
    "method": "dense",
    "requested_sparsity": 0.0,
    "achieved_sparsity": 0.0,
    "sparsity_while_pruned": 0.0,
    "dense_token_share": 1.0,
    "remasks": 0,
    "ffn_bytes_share": 1.0,
}
"""The accounting of an untouched model."""

Row = Mapping[str, Any]

COUNTS = ("tokens", "pruned_tokens", "mean_loss", "mean_loss_pruned_tokens")
"""Metrics that only the JSON documents have."""


def document(rows: Sequence[Row]) -> dict[str, Any]:
    """``results`` by task and ``accounting`` of the method; the untouched model under ``dense``."""
    of_method = [r for r in rows if r["label"] == rows[-1]["label"]]
    others = [r for r in rows if r["label"] != rows[-1]["label"]]
    reports = {_task(r): r["measurement"]["accounting"] or DENSE for r in of_method}
    found: dict[str, Any] = {
        "results": {_task(r): r["measurement"]["metrics"] for r in of_method},
        "accounting": {**_merged(list(reports.values())), "tasks": reports},
        "notes": notes(of_method),
    }
    subtasks = {_task(r): r["measurement"]["subtasks"] for r in of_method}
    if groups := {task: parts for task, parts in subtasks.items() if parts}:
        found["subtasks"] = groups
    if others:
        found["dense"] = {_task(r): r["measurement"]["metrics"] for r in others}
    return found


def _merged(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    if any("layers" not in report for report in reports):
        return dict(reports[0])
    merged = merge_reports([{**report, "sequences": []} for report in reports])
    merged.pop("sequences")
    return merged


def _task(row: Row) -> str:
    return str(row["measurement"]["task"])


def notes(rows: Sequence[Row]) -> list[str]:
    """The measurements' notes, each once."""
    found = [f"{short(_task(r))}: {note}" for r in rows for note in r["measurement"]["notes"]]
    return list(dict.fromkeys(found))


def table(rows: Sequence[Row], compared: Sequence[comparison.Row] | None = None) -> Table:
    """Every metric with its interval beside what was really removed.

    A score that is paired with dense has the interval of that comparison instead of its own, as in
    the pictures.  ``compared``: what ``comparison.rows`` gave (default: computed here).
    """
    beside = comparison.rows(rows) if compared is None else compared
    paired = {(one.label, one.task): one for one in beside if one.to_dense is not None}
    protocols = sorted({str(r["measurement"]["protocol"]) for r in rows})
    first = rows[0]["checkpoint"]
    formats = f"{file_text(first)}, {dtype_text(first)}"
    title = f"{first.get('name')} ({formats}), protocol {', '.join(protocols)}"
    columns = (
        Column("task", "task"),
        Column("method", "method"),
        Column("metric", "metric"),
        Column("value", "value", needed=True),
        Column("95 % of the value", "interval"),
        Column("n", "items"),
        *((Column("against dense (95 %, paired)", "change", needed=True),) if paired else ()),
        Column("achieved", "achieved_sparsity", ".1%"),
        Column("dense tokens", "dense_token_share", ".1%"),
        Column("re-masks", "remasks"),
        Column("bytes per token", "token_bytes_share", ".3f"),
    )
    counted = (row["measurement"].get("accounting") or {} for row in rows)
    context = comparison.common_context(one.get("mean_context") for one in counted)
    lines = [line for one in rows for line in _lines(one, context, paired)]
    return Table("", title, columns, lines, left=3)


def _lines(
    row: Row, context: float, paired: Mapping[tuple[str, str], comparison.Row]
) -> Iterator[dict[str, Any]]:
    """``context``: positions of the cache, for rows that count none themselves."""
    measurement = row["measurement"]
    traffic = comparison.read_traffic(row.get("facts") or {})
    accounting = measurement.get("accounting") or DENSE
    if traffic is not None and not measurement.get("accounting"):
        accounting = {**accounting, "token_bytes_share": traffic.share(context)}
    shown = {n: v for n, v in measurement["metrics"].items() if n not in COUNTS}
    for number, (metric, value) in enumerate(shown.items()):
        task, label = short(_task(row)), str(row["label"])
        paired_row = paired.get((label, _task(row))) or paired.get((label, task))
        paired_row = paired_row if metric == measurement["metric"] else None
        yield {
            **accounting,
            "task": "" if number else task,
            "method": "" if number else label + mostly_dense(measurement.get("accounting")),
            "metric": metric,
            "value": "not finite" if value is None else f"{value:.4g}",
            "interval": None if paired_row else _interval(measurement, metric),
            "items": len(measurement["items"]),
            "change": paired_row and paired_row.change(paired_row.to_dense),
        }


def _interval(measurement: Mapping[str, Any], name: str) -> str | None:
    """95 % interval over items; None where the metric is not their mean."""
    if name == measurement["metric"]:
        found = comparison.scores(measurement).interval()
    else:
        items = measurement["items"]
        found = stats.interval({i["id"]: i[name] for i in items if i.get(name) is not None})
        value = measurement["metrics"][name]
        if found and (value is None or not math.isclose(found.estimate, value, rel_tol=1e-6)):
            return None
    if found is None:
        return None
    return too_few(found.n) or (f"{found.ends[0]:.3g}-{found.ends[1]:.3g}" if found.ends else None)
