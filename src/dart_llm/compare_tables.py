"""The tables of a comparison: their cells in words, for the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table as RichTable

from dart_llm.compare_format import amount, quantity
from dart_llm.compare_notes import BETWEEN, OTHER_MEAN, UNEQUAL, differs, footnotes
from dart_llm.compare_row import DENSE, Equal, Row
from dart_llm.compare_words import conclusions, leak_sentence, leaks
from dart_llm.report_tables import NOTHING, Table, bytes_text
from dart_llm.sentences import count, percent
from dart_llm.stats import Interval

TERMINAL = {
    0: "method",
    2: "achieved",
    8: "dense",
    9: "re-masks",
    3: "{}",
    4: "against dense",
    5: "against GRIFFIN",
}
"""Columns of the full table that fit a terminal, and their heads there."""


def tables(rows: Sequence[Row]) -> list[Table]:
    """One table per model, task and protocol, in the order of the rows."""
    whole = {row.group for row in rows if row.layers is None and row.method != DENSE}
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        layered = row.layers is not None and row.group in whole
        found.setdefault((*row.group, layered), []).append(row)
    return [_table(own) for own in found.values()]


def caption(row: Row) -> str:
    """ "arc_easy_local, SmolLM2 (float32), protocol decode"."""
    dtype = f" ({row.dtype})" if row.dtype else ""
    layers = ", one layer pruned at a time" if row.layers is not None else ""
    return f"{row.task}: {row.model}{dtype}, protocol {row.protocol or 'not known'}{layers}"


def _table(rows: Sequence[Row]) -> Table:
    measured = [row for row in rows if row.status == "done"]
    metric = measured[0].metric if measured else "metric"
    better = "higher" if not measured or measured[0].higher_is_better else "lower"
    counts = sorted({row.items for row in measured if row.items})
    items = " to ".join(str(n) for n in dict.fromkeys((counts[0], counts[-1]))) if counts else ""
    noun = "item" if items == "1" else "items"
    about = f"; {items} {noun}" if items else ""
    leak = "LEAK, " if any(row.leaks for row in rows) else ""
    head: tuple[str, ...] = (
        "method",
        "asked",
        "achieved",
        f"{metric} ({better} is better)",
        "against dense",
        "against GRIFFIN, same asked sparsity",
        "at equal achieved sparsity",
        "at equal FFN bytes",
        "dense tokens",
        "re-masks",
        "FFN bytes",
        "weights",
    )
    seeds = len({row.seed for row in rows}) > 1
    body = tuple(_cells(row, seeds) for row in rows)
    weights = {row.weight_bytes for row in measured}
    if len(weights) < 2:  # the same for all: no column
        head, body = head[:-1], tuple(cells[:-1] for cells in body)
        about += f"; weights {bytes_text(*weights)}" if weights - {None} else ""
    return Table(f"{leak}{caption(rows[-1])}{about}", head, body)


def name(row: Row, seeds: bool = False) -> str:
    """The row's label, with what tells it from its neighbours."""
    parts = [row.label]
    if row.layers is not None:
        keep = "" if row.keep is None else f", keep {percent(row.keep)}"
        parts = [f"{row.method}, layer {row.layers}{keep}"]
    if seeds:
        parts.append(f"seed {'?' if row.seed is None else row.seed}")
    return ", ".join(parts)


def _cells(row: Row, seeds: bool) -> tuple[str, ...]:
    unequal = f" {UNEQUAL}" if row.unequal else ""
    if row.status != "done":
        return (name(row, seeds), _share(row.asked), NOTHING, "failed", *[NOTHING] * 8)
    return (
        name(row, seeds),
        _share(row.asked),
        f"{_share(row.achieved)}{unequal}",
        _metric(row),
        _change(row, row.to_dense),
        f"{_change(row, row.to_griffin)}{unequal if row.to_griffin else ''}",
        _equal(row, row.equal_sparsity),
        _equal(row, row.equal_bytes),
        _share(row.dense_share),
        NOTHING if row.remasks is None else f"{row.remasks:,}",
        NOTHING if row.bytes_share is None else f"{row.bytes_share:.3f}",
        bytes_text(row.weight_bytes),
    )


def _share(value: float | None) -> str:
    return NOTHING if value is None else percent(value)


def _metric(row: Row) -> str:
    text = quantity(row.value, row.perplexity)
    if row.interval is not None:
        ends = (row.interval.low, row.interval.high)
        text += f" ({' to '.join(quantity(end, row.perplexity) for end in ends)})"
    return f"{text} {OTHER_MEAN}" if differs(row) else text


def _change(row: Row, interval: Interval | None) -> str:
    if interval is None:
        return NOTHING
    verdict = row.verdict(interval)
    return f"{amount(interval, row.perplexity)}{f' {verdict}' if verdict else ''}"


def _equal(row: Row, equal: Equal | None) -> str:
    if equal is None:
        return NOTHING
    mark = f" {BETWEEN}" if len(equal.between) > 1 else ""
    return f"{_change(row, equal.interval)}{mark}"


def failures(rows: Sequence[Row]) -> list[str]:
    """One sentence per failed cell."""
    return [
        f"{name(row, row.seed is not None)} on {row.task} ({row.model}) failed: {row.error}"
        for row in rows
        if row.status != "done"
    ]


def rich_tables(rows: Sequence[Row]) -> list[RichTable]:
    """The tables without their last columns, each interval under its number."""
    found = []
    for table in tables(rows):
        rich = RichTable(
            title=table.caption, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
        )
        for place, head in TERMINAL.items():
            name = head.format(table.head[place].partition(" (")[0])
            rich.add_column(name, justify="right" if place else "left", no_wrap=place > 0)
        for row in table.rows:
            rich.add_row(*(_two_lines(cell) for cell in (row[place] for place in TERMINAL)))
        found.append(rich)
    return found


def _two_lines(cell: str) -> str:
    """ "0.4 (0.3 to 0.5) better" as "0.4 better" over "0.3 to 0.5"."""
    start, _, rest = cell.partition(" (")
    ends, _, after = rest.partition(")")
    return f"{start}{after}\n{ends}" if rest else cell


def markdown(rows: Sequence[Row]) -> str:
    """The whole comparison as one Markdown document."""
    told = conclusions(rows)
    parts = ["# Comparison", _escaped(told[0]), *(_markdown_table(table) for table in tables(rows))]
    if len(told) > 1:
        parts += ["## In words", _list(told[1:])]
    found = leaks(rows)
    if found:
        parts += ["## What the published protocol leaks", _list(map(leak_sentence, found))]
    failed = failures(rows)
    if failed:
        parts += ["## Failed cells", _list(failed)]
    parts += ["## Notes", _list(footnotes(rows))]
    return "\n\n".join(parts) + "\n"


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {_escaped(line)}" for line in lines)


def _escaped(text: str) -> str:
    """Without line breaks, and with what Markdown would read as a column, HTML or emphasis."""
    plain = " ".join(text.split())
    for sign in "\\|<*`":
        plain = plain.replace(sign, f"\\{sign}")
    return plain


def _markdown_table(table: Table) -> str:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(map(_escaped, cells))} |"

    rule = f"| --- |{' ---: |' * (len(table.head) - 1)}"
    body = [line(row) for row in table.rows]
    return "\n".join([f"## {_escaped(table.caption)}", "", line(table.head), rule, *body])


def summary(rows: Sequence[Row]) -> str:
    """What ends the terminal's tables: the conclusion, and how many cells failed."""
    failed = sum(row.status != "done" for row in rows)
    told = conclusions(rows)[0]
    return f"{told} {count(failed, 'cell')} failed." if failed else told
