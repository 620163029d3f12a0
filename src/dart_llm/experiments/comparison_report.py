"""Tables, notes, conclusion, files and page of a comparison.

A method beats another on a task when the paired 95 % interval excludes "no difference"; it is only
counted where both removed the same share of neurons, to a point.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from dart_llm.evaluation.measurement import LEAK
from dart_llm.experiments import comparison_plots, run_facts
from dart_llm.experiments.comparison import DENSE, GRIFFIN, TOO_FEW, Equal, Row, amount
from dart_llm.experiments.stats import Interval
from dart_llm.experiments.store import SCHEMA
from dart_llm.reporting import page
from dart_llm.reporting.table import (
    Column,
    PageTable,
    Record,
    Table,
    bytes_text,
    escaped,
    grouped,
)
from dart_llm.reporting.words import FEWEST_ITEMS, count, dtype_text, percent, quantity

UNEQUAL, OTHER_MEAN = "†", "§"
"""Marks in the tables."""

MOST_NAMES = 4
"""Rows that a note names, at most."""

LEAK_NOTE = f"LEAK - {LEAK}. Its numbers are no measure of a method's quality."

USUAL = 0.5
"""The sparsity that the conclusion speaks of, or the nearest one measured."""

LONG = 24
"""On the page, a table of more rows is folded."""


# The conclusion: one sentence per model and protocol.


def conclusion(rows: Sequence[Row]) -> str:
    """How the first method does at the usual sparsity, or near it, on each model."""
    groups = _groups(rows)
    honest = {name: group for name, group in groups.items() if not any(row.leaks for row in group)}
    parts = [f"{name}: {_headline(group)}" if name else _headline(group)
             for name, group in (honest or groups).items()]  # fmt: skip
    failed = sum(not row.done for row in rows)
    parts += [f"{count(failed, 'cell')} failed"] if failed else []
    return f"{'; '.join(parts) or 'Nothing was measured'}."


def _groups(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows of whole-model pruning by model, dtype and protocol; named by what differs."""
    found = grouped(
        (row for row in rows if row.layers is None and row.done),
        lambda row: (row.model, row.dtype, f"protocol {row.protocol or 'not known'}"),
    )
    varied = [place for place in range(3) if len({key[place] for key in found}) > 1]
    groups = {}
    for key, members in found.items():
        leak = ["LEAK"] if any(row.leaks for row in members) else []
        groups[" ".join([*(str(key[place]) for place in varied), *leak])] = members
    return groups


def _headline(rows: Sequence[Row]) -> str:
    """One method at one sparsity over its tasks: against GRIFFIN, else dense, else by itself."""
    pruned = [row for row in rows if row.pruned]
    shown = [row for row in pruned if row.method != GRIFFIN] or pruned or rows
    method = next((row.method for row in shown if row.method == "dart"), shown[0].method)
    amounts = {row.requested for row in shown if row.method == method}
    requested = min(amounts, key=lambda one: (one is None, abs((one or 0.0) - USUAL), one or 0.0))
    compared = [row for row in shown if (row.method, row.requested) == (method, requested)]
    amount = "" if requested is None or not compared[0].pruned else f" at {percent(requested)}"
    subject = f"{method}{amount}"
    if method != GRIFFIN and any(row.to_griffin or row.equal_sparsity for row in compared):
        return _verdicts(compared, subject, GRIFFIN, _against_griffin)
    if any(row.to_dense is not None for row in compared):
        return _verdicts(compared, subject, DENSE, lambda row: row.to_dense)
    return f"{subject}: " + ", ".join(f"{r.metric} {r.quantity} on {r.task}" for r in compared)


def _against_griffin(row: Row) -> Interval | None:
    """At equal achieved sparsity; None where no such GRIFFIN was measured."""
    if row.to_griffin is not None and row.gap is not None and not row.unequal:
        return row.to_griffin
    return None if row.equal_sparsity is None else row.equal_sparsity.interval


def _verdicts(
    rows: Sequence[Row], subject: str, other: str, against: Callable[[Row], Interval | None]
) -> str:
    """ "dart at 50 % against griffin: better on 2 of 3 tasks, no clear difference on 1"."""
    outcomes = dict.fromkeys(("better", "worse", UNCLEAR, "not compared at equal sparsity"), 0)
    for row in rows:
        interval = against(row)
        verdict = "not compared at equal sparsity" if interval is None else row.verdict(interval)
        outcomes[verdict if verdict in outcomes else UNCLEAR] += 1
    won = f"better on {outcomes.pop('better')} of {count(len(rows), 'task')}"
    others = [f"{words} on {number}" for words, number in outcomes.items() if number]
    return f"{subject} against {other}: {', '.join([won, *others])}"


UNCLEAR = "no clear difference"


# What the published protocol leaks.


@dataclass(frozen=True)
class Leak:
    """One method under the protocols ``full`` and ``published`` on the same items."""

    full: Row
    published: Row
    interval: Interval | None
    """Published against full: a difference, or a ratio of perplexities."""

    @property
    def sentence(self) -> str:
        """How much better the protocol that has seen the answers looks."""
        row = self.published
        if self.interval is None:
            return f"{row.label} on {row.task}: not known: no shared items."
        change, verdict = amount(self.interval, row.perplexity), row.verdict(self.interval)
        words = {"better": "flattered by the leak", "": "within noise"}
        known = f", {words.get(verdict, verdict)}" if self.interval.ends else ""
        return f"{row.label} on {row.task}: published against full {change}{known}."


def leaks(rows: Sequence[Row]) -> list[Leak]:
    """Every row that was measured under both protocols; what differs is what the masks leak."""
    found: dict[Any, dict[str | None, Row]] = {}
    for row in rows:
        if row.done and row.pruned:
            key = (row.model, row.dtype, row.task, row.label, row.layers, row.keep, row.seed)
            found.setdefault(key, {})[row.protocol] = row
    pairs = [(p["full"], p["published"]) for p in found.values() if {"full", "published"} <= {*p}]
    return [Leak(full, row, row.scores.against(full.scores)) for full, row in pairs]


# Footnotes: only what applies to the rows that are shown.


def footnotes(rows: Sequence[Row]) -> list[str]:
    """What a reader of the tables must know."""
    done = [row for row in rows if row.done]
    whole = [row for row in done if row.pruned and row.method != GRIFFIN and row.layers is None]
    pairs = sum(i is not None for row in done for i in (row.to_dense, row.to_griffin))
    measured = {row.method for row in done}
    executors = {row.executor for row in done if row.executor}
    notes: list[tuple[Any, str]] = [
        (any(row.leaks for row in rows), LEAK_NOTE),
        (
            True,
            "Intervals are 95 % bootstrap intervals over items: beside a score of the score "
            "itself, beside a difference paired by item, as in the pictures. "
            '"better" and "worse" stand where the interval excludes no difference and at least '
            f'{FEWEST_ITEMS} items differ, "{TOO_FEW}" where fewer do. Fewer than {FEWEST_ITEMS} '
            "items have no interval.",
        ),
        (
            pairs,
            f"{count(pairs, 'comparison')} with dense and GRIFFIN: where nothing differs, about 1 "
            "in 20 still looks so.",
        ),
        (whole and DENSE not in measured, "dense was not measured: its columns are empty."),
        (whole and GRIFFIN not in measured, "GRIFFIN was not measured: its columns are empty."),
        (
            any(row.unequal for row in whole),
            f"{UNEQUAL} achieved sparsity differs from GRIFFIN's at the same requested sparsity by "
            "more than 1 point: compare at equal achieved sparsity instead.",
        ),
        (
            whole and GRIFFIN in measured,
            "At equal achieved sparsity, or FFN bytes: against the GRIFFIN that was measured where "
            "it removed as much, or read as many bytes, to 1 point; empty where there is none.",
        ),
        (
            any(map(differs, done)),
            f"{OTHER_MEAN} the task's own aggregate is not the mean over items, which is what the "
            "intervals are of.",
        ),
        (
            executors and "masked" not in executors,
            "FFN bytes: read per decoded token over dense, as executed, all overheads included.",
        ),
        (
            "masked" in executors,
            "FFN bytes: read per decoded token over dense, if the compact executor ran, all "
            "overheads included; the masked executor reads all of them.",
        ),
    ]
    return [*(note for applies, note in notes if applies), *_of_measurements(done)]


def _of_measurements(done: Sequence[Row]) -> list[str]:
    """What the measurements themselves say, each once, with whom it concerns."""
    found: dict[str, list[str]] = {}
    for row in done:
        for note in row.notes:
            if note != LEAK:
                found.setdefault(note, []).append(f"{row.label} on {row.task}")
    notes = []
    for note, every in found.items():
        labels = list(dict.fromkeys(every))
        more = f" and {len(labels) - MOST_NAMES} more" if len(labels) > MOST_NAMES else ""
        notes.append(f"{note} ({', '.join(labels[:MOST_NAMES])}{more})")
    return notes


def differs(row: Row) -> bool:
    """Whether the metric is not the mean over the items that the intervals are computed from."""
    mean = row.scores.mean
    if mean is None or row.value is None:
        return False
    return abs(mean - row.value) > 1e-4 * max(1.0, abs(row.value))


def failures(rows: Sequence[Row]) -> list[str]:
    """One sentence per failed cell."""
    return [
        f"{name(row, row.seed is not None)} on {row.task} ({row.model}) failed: {row.error}"
        for row in rows
        if not row.done
    ]


# The tables: columns once, for the terminal, Markdown and the page.

NAMED = "95 % intervals under a score are of the score itself, under a difference paired by item"


class ComparisonTable(Table):
    """On the terminal, heads are short and intervals are under their numbers."""

    @property
    def terminal_caption(self) -> str:
        return f"{self.caption}; {NAMED}"

    def terminal_head(self, column: Column) -> str:
        return column.head.partition(" (")[0].partition(",")[0].removesuffix(" tokens")

    def terminal_cell(self, column: Column, row: Record) -> str:
        return _in_lines(super().terminal_cell(column, row))


def _in_lines(cell: str) -> str:
    value, ends, verdict = stacked(cell)
    return "\n".join(filter(None, (f"{value} {verdict}".rstrip(), ends)))


def stacked(cell: str) -> tuple[str, str, str]:
    """ "0.4 (0.3 to 0.5) better" as its number, its interval and its verdict."""
    value, _, rest = cell.partition(" (")
    ends, closed, verdict = rest.partition(")")
    return (value, ends, verdict.strip()) if closed else (cell, "", "")


def tables(rows: Sequence[Row]) -> list[ComparisonTable]:
    """One table per model, task and protocol, layer sweeps by themselves, in the rows' order."""
    whole = {row.group for row in rows if row.layers is None and row.method != DENSE}
    found = grouped(rows, lambda row: (*row.group, row.layers is not None and row.group in whole))
    return [
        ComparisonTable(
            "", caption(group), _columns(group), [{"row": row} for row in group], tight=True
        )
        for group in found.values()
    ]


def _column(head: str, text: Callable[[Row], str | None], terminal: bool = True) -> Column:
    return Column(head, lambda record: text(record["row"]), terminal=terminal)


def _columns(rows: Sequence[Row]) -> tuple[Column, ...]:
    measured = next((row for row in rows if row.done), None)
    metric = measured.metric if measured else "metric"
    better = "higher" if measured is None or measured.higher_is_better else "lower"
    seeds = len({row.seed for row in rows}) > 1

    def griffin(row: Row) -> str | None:
        return _marked(row.change(row.to_griffin), row)

    columns = (
        _column("method", lambda row: name(row, seeds)),
        _column("requested", lambda row: _share(row.requested), False),
        _column("achieved", lambda row: _marked(_share(row.achieved), row)),
        _column("dense tokens", lambda row: _share(row.dense_share)),
        _column("re-masks", lambda row: None if row.remasks is None else f"{row.remasks:,}"),
        _column(f"{metric} ({better} is better; 95 % of itself)", _metric),
        _column("against dense (95 %, paired)", lambda row: row.change(row.to_dense)),
        _column("against GRIFFIN, same requested sparsity (95 %, paired)", griffin),
        _column("at equal achieved sparsity", lambda row: _equal(row, row.equal_sparsity), False),
        _column("at equal FFN bytes", lambda row: _equal(row, row.equal_bytes), False),
        _column("FFN bytes", _bytes, False),
        _column("bytes per token", _token_bytes, False),
        _column("weights", lambda row: bytes_text(row.weight_bytes), False),
    )
    return columns if len(_weights(rows)) > 1 else columns[:-1]


def _weights(rows: Sequence[Row]) -> set[float | None]:
    return {row.weight_bytes for row in rows if row.done}


def caption(rows: Sequence[Row]) -> str:
    """ "arc_easy_local: SmolLM2 (float32), protocol decode; 40 items; weights 513.1 MiB"."""
    row, items = rows[-1], sorted({row.items for row in rows if row.items})
    leak = "LEAK, " if any(row.leaks for row in rows) else ""
    dtype = f" ({row.dtype})" if row.dtype else ""
    parts = [f"{leak}{row.task}: {row.model}{dtype}, protocol {row.protocol or 'not known'}"]
    if row.layers is not None:
        parts[0] += ", one layer pruned at a time"
    if items:
        several = f"{items[0]} to {items[-1]} items"
        parts.append(several if len(items) > 1 else count(items[0], "item"))
    weights = _weights(rows)
    if len(weights) == 1 and None not in weights:
        parts.append(f"weights {bytes_text(*weights)}")
    return "; ".join(parts)


def name(row: Row, seeds: bool = False) -> str:
    """The row's label, with what tells it from its neighbours."""
    text = row.label
    if row.layers is not None:
        keep = "" if row.keep is None else f", keep {percent(row.keep)}"
        text = f"{row.method}, layer {row.layers}{keep}"
    seed = f", seed {'?' if row.seed is None else row.seed}" if seeds else ""
    return f"{text}{seed}{row.mostly_dense}"


def _share(value: float | None) -> str | None:
    return None if value is None else percent(value)


def _bytes(row: Row) -> str | None:
    return None if row.bytes_share is None else f"{row.bytes_share:.3f}"


def _token_bytes(row: Row) -> str | None:
    return None if row.token_bytes_share is None else f"{row.token_bytes_share:.3f}"


def _marked(text: str | None, row: Row) -> str | None:
    return f"{text} {UNEQUAL}" if text and row.unequal else text


def _metric(row: Row) -> str:
    if not row.done:
        return "failed"
    text = row.quantity
    if row.interval is not None and row.to_dense is None:  # else the paired one, as in the plots
        text += f" ({row.interval.words(lambda end: quantity(end, row.perplexity))})"
    return f"{text} {OTHER_MEAN}" if differs(row) else text


def _equal(row: Row, equal: Equal | None) -> str | None:
    return None if equal is None else row.change(equal.interval)


# The files: ``compare.md``, ``compare.csv``, ``compare.json`` and ``report.html``.


def markdown(rows: Sequence[Row]) -> str:
    """The whole comparison as one Markdown document."""
    parts = ["# Comparison", escaped(conclusion(rows))]
    for table in tables(rows):
        parts.append("\n".join([f"## {escaped(table.caption)}", "", *table.lines()]))
    for head, lines in (
        ("What the published protocol leaks", [leak.sentence for leak in leaks(rows)]),
        ("Failed cells", failures(rows)),
        ("Notes", footnotes(rows)),
    ):
        if lines:
            parts += [f"## {head}", "\n".join(f"- {escaped(line)}" for line in lines)]
    return "\n\n".join(parts) + "\n"


INTERVALS, EQUALS = ("interval", "to_dense", "to_griffin"), ("equal_sparsity", "equal_bytes")

ENDS = ("low", "high", "estimate", "n", "no_interval")

PAIRED = (*ENDS, "differing", "significant")


def to_dict(interval: Interval | None) -> dict[str, Any] | None:
    """An interval as JSON-able data."""
    return None if interval is None else interval.to_dict()


def record(row: Row) -> dict[str, Any]:
    """A row as JSON-able data, its intervals and comparisons nested."""
    nested = ("scores", "traffic", "checkpoint", "notes", *INTERVALS, *EQUALS)
    data = {f.name: getattr(row, f.name) for f in fields(Row) if f.name not in nested}
    data |= {key: to_dict(getattr(row, key)) for key in INTERVALS}
    for key in EQUALS:
        equal: Equal | None = getattr(row, key)
        data[key] = equal and {
            "griffin": equal.value,
            "between": [equal.at],
            "interval": to_dict(equal.interval),
        }
    notes, checkpoint = list(row.notes), dict(row.checkpoint)
    facts = {"unequal": row.unequal, "leaks": row.leaks}
    return {**data, **facts, "notes": notes, "checkpoint": checkpoint}


def document(rows: Sequence[Row]) -> dict[str, Any]:
    """The whole comparison as JSON-able data."""
    return {
        "schema": SCHEMA,
        "conclusion": conclusion(rows),
        "rows": [record(row) for row in rows],
        "leaks": [
            {
                "label": leak.published.label,
                "model": leak.published.model,
                "task": leak.published.task,
                "full": leak.full.value,
                "published": leak.published.value,
                "interval": to_dict(leak.interval),
            }
            for leak in leaks(rows)
        ],
        "failures": failures(rows),
        "notes": footnotes(rows),
    }


def _csv_row(row: Row) -> dict[str, Any]:
    """All columns of one row, the same for every row: an interval is a column for each number."""
    line: dict[str, Any] = {}
    for key, value in record(row).items():
        known = value or {}
        if key in INTERVALS:
            ends = ENDS if key == "interval" else PAIRED
            line |= {f"{key}.{end}": known.get(end) for end in ends}
        elif key in EQUALS:
            line[f"{key}.griffin"] = known.get("griffin")
            line[f"{key}.between"] = " ".join(f"{at:.6g}" for at in known.get("between", ()))
            line |= {f"{key}.{end}": (known.get("interval") or {}).get(end) for end in PAIRED}
        elif key not in ("notes", "checkpoint"):
            line[key] = value
    return line


def csv_table(rows: Sequence[Row]) -> Table:
    """compare.csv: a line per row."""
    lines = [_csv_row(row) for row in rows]
    fields_of_rows = list(lines[0]) if lines else []
    return Table("compare", "", (), lines, terminal=False, fields=fields_of_rows)


def page_text(config: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """``report.html``; ``config``: config.json.  Without matplotlib it has no plots."""
    pictures, missing = page.pictures(comparison_plots.make(rows))
    content = {
        "title": title(rows),
        "conclusion": conclusion(rows),
        "further": [],
        "many": False,
        "facts": _facts(config, rows),
        "leak": LEAK_NOTE if any(row.leaks for row in rows) else "",
        "leaks": [leak.sentence for leak in leaks(rows)],
        "pictures": pictures,
        "missing": missing,
        "tables": [(table.html(), len(table.rows) > LONG) for table in tables(rows)],
        "failures": failures(rows),
        "notes": footnotes(rows),
        "checkpoints": _checkpoints(rows),
    }
    return run_facts.render(config, "compare.html", content, stacked=stacked)


def title(rows: Sequence[Row]) -> str:
    """What was compared, and on which model."""
    models = list(dict.fromkeys(row.model for row in rows))
    labels = list(dict.fromkeys(row.label for row in rows if row.method != DENSE)) or [DENSE]
    methods = {row.method for row in rows if row.method != DENSE}
    if not rows:
        return "Nothing was measured"
    what = labels[0] if len(labels) == 1 else f"{count(len(methods), 'method')} compared"
    if methods and all(row.layers is not None for row in rows if row.method != DENSE):
        what = "Layer by layer"
    return f"{what} on {models[0] if len(models) == 1 else f'{len(models)} models'}"


def _facts(config: Mapping[str, Any], rows: Sequence[Row]) -> list[tuple[str, str, bool]]:
    """Name, value, and whether the value is to be set as code."""
    done = sum(row.done for row in rows)
    requested = sorted({row.requested for row in rows if row.requested})
    varied = {
        "models": run_facts.named(row.model for row in rows),
        "dtype": run_facts.named(row.dtype for row in rows),
        "methods": run_facts.named(row.method for row in rows),
        "requested sparsities": ", ".join(map(percent, requested)) or "none",
        "tasks": run_facts.named(row.task for row in rows),
        "protocols": run_facts.named(row.protocol for row in rows),
        "seeds": run_facts.named(row.seed for row in rows),
        "cells": f"{done} done, {len(rows) - done or 'none'} failed",
    }
    origin = run_facts.origin_facts(config)
    return [*((name, value, False) for name, value in varied.items()), *origin]


def _checkpoints(rows: Sequence[Row]) -> PageTable | None:
    """The files that were measured, with what identifies them."""
    keys = ("name", "file_quantisation", "dtype", "revision", "sha256")
    known = [dict(row.checkpoint) for row in rows if row.checkpoint]
    for one in known:
        one["dtype"] = one.get("dtype") and dtype_text(one)
    body = dict.fromkeys(
        tuple(str(one.get(key) or "not known")[:40] for key in keys) for one in known
    )
    head = ("checkpoint", "file quantisation", "dtype", "revision", "sha256 (start)")
    return PageTable("Checkpoints", head, tuple(body), numeric=False) if body else None
