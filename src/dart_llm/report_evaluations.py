"""The evaluations of a run on its report page: one table each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dart_llm.report_tables import NOTHING, Table
from dart_llm.results_view import ResultsView, mapping, number
from dart_llm.sentences import percent
from dart_llm.task_names import short

TITLES = {"mmlu": "MMLU", "general_nlp": "General NLP", "summarization": "Summaries"}
HEAD = ("task", "method", "metric", "value", "items", "achieved", "dense tokens", "re-masks")


def tables(view: ResultsView) -> list[Table]:
    """One table per evaluation, a line per task, method and metric."""
    found = []
    for name, rows in view.evaluations:
        lines = tuple(line for row in rows for line in _lines(row))
        protocol = mapping(rows[0]["measurement"]).get("protocol", "unknown")
        found.append(Table(f"{TITLES.get(name, name)}, protocol {protocol}", HEAD, lines))
    return found


def notes(view: ResultsView) -> list[str]:
    """What a reader of the numbers must know, each once."""
    every = [
        str(note)
        for _, rows in view.evaluations
        for row in rows
        for note in mapping(row["measurement"]).get("notes") or ()
    ]
    return list(dict.fromkeys(every))


def _lines(row: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    measured = mapping(row["measurement"])
    account = measured.get("accounting")
    own = mapping(account)
    for metric, value in mapping(measured.get("metrics")).items():
        amount = number(value)
        yield (
            short(str(measured.get("task", "unknown"))),
            str(row.get("label", "unknown")),
            str(metric),
            NOTHING if amount is None else f"{amount:.4g}",
            str(len(measured.get("items") or ())),
            _share(own.get("achieved_sparsity"), 0.0 if account is None else None),
            _share(own.get("dense_token_share"), 1.0 if account is None else None),
            str(own.get("remasks", 0)),
        )


def _share(value: Any, default: float | None) -> str:
    known = number(value)
    share = default if known is None else known
    return NOTHING if share is None else percent(share)
