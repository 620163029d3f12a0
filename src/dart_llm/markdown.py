"""Tables of Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table_lines(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> list[str]:
    """Lines of a table; the first ``left`` columns hold words, the others numbers."""
    marks = ["---"] * left + ["---:"] * (len(head) - left)
    return [f"| {' | '.join(map(escaped, row))} |" for row in (head, marks, *rows)]


def escaped(text: str) -> str:
    """Without what would end a cell or begin an element."""
    return text.replace("|", "\\|").replace("<", "\\<")
