"""One definition of a table: terminal, Markdown, CSV and page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dart_llm.reporting.table import Column, Table, bytes_text, number, table_lines, value_columns

ROWS: list[dict[str, Any]] = [
    {"rule": "a|b", "rate": 0.5, "rate_interval": [0.25, 0.75], "many": [1, 2], "nested": {"x": 1}},
    {"rule": "<c>\nd", "rate": None, "rate_interval": None, "many": [], "nested": {}},
]
COLUMNS = (
    Column("rule", "rule", wrap=False),
    Column("rate", "rate", ".0%", "rate_interval"),
    Column("how many", lambda row: len(row["many"]), terminal=False),
)
TABLE = Table("rules", "A | caption", COLUMNS, ROWS)


def test_people_see_words() -> None:
    assert TABLE.head == ("rule", "rate", "how many")
    assert TABLE.cells() == (("a|b", "50% [25%, 75%]", "2"), ("<c>\nd", "–", "0"))
    assert Table("", "", COLUMNS, ROWS[1:], nothing="-").cells()[0][1] == "-"
    page = TABLE.html()
    assert (page.caption, page.head, page.rows) == (TABLE.caption, TABLE.head, TABLE.cells())


def test_markdown_escapes_what_would_end_a_cell() -> None:
    assert TABLE.markdown().splitlines() == [
        "### A | caption",
        "",
        "| rule | rate | how many |",
        "| --- | ---: | ---: |",
        "| a\\|b | 50% [25%, 75%] | 2 |",
        "| \\<c>\\nd | – | 0 |",
    ]
    assert table_lines(("a", "b"), [("1", "2")], left=2)[1] == "| --- | --- |"


def test_csv_holds_raw_values_and_both_ends_of_an_interval(tmp_path: Path) -> None:
    assert TABLE.header == ["rule", "rate", "rate_interval.low", "rate_interval.high", "many"]
    assert list(TABLE.csv()) == [
        ["a|b", 0.5, 0.25, 0.75, "[1, 2]"],
        ["<c>\nd", None, None, None, "[]"],
    ]
    Table("rules", "", COLUMNS, ROWS, fields=("rate", "rule")).write_csv(tmp_path)
    assert (tmp_path / "rules.csv").read_text() == 'rate,rule\n0.5,a|b\n,"<c>\nd"\n'
    Table("", "", COLUMNS, ROWS).write_csv(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["rules.csv"]
    assert Table("empty", "", COLUMNS, []).header == []


def test_the_terminal_has_no_room_for_some_columns() -> None:
    console = Console(width=60, markup=False)
    with console.capture() as capture:
        console.print(TABLE.rich())
    text = capture.get()
    assert "A | caption" in text and "50% [25%, 75%]" in text and "how many" not in text


@pytest.mark.parametrize(
    ("digits", "value", "text"),
    [
        (3, 0.5, "0.500"),
        (3, 0.0004, "4.0e-04"),
        (3, 0.0, "0.000"),
        (0, 1234.0, "1,234"),
        (2, 1e5, "1.0e+05"),
        (1, -2.25, "-2.2"),
    ],
)
def test_numbers_that_may_be_tiny_or_huge(digits: int, value: float, text: str) -> None:
    assert number(digits)(value) == text


def test_columns_that_are_written_alike() -> None:
    low, high = value_columns("low high", ("from", "to"), ".1f")
    assert (low.head, low.cell({"low": 1}), high.cell({})) == ("from", "1.0", "–")


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (812, "812 B"), (1536, "1.5 KiB"), (2**20, "1.0 MiB"), (-(2**31), "-2.0 GiB")],
)
def test_bytes(value: float | None, text: str) -> None:
    assert bytes_text(value) == text
