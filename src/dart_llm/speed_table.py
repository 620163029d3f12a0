"""The tables of speed.json: Markdown, CSV, the terminal's, and sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from dart_llm.markdown import escaped, table_lines
from dart_llm.results import write_csv, write_text
from dart_llm.sentences import percent

MIB = 2**20

HEADS = (
    "row",
    "pp tokens/s",
    "first token ms",
    "tg ms",
    "+-",
    "token 5/50/95 %",
    "tg tokens/s",
    "achieved",
    "dense tokens",
    "re-masks",
    "x transformers",
    "x own dense",
    "limit",
    "of limit",
    "GB/s",
    "of read",
    "attach ms",
    "extra MiB",
    "peak MiB",
    "all ms",
    "all x transformers",
    "all x own dense",
)
TERMINAL = (0, 1, 3, 4, 7, 10, 11, 12, 13, 14)
"""Columns that fit a terminal."""

COST_HEADS = ("cost", "row", "against", "ms", "+-", "of a token of", "share of it")
Row = Mapping[str, Any]


def cells(row: Row) -> list[str]:
    """One row for people, under ``HEADS``."""
    return [
        row["row"],
        number(row["pp_tokens_per_second"]),
        number(row["first_token_ms"]),
        number(row["tg_ms"]),
        number(row["tg_spread_ms"]),
        "/".join(number(row[f"token_ms_{at}"]) for at in ("p5", "median", "p95")),
        number(row["tg_tokens_per_second"]),
        percent(row["achieved_sparsity"]),
        percent(row["dense_token_share"]),
        f"{row['remasks']:.1f}",
        f"{row['times_transformers']:.2f}",
        f"{row['times_own_dense']:.2f}",
        f"{row['limit']:.2f}",
        "" if row["share_of_limit"] is None else percent(row["share_of_limit"]),
        f"{row['bytes_per_second'] / 1e9:.1f}",
        percent(row["share_of_read_bandwidth"], 0),
        number(row["attach_ms"]),
        _mib(row["extra_memory_bytes"]),
        _mib(row["peak_growth_bytes"]),
        number(row.get("all_ms")),
        _times(row.get("all_times_transformers")),
        _times(row.get("all_times_own_dense")),
    ]


def cost_cells(cost: Row) -> list[str]:
    """One cost for people, under ``COST_HEADS``."""
    return [
        cost["cost"],
        cost["row"],
        cost["against"],
        number(cost["ms"]),
        number(cost["spread_ms"]),
        cost["token_of"],
        percent(cost["share_of_token"]),
    ]


def number(value: float | None) -> str:
    """To three digits or so: 0.042, 1.23, 17.6, 1234; "" for what was not measured."""
    if value is None:
        return ""
    size = abs(value)
    digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _mib(value: int | None) -> str:
    return "" if value is None else number(value / MIB)


def caption(document: Row) -> str:
    """What was measured, and where."""
    facts, machine = document["checkpoint"], document["machine"]
    read = document["read_bandwidth"]["bytes_per_second"] / 1e9
    sittings = document["sittings"]
    return (
        f"{facts['name']} (file quantisation {facts['file_quantisation'] or 'none'}, "
        f"{facts['dtype']}): {document['prompt_tokens']} prompt + {document['tokens']} timed "
        f"tokens, {document['repeats']} repetitions in shuffled order"
        f"{f', in {sittings} sittings' if sittings > 1 else ''}; {machine['processor']}, "
        f"{machine['threads']} threads, device {machine['device']}, torch "
        f"{document['versions']['torch']}, kernels {document['kernels'] or 'none'}; it reads "
        f"{read:.1f} GB/s; f = {document['ffn_share_of_bytes_read']:.3f} at a mean context of "
        f"{document['mean_context']:.0f} tokens"
    )


def sentences(document: Row) -> list[str]:
    """What every row of a method reached: a line each."""
    return [
        f"{row['row']}: {row['times_transformers']:.2f} x as fast as transformers, "
        f"{row['times_own_dense']:.2f} x as fast as {document['own_dense']}, "
        f"{percent(row['share_of_limit'])} of the {row['limit']:.2f} x that the bytes allow at "
        f"{percent(row['achieved_sparsity'])} removed"
        for row in document["rows"]
        if row["variant"] is not None
    ]


def tables(document: Row) -> tuple[list[list[str]], list[list[str]]]:
    """Rows and costs with their heads; costs may be the head alone."""
    rows = [list(HEADS), *map(cells, document["rows"])]
    return rows, [list(COST_HEADS), *map(cost_cells, document["costs"])]


def markdown(document: Row) -> str:
    """All tables, the notes, and what the columns mean."""
    rows, costs = tables(document)
    lines = ["# Speed", "", escaped(caption(document)), "", *table_lines(rows[0], rows[1:]), ""]
    if len(costs) > 1:
        lines += ["## Costs", "", *table_lines(costs[0], costs[1:]), ""]
        what = {cost["cost"]: cost["what"] for cost in document["costs"]}
        lines += [*(f"- {name}: {words}" for name, words in what.items()), ""]
    lines += ["## In words", "", *(f"- {escaped(line)}" for line in sentences(document)), ""]
    if document["notes"]:
        lines += ["## Notes", "", *(f"- {escaped(line)}" for line in document["notes"]), ""]
    lines += ["## What the columns mean", ""]
    lines += [f"- `{name}`: {words}" for name, words in document["definitions"].items()]
    return "\n".join(lines) + "\n"


def rich_tables(document: Row) -> list[Table]:
    """The tables without the columns that a terminal has no room for."""
    rows, costs = tables(document)
    picked = [[row[place] for place in TERMINAL] for row in rows]
    found = [_rich(caption(document), picked)]
    if len(costs) > 1:
        found.append(_rich("Costs", costs))
    return found


def _rich(title: str, rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for place, head in enumerate(rows[0]):
        table.add_column(head, justify="right" if place else "left", no_wrap=not place)
    for row in rows[1:]:
        table.add_row(*row)
    return table


def write(folder: Path, document: Row) -> None:
    """speed.md, and speed.csv with a line per row and per cost."""
    write_text(folder / "speed.md", markdown(document))
    rows: list[Row] = [*document["rows"], *document["costs"]]
    head = list(dict.fromkeys(name for row in rows for name in row))
    write_csv(folder / "speed.csv", head, ([row.get(name) for name in head] for row in rows))
