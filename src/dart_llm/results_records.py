"""Runs as flat records, JSON, CSV or Markdown; one line per run or per measured row."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dart_llm.compare_row import Row
from dart_llm.results import finite
from dart_llm.results_info import RunInfo
from dart_llm.results_rows import GENERATE

MOST = 4
"""Results of one run that fit into a line of the short table."""


def records(runs: Iterable[RunInfo], long: bool = False) -> list[dict[str, Any]]:
    """Flat data: one per run with distinct values joined, or with ``long`` one per measured row."""
    return [record for run in runs for record in (_rows(run) if long else [_run(run)])]


def _head(run: RunInfo) -> dict[str, Any]:
    return {
        "experiment": run.experiment,
        "time": run.time,
        "status": run.status,
        "kind": run.kind,
    }


def _run(run: RunInfo) -> dict[str, Any]:
    shown = own_rows(run)
    joined = {
        "model": run.models,
        "quantisation": run.quantisations,
        "dtype": run.dtypes,
        "method": run.methods,
        "sparsity": run.sparsities,
        "tasks": run.tasks,
        "achieved_sparsity": [row.achieved for row in shown],
        "dense_token_share": [row.dense_share for row in shown],
        "remasks": [row.remasks for row in shown],
    }
    return {
        **_head(run),
        **{name: _joined(values) for name, values in joined.items()},
        "results": "; ".join(results(run)),
        "seconds": run.seconds,
        "path": str(run.path),
    }


def _rows(run: RunInfo) -> list[dict[str, Any]]:
    found = [
        {
            **_head(run),
            "model": row.model,
            "quantisation": row.checkpoint.get("file_quantisation"),
            "dtype": row.dtype,
            "method": row.method,
            "label": row.label,
            "sparsity": row.asked,
            "layers": row.layers,
            "keep": row.keep,
            "task": row.task,
            "protocol": row.protocol,
            "seed": row.seed,
            "metric": row.metric,
            "value": row.value,
            "items": row.items or None,
            "achieved_sparsity": row.achieved,
            "sparsity_while_pruned": row.while_pruned,
            "dense_token_share": row.dense_share,
            "remasks": row.remasks,
            "ffn_bytes_share": row.bytes_executed,
            "result": row.status,
            "error": row.error,
            "path": str(run.path),
        }
        for row in run.rows
    ]
    return found or [
        {**_head(run), "error": "; ".join(run.problems) or None, "path": str(run.path)}
    ]


def own_rows(run: RunInfo) -> list[Row]:
    """The rows without dense ones, unless there are only those."""
    return [row for row in run.rows if not row.method.startswith("dense")] or list(run.rows)


def results(run: RunInfo) -> list[str]:
    """A run's results in a few words each, then what is missing or damaged."""
    rows = own_rows(run)
    several = len({row.label for row in rows}) > 1
    texts = [f"{row.label} {result(row)}" if several else result(row) for row in rows]
    if len(texts) > MOST:
        texts = [f"{len(run.rows)} results"]
    return [*texts, *remarks(run)]


def remarks(run: RunInfo) -> list[str]:
    """What is missing, failed or damaged."""
    found = list(run.problems)
    if run.planned is not None and run.planned != run.measured:
        found.append(f"{run.measured} of {run.planned} cells")
    failed = sum(row.status == "failed" for row in run.rows)
    return [*found, *([f"{failed} failed"] if failed else [])]


def result(row: Row) -> str:
    """Task, metric and value of one row; the protocol, unless it is ``decode``."""
    name = task_name(row.task)
    if row.status == "failed":
        return f"{name} failed: {row.error}"
    if row.value is None:
        return f"{name}: done"
    if row.protocol not in (None, "decode"):
        name = f"{name} ({row.protocol})"
    if row.task == GENERATE:
        return f"{name} {row.value:.4g} tokens/s"
    metric = "" if name.startswith(row.metric) else f"{row.metric} "
    return f"{name} {metric}{row.value:.4g}"


def task_name(task: str) -> str:
    """A task without the folders of its file."""
    kind, colon, text = task.partition(":")
    return f"{kind}:{Path(text).name}" if colon and text else task


def _joined(values: Iterable[Any]) -> str | float | int | None:
    """The one value, the distinct ones joined by spaces, or None."""
    distinct = list(dict.fromkeys(value for value in values if value is not None))
    if len(distinct) > 1:
        return " ".join(f"{x:.6g}" if isinstance(x, float) else str(x) for x in distinct)
    return distinct[0] if distinct else None


def to_json(runs: Iterable[RunInfo]) -> str:
    """One document: a list of runs, each with its ``rows`` and ``problems``."""
    data = [
        {
            **_run(run),
            "started": None if run.started is None else run.started.isoformat(),
            "model": list(run.models),
            "quantisation": list(run.quantisations),
            "dtype": list(run.dtypes),
            "method": list(run.methods),
            "sparsity": list(run.sparsities),
            "tasks": list(run.tasks),
            "cells": run.planned,
            "problems": list(run.problems),
            "results": results(run),
            "rows": _json_rows(run),
        }
        for run in runs
    ]
    for run_data in data:
        for name in ("achieved_sparsity", "dense_token_share", "remasks"):
            del run_data[name]  # each row has its own
    return json.dumps(finite(data), indent=1, allow_nan=False)


def _json_rows(run: RunInfo) -> list[dict[str, Any]]:
    left_out = (*_head(run), "path")
    rows = _rows(run) if run.rows else []
    return [{key: v for key, v in row.items() if key not in left_out} for row in rows]


def to_csv(runs: Iterable[RunInfo], long: bool = False) -> str:
    """Comma-separated values with a header; numbers that are not known are empty."""
    buffer = io.StringIO()
    data = records(runs, long)
    writer = csv.DictWriter(buffer, _columns(data), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(data)
    return buffer.getvalue()


def to_markdown(runs: Iterable[RunInfo], long: bool = False) -> str:
    """A Markdown table; shares as per cent."""
    hidden = ("path", "seconds", "label", "protocol", "seed", "ffn_bytes_share")
    data = records(runs, long)
    names = [name for name in _columns(data) if name not in hidden and _any(data, name)]
    lines = [names, ["---"] * len(names)]
    lines += [[_cell(name, record.get(name)) for name in names] for record in data]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _columns(data: Sequence[Mapping[str, Any]]) -> list[str]:
    longest_first = sorted(data, key=lambda record: -len(record))
    return list(dict.fromkeys(name for record in longest_first for name in record))


def _any(data: Sequence[Mapping[str, Any]], name: str) -> bool:
    return any(record.get(name) not in (None, "") for record in data)


def _cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        share = name in ("sparsity", "keep") or name.endswith(("_sparsity", "_share", "_pruned"))
        return f"{value:.1%}" if share else f"{value:.4g}"
    return str(value).replace("|", "\\|").replace("\n", " ")
