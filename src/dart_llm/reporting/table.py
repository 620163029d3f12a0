"""Column and Table: one definition -> terminal, Markdown, CSV, HTML.

Tables of Markdown.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table as RichTable


def table_lines(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> list[str]:
    """Lines of a table; the first ``left`` columns hold words, the others numbers."""
    marks = ["---"] * left + ["---:"] * (len(head) - left)
    return [f"| {' | '.join(map(escaped, row))} |" for row in (head, marks, *rows)]


def escaped(text: str) -> str:
    """Without what would end a cell or begin an element."""
    return text.replace("|", "\\|").replace("<", "\\<")


NOTHING = "–"
"""A cell that was not measured."""

Record = Mapping[str, Any]


@dataclass(frozen=True)
class PageTable:
    """A caption, column heads (the first names the rows), and rows whose first cell is a head."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: bool = True
    strong: int | None = None
    """The row to point out."""


def bytes_text(value: float | None) -> str:
    """53.4 MiB, 1.2 GiB, 812 KiB."""
    if value is None:
        return NOTHING
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(value) >= size:
            return f"{value / size:,.1f} {unit}"
    return f"{value:,.0f} B"


Format = Callable[[Any], str]

Column = tuple[str, str, Format]
"""A key of the rows, its head, and how a value is written."""


@dataclass(frozen=True)
class Sheet:
    """One table; ``name`` is that of its CSV file."""

    section: str
    name: str
    caption: str
    columns: tuple[Column, ...]
    rows: Sequence[Record]

    def table(self) -> PageTable:
        """In words; the first column names the rows."""
        body = tuple(
            tuple(
                NOTHING if row.get(key) is None else write(row[key])
                for key, _, write in self.columns
            )
            for row in self.rows
        )
        return PageTable(self.caption, tuple(head for _, head, _ in self.columns), body)

    def rich(self) -> RichTable:
        """For the terminal."""
        table, found = self.table(), RichTable(title=self.caption, title_justify="left")
        for place, head in enumerate(table.head):
            found.add_column(head, justify="right" if place else "left")
        for row in table.rows:
            found.add_row(*row)
        return found

    def markdown(self) -> str:
        """A pipe table under its caption."""
        table = self.table()
        lines = [table.head, ("---",) * len(table.head), *table.rows]
        cells = [[str(c).replace("|", "\\|").replace("\n", "\\n") for c in line] for line in lines]
        return "\n".join([f"### {self.caption}", "", *(f"| {' | '.join(c)} |" for c in cells)])

    @property
    def header(self) -> list[str]:
        """Columns of the CSV file: every key of the rows that holds no mapping."""
        nested = {key for row in self.rows for key, v in row.items() if isinstance(v, Mapping)}
        return [key for key in (self.rows[0] if self.rows else ()) if key not in nested]

    def csv(self) -> Iterator[list[Any]]:
        """Raw values under ``header``, a list as JSON."""
        header = self.header
        for row in self.rows:
            values = [row.get(key) for key in header]
            yield [json.dumps(v) if isinstance(v, list) else v for v in values]


def _number(digits: int = 3) -> Format:
    def write(value: float) -> str:
        small = value != 0 and abs(value) < 0.5 * 10**-digits
        large = abs(value) >= 1e5
        return f"{value:.1e}" if small or large else f"{value:,.{digits}f}"

    return write


def _columns(keys: str, heads: Sequence[str], write: Format) -> tuple[Column, ...]:
    return tuple((key, head, write) for key, head in zip(keys.split(), heads, strict=True))
