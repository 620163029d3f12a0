"""A drift study in one row per method: means over its sources with 95 % intervals.

A source (a prompt or a passage) is one item, whatever the seeds: several seeds of it are averaged
first.  Differences to dense and to ``never`` are paired by source.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dart_llm import stats
from dart_llm.drift_files import DONE
from dart_llm.drift_methods import DENSE, NEVER
from dart_llm.drift_rows import ACCOUNTING
from dart_llm.measure_rows import DENSE as UNTOUCHED
from dart_llm.merge import merge_reports
from dart_llm.settings_drift import FORCED
from dart_llm.stats import Sample, Value

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
