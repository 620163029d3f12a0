"""Column and Table: one definition -> terminal, Markdown, CSV, HTML.

A ``Table`` holds records and says which of their values people see, and how.  The CSV file has the
raw values of the records, all of them, where no fields are chosen.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import gt
from pathlib import Path
from typing import Any, TypeVar

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.table import Table as RichTable

from dart_llm.files import write_csv

NOTHING = "–"
"""A cell that was not measured."""

ACCOUNTING = ("n", "achieved", "dense tokens", "re-masks")
"""Heads of columns without which no number is shown."""

Record = Mapping[str, Any]
K = TypeVar("K")
T = TypeVar("T")


LONGEST_WORD = 60
"""Characters of a word that is never broken, at most."""


@dataclass(frozen=True)
class Column:
    """One column for people.

    ``value``: a key of the records, or what makes the value of one.  ``text``: how a value is
    written, a function or a format such as ".1%".  ``interval``: key of the ends that follow in
    brackets, written likewise.  ``terminal``: whether 80 characters have room for it; ``needed``:
    whether it stays there while others go.
    """

    head: str
    value: str | Callable[[Record], Any]
    text: str | Callable[[Any], str] = str
    interval: str = ""
    terminal: bool = True
    wrap: bool = True
    needed: bool = False

    def raw(self, row: Record) -> Any:
        """The value of a record; None where there is none."""
        return row.get(self.value) if isinstance(self.value, str) else self.value(row)

    def cell(self, row: Record, nothing: str = NOTHING) -> str:
        """The value in words."""
        value = self.raw(row)
        if value is None:
            return nothing
        ends = row.get(self.interval) if self.interval else None
        return self.write(value) + (f" [{', '.join(map(self.write, ends))}]" if ends else "")

    def write(self, value: Any) -> str:
        """``value`` in words."""
        return format(value, self.text) if isinstance(self.text, str) else self.text(value)


@dataclass(frozen=True)
class Table:
    """Records under a caption; ``name`` is that of the CSV file, "" for none.

    ``left``: columns that hold words, the others hold numbers.  ``terminal``: whether it is shown
    there.  ``fields``: keys that the CSV file has; None: every key whose values are no mappings.
    """

    name: str
    caption: str
    columns: tuple[Column, ...]
    rows: Sequence[Record]
    left: int = 1
    nothing: str = NOTHING
    terminal: bool = True
    fields: Sequence[str] | None = None
    strong: int | None = None
    """The row to point out."""
    tight: bool = False
    """Whether the terminal's table goes without lines between columns, for there are many."""

    @property
    def head(self) -> tuple[str, ...]:
        """The heads of all columns."""
        return tuple(column.head for column in self.columns)

    def cells(self) -> tuple[tuple[str, ...], ...]:
        """All rows in words."""
        return tuple(tuple(c.cell(row, self.nothing) for c in self.columns) for row in self.rows)

    def html(self) -> PageTable:
        """What the templates' ``table`` takes."""
        return PageTable(self.caption, self.head, self.cells(), strong=self.strong)

    @property
    def terminal_caption(self) -> str:
        """The caption on the terminal."""
        return self.caption

    def terminal_head(self, column: Column) -> str:
        """The head of a column on the terminal."""
        return column.head

    def terminal_cell(self, column: Column, row: Record) -> str:
        """A cell on the terminal."""
        return column.cell(row, self.nothing)

    def lines(self) -> list[str]:
        """A pipe table."""
        return table_lines(self.head, self.cells(), self.left)

    def markdown(self) -> str:
        """A pipe table under its caption."""
        return "\n".join([f"### {self.caption}", "", *self.lines()])

    @property
    def header(self) -> list[str]:
        """Columns of the CSV file; an interval has one for each end."""
        return [name for key in self._keys() for name in _names(key)]

    def csv(self) -> Iterator[list[Any]]:
        """Raw values under ``header``, a list as JSON."""
        keys = self._keys()
        for row in self.rows:
            yield [value for key in keys for value in _values(key, row.get(key))]

    def write_csv(self, folder: Path) -> None:
        """Write ``<name>.csv`` into ``folder``, if the table has a name."""
        if self.name:
            write_csv(folder / f"{self.name}.csv", self.header, self.csv())

    def _keys(self) -> list[str]:
        if self.fields is not None:
            return list(self.fields)
        nested = {key for row in self.rows for key, v in row.items() if isinstance(v, Mapping)}
        return [key for key in (self.rows[0] if self.rows else ()) if key not in nested]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RichTable]:
        """As wide as the terminal has room for: lines end between words.

        Where there is too little room the last columns go, and the caption names them.
        """
        gone = list[str]()
        shown = [column for column in self.columns if column.terminal]
        words = [column.head for column in self.columns[: self.left]]
        kept = {*words, *ACCOUNTING, *(column.head for column in shown if column.needed)}
        while sum(self._least(column) for column in shown) > self._room(options, shown):
            free = [column for column in shown if column.head not in kept]
            if not free:
                break
            shown.remove(free[-1])
            gone.insert(0, free[-1].head)
        more = f"widen the terminal to see: {', '.join(gone)}" if gone else ""
        widths = self._widths(shown, self._room(options, shown))
        yield self._drawn(shown, widths, "; ".join(filter(None, (self.terminal_caption, more))))

    def _room(self, options: ConsoleOptions, columns: Sequence[Column]) -> int:
        """Characters that are left for the cells of these columns."""
        return options.max_width - (2 if self.tight else 3) * len(columns) - 1

    def _widths(self, columns: Sequence[Column], room: int) -> list[int]:
        """Heads get more lines first, the longest ones, then cells."""
        least = [self._least(column) for column in columns]
        cells = [
            max(few, _longest(self._terminal_cells(c)))
            for c, few in zip(columns, least, strict=True)
        ]
        widths = [
            max(n, _longest([self.terminal_head(c)])) for c, n in zip(columns, cells, strict=True)
        ]
        while sum(widths) > max(room, sum(least)):
            bounds = cells if any(map(gt, widths, cells)) else least
            widest = max(
                (n for n, few in enumerate(bounds) if widths[n] > few), key=widths.__getitem__
            )
            widths[widest] -= 1
        return widths

    def _terminal_cells(self, column: Column) -> list[str]:
        return [self.terminal_cell(column, row) for row in self.rows]

    def _least(self, column: Column) -> int:
        """Characters of a column's longest word; of its longest line where it does not wrap."""
        texts = [self.terminal_head(column), *self._terminal_cells(column)]
        words = (word for text in texts for word in text.split())
        return min(_longest(words if column.wrap else texts), LONGEST_WORD)

    def _drawn(self, columns: Sequence[Column], widths: Sequence[int], caption: str) -> RichTable:
        drawn = RichTable(title=caption, title_justify="left")
        if self.tight:
            drawn.box, drawn.padding = SIMPLE_HEAD, (0, 1, 0, 0)
        for column, width in zip(columns, widths, strict=True):
            justify: Any = "left" if column in self.columns[: self.left] else "right"
            head = self.terminal_head(column)
            drawn.add_column(head, justify=justify, overflow="fold", width=width)
        for row in zip(*map(self._terminal_cells, columns), strict=True):
            drawn.add_row(*row)
        return drawn


def _longest(texts: Iterable[str]) -> int:
    return max((cell_len(line) for text in texts for line in text.split("\n")), default=0)


def _names(key: str) -> tuple[str, ...]:
    return (f"{key}.low", f"{key}.high") if key.endswith("_interval") else (key,)


def _values(key: str, value: Any) -> tuple[Any, ...]:
    if key.endswith("_interval"):
        return tuple(value or (None, None))
    return (json.dumps(value) if isinstance(value, list) else value,)


def value_columns(
    keys: str, heads: Sequence[str], text: str | Callable[[Any], str]
) -> tuple[Column, ...]:
    """Columns of several keys, divided by blanks, whose values are written alike."""
    return tuple(Column(head, key, text) for key, head in zip(keys.split(), heads, strict=True))


def number(digits: int = 3) -> Callable[[float], str]:
    """How a number is written that may be tiny or huge."""

    def write(value: float) -> str:
        small = value != 0 and abs(value) < 0.5 * 10**-digits
        return f"{value:.1e}" if small or abs(value) >= 1e5 else f"{value:,.{digits}f}"

    return write


@dataclass(frozen=True)
class PageTable:
    """Cells in words: a caption, heads, and rows whose first cell is a head."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: bool = True
    strong: int | None = None
    """The row to point out."""


def grouped(members: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Members by ``key``, in the order in which the keys first appear."""
    groups: dict[K, list[T]] = {}
    for member in members:
        groups.setdefault(key(member), []).append(member)
    return groups


def keys_of(records: Iterable[Record]) -> list[str]:
    """Every key, in the order of the record that has the most of them."""
    longest_first = sorted(records, key=lambda record: -len(record))
    return list(dict.fromkeys(key for record in longest_first for key in record))


def table_lines(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> list[str]:
    """Lines of a pipe table; the first ``left`` columns hold words, the others numbers."""
    marks = ["---"] * left + ["---:"] * (len(head) - left)
    return [f"| {' | '.join(map(escaped, row))} |" for row in (head, marks, *rows)]


def escaped(text: str) -> str:
    """Without what would end a cell or a line, or begin an element."""
    return text.replace("|", "\\|").replace("<", "\\<").replace("\n", "\\n")


def bytes_text(value: float | None) -> str:
    """53.4 MiB, 1.2 GiB, 812 KiB."""
    if value is None:
        return NOTHING
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(value) >= size:
            return f"{value / size:,.1f} {unit}"
    return f"{value:,.0f} B"
