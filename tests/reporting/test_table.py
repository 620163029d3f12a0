"""One definition of a table: terminal, Markdown, CSV and page."""

import pytest
from rich.console import Console

from dart_llm.reporting.table import Column, Table, bytes_text, number

ROWS = [
    {"rule": "a|b", "rate": 0.5, "rate_interval": [0.25, 0.75], "many": [1, 2], "nested": {"x": 1}},
    {"rule": "<c>\nd", "rate": None, "rate_interval": None, "many": [], "nested": {}},
]
COLUMNS = (
    Column("rule", "rule", wrap=False),
    Column("rate", "rate", ".0%", "rate_interval"),
    Column("how many", lambda row: len(row["many"]), terminal=False),
)
TABLE = Table("rules", "A | caption", COLUMNS, ROWS)


def test_people_see_words():
    assert TABLE.head == ("rule", "rate", "how many")
    assert TABLE.cells() == (("a|b", "50% [25%, 75%]", "2"), ("<c>\nd", "–", "0"))
    assert Table("", "", COLUMNS, ROWS[1:], nothing="-").cells()[0][1] == "-"
    page = TABLE.html()
    assert (page.caption, page.head, page.rows) == (TABLE.caption, TABLE.head, TABLE.cells())
    assert TABLE.markdown().splitlines() == [
        "### A | caption",
        "",
        "| rule | rate | how many |",
        "| --- | ---: | ---: |",
        "| a\\|b | 50% [25%, 75%] | 2 |",
        "| \\<c>\\nd | – | 0 |",
    ]
    console = Console(width=60, markup=False)
    with console.capture() as capture:
        console.print(TABLE)
    text = capture.get()  # which has no room for some columns
    assert "A | caption" in text and "50% [25%, 75%]" in text and "how many" not in text


HEADS = ("task", "method", "value", "95 %", "dense tokens", "re-masks", "bytes per token")
SHARED = ("16.1", "[15.1, 17.2]", "100.0%", "0", "1.000")
WIDE = [
    dict(zip(HEADS, ("perplexity:embedded", method, *SHARED), strict=True))
    for method in ("dense", "dart-token@0.5", "dart@0.5")
]


def at(width, rows, left=2):
    columns = [Column(head, head, needed=head == "value") for head in HEADS]
    console = Console(width=width, no_color=True, markup=False)
    with console.capture() as capture:
        console.print(Table("", "Caption", tuple(columns), rows, left=left))
    return capture.get()


@pytest.mark.parametrize(
    ("width", "gone"),
    [(110, ""), (82, "bytes per token"), (76, "95 %, bytes per token")],
)
def test_columns_leave_before_a_word_is_broken(width, gone):
    text = at(width, WIDE)
    assert max(map(len, text.splitlines())) <= width
    words = text.replace("│", " ").split()
    assert (f"widen the terminal to see: {gone}" in " ".join(words)) == bool(gone)
    kept = [head for head in HEADS if head not in gone.split(", ")]  # the accounting stays
    assert {word for row in WIDE for key in kept for word in row[key].split()} <= set(words)
    assert words.count("16.1") == len(WIDE)  # what is needed stays


def test_csv_holds_raw_values_and_both_ends_of_an_interval(tmp_path):
    TABLE.write_csv(tmp_path)
    assert (tmp_path / "rules.csv").read_text() == (
        'rule,rate,rate_interval.low,rate_interval.high,many\na|b,0.5,0.25,0.75,"[1, 2]"\n'
        '"<c>\nd",,,,[]\n'
    )
    Table("rules", "", COLUMNS, ROWS, fields=("rate", "rule")).write_csv(tmp_path)
    assert (tmp_path / "rules.csv").read_text() == 'rate,rule\n0.5,a|b\n,"<c>\nd"\n'


def test_how_numbers_are_written():
    for digits, value, text in (
        (3, 0.5, "0.500"),
        (3, 0.0004, "4.0e-04"),
        (3, 0.0, "0.000"),
        (0, 1234.0, "1,234"),
        (2, 1e5, "1.0e+05"),
        (1, -2.25, "-2.2"),
    ):
        assert number(digits)(value) == text
    sizes = {None: "–", 812: "812 B", 1536: "1.5 KiB", 2**20: "1.0 MiB", -(2**31): "-2.0 GiB"}
    assert [bytes_text(value) for value in sizes] == [*sizes.values()]
