"""``Table`` and ``Column``: one definition of a table for the terminal, Markdown, CSV and HTML.

The rows of a ``Table`` are usually records, that is, mappings from keys to raw values.  Its columns
say which values are displayed, and how.  The CSV file contains raw values instead.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.table import Table as RichTable

from dart_llm.files import write_csv

NOTHING = "–"
"""Text of a cell that has no value."""

ACCOUNTING = ("n", "achieved", "dense tokens", "re-masks")
"""Heads of columns that even a narrow terminal shows."""

LONGEST_WORD, GAP = 60, 2
"""On the terminal: words longer than ``LONGEST_WORD`` are broken; ``GAP`` separates columns."""

Record = Mapping[str, Any]
K = TypeVar("K")
T = TypeVar("T")


@dataclass(frozen=True)
class Column:
    """One column of a table.

    ``value``: a key of the rows, or a function that gets a row and returns the value.  ``text``: a
    function that formats the value, or a format such as ".1%".  ``interval``: the key of the
    value's interval, or "".  The two ends of the interval follow the value in brackets, in the same
    format.  ``terminal``: True if the terminal shows the column.  ``needed``: True if a narrow
    terminal must not drop the column.
    """

    head: str
    value: str | Callable[[Any], Any]
    text: str | Callable[[Any], str] = str
    interval: str = ""
    terminal: bool = True
    needed: bool = False

    def raw(self, row: Any) -> Any:
        """The column's value in ``row``; None if the row has no value."""
        return row.get(self.value) if isinstance(self.value, str) else self.value(row)

    def cell(self, row: Any, nothing: str = NOTHING) -> str:
        """The column's value in ``row`` as text; ``nothing`` if the row has no value."""
        value = self.raw(row)
        if value is None:
            return nothing
        ends = row.get(self.interval) if self.interval else None
        return self.write(value) + (f" [{', '.join(map(self.write, ends))}]" if ends else "")

    def write(self, value: Any) -> str:
        """``value`` as text."""
        return format(value, self.text) if isinstance(self.text, str) else self.text(value)


@dataclass(frozen=True)
class PageTable:
    """A table for a page: cells as text.  The first cell of every row is the row's head.

    ``numeric``: True if the other cells are numbers.  ``strong``: index of the row to highlight.
    """

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: bool = True
    strong: int | None = None


@dataclass(frozen=True)
class Table:
    """A table with a caption.  If it has a CSV file, its rows are records; else, any objects.

    ``name``: name of the CSV file; "" means that there is no file.  ``left``: number of columns
    that contain text; the columns after them contain numbers.  ``nothing``: text of a cell that has
    no value.  ``terminal``: True if the terminal shows the table.  ``fields``: the record keys that
    become columns of the CSV file; None means every key of the first record, except keys whose
    value is a mapping in any record.  ``strong``: index of the row to highlight on a page.
    """

    name: str
    caption: str
    columns: tuple[Column, ...]
    rows: Sequence[Any]
    left: int = 1
    nothing: str = NOTHING
    terminal: bool = True
    fields: Sequence[str] | None = None
    strong: int | None = None

    @property
    def head(self) -> tuple[str, ...]:
        """The heads of all columns."""
        return tuple(column.head for column in self.columns)

    def cells(self) -> tuple[tuple[str, ...], ...]:
        """All rows as text."""
        return tuple(tuple(c.cell(row, self.nothing) for c in self.columns) for row in self.rows)

    def html(self) -> PageTable:
        """The table as text, for the macro ``table`` of the page templates."""
        return PageTable(self.caption, self.head, self.cells(), strong=self.strong)

    def lines(self) -> list[str]:
        """Lines of a Markdown table."""
        return table_lines(self.head, self.cells(), self.left)

    def markdown(self) -> str:
        """A Markdown table under its caption."""
        return "\n".join([f"### {self.caption}", "", *self.lines()])

    def write_csv(self, folder: Path) -> None:
        """Write ``<name>.csv`` into ``folder`` if the table has a name; lists become JSON."""
        if not self.name:
            return
        keys = self.fields
        if keys is None:
            nested = {key for row in self.rows for key, v in row.items() if isinstance(v, Mapping)}
            keys = [key for key in (self.rows[0] if self.rows else ()) if key not in nested]
        rows = ([row.get(key) for key in keys] for row in self.rows)
        cells = ([json.dumps(v) if isinstance(v, list) else v for v in row] for row in rows)
        write_csv(folder / f"{self.name}.csv", keys, cells)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RichTable]:
        """Fit the table to the terminal.

        If the columns are too wide, columns are dropped from the right, except those that a narrow
        terminal must show.  The caption names the dropped columns.
        """
        texts = {
            column: [column.head, *(column.cell(row, self.nothing) for row in self.rows)]
            for column in self.columns
            if column.terminal
        }
        words = {c: _longest(w for t in cells for w in t.split()) for c, cells in texts.items()}
        kept = {*self.head[: self.left], *ACCOUNTING, *(c.head for c in texts if c.needed)}
        free, caption = [column for column in texts if column.head not in kept], self.caption
        while free and sum(words[c] + GAP for c in texts) >= options.max_width:
            del texts[free[-1]]
            dropped = ", ".join(c.head for c in self.columns if c.terminal and c not in texts)
            caption = f"{self.caption}; widen the terminal to see: {dropped}"
            free.pop()
        # heads wrap before cells: a column is as wide as its longest cell
        widths = {c: max(words[c], _longest(cells[1:])) for c, cells in texts.items()}
        while sum(width + GAP for width in widths.values()) >= options.max_width:
            slack = [column for column in widths if widths[column] > words[column]]
            if not slack:
                break
            widths[max(slack, key=widths.__getitem__)] -= 1
        drawn = RichTable(
            title=caption, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
        )
        for column, width in widths.items():
            justify: Any = "left" if column in self.columns[: self.left] else "right"
            drawn.add_column(column.head, justify=justify, overflow="fold", width=width)
        for row in zip(*(cells[1:] for cells in texts.values()), strict=True):
            drawn.add_row(*row)
        yield drawn


def _longest(texts: Iterable[str]) -> int:
    lines = (line for text in texts for line in text.split("\n"))
    return max((min(cell_len(line), LONGEST_WORD) for line in lines), default=0)


def value_columns(
    keys: str, heads: Sequence[str], text: str | Callable[[Any], str]
) -> tuple[Column, ...]:
    """One column per key and head, all with the format ``text``; spaces separate the ``keys``."""
    return tuple(Column(head, key, text) for key, head in zip(keys.split(), heads, strict=True))


def grouped(members: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Group members by ``key``, in the order in which the keys first appear."""
    groups: dict[K, list[T]] = {}
    for member in members:
        groups.setdefault(key(member), []).append(member)
    return groups


def keys_of(records: Iterable[Record]) -> list[str]:
    """Every key that occurs in ``records``; those of the record with the most keys come first."""
    longest_first = sorted(records, key=lambda record: -len(record))
    return list(dict.fromkeys(key for record in longest_first for key in record))


def table_lines(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> list[str]:
    """The lines of a Markdown table; the first ``left`` columns contain text, the rest numbers."""
    marks = ["---"] * left + ["---:"] * (len(head) - left)
    return [f"| {' | '.join(map(escaped, row))} |" for row in (head, marks, *rows)]


def escaped(text: str) -> str:
    """Escape the characters of ``text`` that would end a table cell or a line, or open a tag."""
    return text.replace("|", "\\|").replace("<", "\\<").replace("\n", "\\n")


def bytes_text(value: float | None) -> str:
    """A size such as "53.4 MiB"; None gives ``NOTHING``."""
    if value is None:
        return NOTHING
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(value) >= size:
            return f"{value / size:,.1f} {unit}"
    return f"{value:,.0f} B"
