"""Summary of a drift study: a row per method with means over sources and 95 % intervals.

A source (a prompt or a passage) is one item: its runs with different seeds are averaged first.
Differences to dense and to ``never`` (dart without re-masks) are paired by source.  Losses are in
nats per token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from dart_llm.experiments import stats
from dart_llm.experiments.comparison import UNTOUCHED
from dart_llm.experiments.stats import Interval, Value
from dart_llm.experiments.store import ResultLine
from dart_llm.pruning.records import merge_reports
from dart_llm.reporting.page import flat
from dart_llm.reporting.table import Column, Table, grouped, keys_of
from dart_llm.reporting.words import count, percent, with_interval
from dart_llm.studies.drift.runs import SOURCES, DriftRun
from dart_llm.studies.drift.settings import DENSE, FORCED, NEVER

Row = Mapping[str, Any]

ACCOUNTING = (
    *("achieved_sparsity", "sparsity_while_pruned", "dense_token_share", "remasks"),
    "ffn_bytes_share",
)
"""The fields that a row takes from the merged reports of a method."""


def summarise(runs: Sequence[DriftRun], model: str, dtype: str | None) -> dict[str, Any]:
    """The summary of measured and failed runs; ``rows`` follow the order of the runs."""
    by_label = grouped(runs, lambda run: run.label)
    done = {label: [r for r in members if r.error is None] for label, members in by_label.items()}
    rows = []
    for label, members in by_label.items():
        finished, candidate = done[label], members[0].candidate
        row: dict[str, Any] = {
            "label": label,
            "method": candidate.name,
            "sparsity": candidate.sparsity,
            "runs": len(finished),
            "failed": len(members) - len(finished),
            "sources": len({run.source.id for run in finished}),
            **accounting(finished),
            "loss": None,
            "metrics": None,
        }
        if finished and runs[0].mode == FORCED:
            never = done.get(f"{NEVER}@{label.partition('@')[2]}", [])
            row["loss"] = losses(finished, done[DENSE], never)
        elif finished:
            row["mean_tokens"] = fmean(run.decoded for run in finished)
            row["ended_share"] = fmean(run.record["finish"] == "eos" for run in finished)
            row["metrics"] = metrics(finished)
        rows.append(row)
    sources = len({run.source.id for run in runs})
    facts = {"mode": runs[0].mode, "model": model, "dtype": dtype, "sources": sources}
    return {**facts, "rows": rows, "notes": notes(runs)}


def accounting(runs: Sequence[DriftRun]) -> dict[str, Any]:
    """Accounting over all runs, weighted by decoded tokens; ``remasks_per_run`` is a mean."""
    records = [run.record["accounting"] for run in runs if run.record["accounting"]]
    merged = merge_reports([{**r, "sequences": []} for r in records]) if records else UNTOUCHED
    return {
        **{name: merged[name] for name in ACCOUNTING},
        "remask_causes": dict(merged.get("remask_causes", {})),
        "remasks_per_run": merged["remasks"] / len(runs) if runs else None,
    }


def losses(
    runs: Sequence[DriftRun], dense: Sequence[DriftRun], never: Sequence[DriftRun]
) -> dict[str, Any]:
    """Mean losses before and after the topic changes, differences, and recovery.

    ``before``: over the tokens of the first topic.  ``after``: over the tokens of all other topics.
    ``after_minus_dense`` and ``after_minus_never``: differences of ``after``, paired by source.
    """
    after = part_losses(runs, is_after=True)
    numbers: dict[str, Any] = {
        "before": _with_mean(stats.interval(part_losses(runs, is_after=False))),
        "after": _with_mean(stats.interval(after)),
    }
    for name, others in (("dense", dense), ("never", never)):
        difference = stats.paired_interval(after, part_losses(others, is_after=True))
        numbers[f"after_minus_{name}"] = _with_mean(difference)
    references = {run.source_key: run.record["losses"] for run in dense}
    changes = [
        tokens
        for run in runs
        if run.source_key in references
        for tokens in recovery(
            run.record["losses"], references[run.source_key], [start for _, start, _ in run.topics]
        )
    ]
    recovered = [tokens for tokens in changes if tokens is not None]
    numbers["recovery"] = {
        "changes": len(changes),
        "recovered": len(recovered),
        "mean_tokens": fmean(recovered) if recovered else None,
    }
    return numbers


def part_losses(runs: Sequence[DriftRun], is_after: bool) -> dict[str, Value]:
    """Maps source to mean loss and token count of all seeds, before or after the first change."""
    tokens: dict[str, list[float]] = {}
    for run in runs:
        change = run.topics[0][2]
        part = run.record["losses"][change:] if is_after else run.record["losses"][:change]
        tokens.setdefault(run.source.id, []).extend(loss for loss in part if loss is not None)
    return {source: (fmean(t), float(len(t))) for source, t in tokens.items() if t}


WINDOW, BEFORE, MARGIN = 32, 64, 0.1
"""A loss has recovered if its mean excess over dense in a window of ``WINDOW`` tokens is at most
``MARGIN`` nats above the mean excess in the ``BEFORE`` tokens before the change."""


def recovery(
    losses: Sequence[float | None], dense: Sequence[float | None], starts: Sequence[int]
) -> list[int | None]:
    """Per change, the number of tokens until the loss has recovered; None if it never recovers.

    ``starts``: index of each topic's first token.  Windows do not extend beyond the next change.
    """
    excess = np.array(losses, dtype=float) - np.array(dense, dtype=float)  # None becomes nan
    recovered = list[int | None]()
    for start, end in pairwise([*starts[1:], len(excess)]):
        bound = np.nanmean(excess[max(0, start - BEFORE) : start]) + MARGIN
        padded = np.append(excess[start:end], np.full(max(0, WINDOW - end + start), np.inf))
        low = np.flatnonzero(sliding_window_view(padded, WINDOW).mean(-1) <= bound)
        recovered.append(int(low[0]) if len(low) else None)
    return recovered


def metrics(runs: Sequence[DriftRun]) -> dict[str, Any] | None:
    """The metrics of text_metrics.py, averaged over sources; None if no source has any."""
    values: dict[str, dict[str, list[float]]] = {}
    for run in runs:
        for name, value in (run.record["metrics"] or {}).items():
            sources = values.setdefault(name, {})
            if value is not None:
                sources.setdefault(run.source.id, []).append(value)
    return {
        name: _with_mean(stats.interval([fmean(seeds) for seeds in sources.values()]))
        for name, sources in values.items()
    } or None


def _with_mean(interval: Interval | None) -> dict[str, Any] | None:
    """The interval as a dictionary, with the estimate as ``mean``; None stays None."""
    if interval is None:
        return None
    entry = interval.to_dict()
    return {"mean": entry.pop("estimate"), **entry}


def notes(runs: Sequence[DriftRun]) -> list[str]:
    """One note if runs ended before any token ran pruned, else an empty list."""
    records = (run.record["accounting"] for run in runs if run.candidate.sparsity)
    shares = [record["achieved_sparsity"] for record in records if record]
    unpruned = sum(not share for share in shares)
    sentence = f"{unpruned} of {len(shares)} pruned runs ended before any token ran pruned"
    return [sentence] if unpruned else []


# Result lines, table and headline.

CLOSEST = ("document_similarity", "rougeL")
"""Candidates for the main metric in mode free; the first that exists is used."""


def _main(row: Row) -> tuple[str, Row] | None:
    """The name and estimate of a method's main metric; None if it has none."""
    if row["loss"]:
        return "loss_after", row["loss"]["after"]
    names = [name for name in CLOSEST if (row["metrics"] or {}).get(name)]
    return (names[0], row["metrics"][names[0]]) if names else None


def result_lines(summary: Row) -> list[ResultLine]:
    """A line per method: its loss after the changes, or its closeness to the dense text."""
    lines = []
    for row in summary["rows"]:
        metric, estimate = _main(row) or ("tokens", {"mean": row.get("mean_tokens")})
        lines.append(
            ResultLine(
                label=row["label"],
                method=row["method"],
                model=_short_name(summary),
                task=f"drift:{summary['mode']}",
                metric=metric,
                value=estimate["mean"],
                higher_is_better=metric != "loss_after",
                requested=row["sparsity"],
                achieved=row["achieved_sparsity"],
                low=estimate.get("low"),
                high=estimate.get("high"),
                dense_share=row["dense_token_share"],
                remasks=row["remasks"],
                dtype=summary["dtype"],
                error=None if row["runs"] else "every run failed: see results.jsonl",
            )
        )
    return lines


def _short_name(summary: Row) -> str:
    return Path(str(summary["model"]).rstrip("/")).name


def table(summary: Row) -> Table:
    """A row per method; losses in nats.  The CSV file has all numbers, with dotted names."""
    flattened = [flat(row) for row in summary["rows"]]
    rows = [{**row, **numbers} for row, numbers in zip(summary["rows"], flattened, strict=True)]
    columns = [
        Column("method", "label"),
        Column("achieved", "achieved_sparsity", ".1%"),
        Column("dense tokens", "dense_token_share", ".1%"),
        Column("re-masks", "remasks_per_run", ".1f"),
    ]
    if summary["mode"] == FORCED:
        columns += [
            _estimate("before", "loss", "before", terminal=False),
            _estimate("after", "loss", "after"),
            _estimate("after minus dense", "loss", "after_minus_dense", terminal=False),
            _estimate("after minus never", "loss", "after_minus_never"),
            Column("recovered in", _recovery),
        ]
    else:
        columns += [
            Column("tokens", "mean_tokens", ".0f"),
            _estimate("ROUGE-L", "metrics", "rougeL"),
            _estimate("BERTScore", "metrics", "bertscore"),
            _estimate("document", "metrics", "document_similarity"),
            _estimate("coverage", "metrics", "sentence_coverage"),
        ]
    columns.append(Column("failed", lambda row: row["failed"] or None))
    columns = [c for c in columns if any(c.raw(row) is not None for row in rows)]
    unit = ", losses in nats" if summary["mode"] == FORCED else ""
    caption = (
        f"drift, mode {summary['mode']}: {count(summary['sources'], SOURCES[summary['mode']])}, "
        f"{_short_name(summary)} ({summary['dtype']}), means with 95 % intervals{unit}"
    )
    fields = keys_of(flattened)
    return Table("summary", caption, tuple(columns), rows, nothing="-", fields=fields)


def _estimate(head: str, group: str, name: str, terminal: bool = True) -> Column:
    """A column of means with intervals; differences to a method are empty in that method's row."""
    other = name.partition("_minus_")[2]
    form = "+.3f" if other else ".3f"

    def value(row: Row) -> Any:
        estimate = None if row["method"] == other else (row[group] or {}).get(name)
        return estimate if estimate and estimate["mean"] is not None else None

    def text(estimate: Row) -> str:
        return with_interval(estimate["mean"], estimate, form)

    return Column(head, value, text, terminal=terminal)


def _recovery(row: Row) -> str | None:
    recovery = (row["loss"] or {}).get("recovery")
    if row["method"] == DENSE or not recovery or not recovery["changes"]:
        return None
    share = f"{recovery['recovered']} of {recovery['changes']}"
    mean = recovery["mean_tokens"]
    return share if mean is None else f"{mean:.0f} tokens ({share})"


NEAR = 0.05
"""Methods are comparable if their achieved sparsity is at most this far below the largest."""


def headline(summary: Row) -> str:
    """A sentence on the best method of comparable sparsity; "" if nothing was measured."""
    measured = [row for row in summary["rows"] if row["method"] != DENSE and _main(row)]
    if not measured:
        return ""
    alike = comparable(measured)
    costs = [
        (estimate["mean"] if metric == "loss_after" else -estimate["mean"], metric, row)
        for row in alike
        for metric, estimate in filter(None, [_main(row)])
    ]
    cost, metric, row = min(costs, key=lambda entry: entry[0])
    name = {"loss_after": "loss after the changes"}.get(metric, metric)
    return (
        f"{row['label']}: {name} {abs(cost):.3f} at {percent(row['achieved_sparsity'])} "
        f"achieved sparsity, the best of {count(len(alike), 'method')} with similar sparsity."
    )


def comparable(rows: Sequence[Row]) -> list[Row]:
    """Rows whose achieved sparsity is at most ``NEAR`` below the largest."""
    most = max(float(row["achieved_sparsity"]) for row in rows)
    return [row for row in rows if row["achieved_sparsity"] >= most - NEAR]
