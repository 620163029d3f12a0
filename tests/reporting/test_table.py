"""One definition of a table: terminal, Markdown, CSV and page."""

import pytest
from rich.console import Console

from dart_llm.reporting.table import Column, Table, bytes_text

ROWS = [
    {"rule": "a|b", "rate": 0.5, "ends": [0.25, 0.75], "many": [1, 2], "nested": {"x": 1}},
    {"rule": "<c>\nd", "rate": None, "ends": None, "many": [], "nested": {}},
]
COLUMNS = (
    Column("rule", "rule"),
    Column("rate", "rate", ".0%", "ends"),
    Column("how many", lambda row: len(row["many"]), terminal=False),
)
TABLE = Table("rules", "A | caption", COLUMNS, ROWS)


def test_people_see_words(tmp_path):
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
    # the file has raw values
    TABLE.write_csv(tmp_path)
    text = 'rule,rate,ends,many\na|b,0.5,"[0.25, 0.75]","[1, 2]"\n"<c>\nd",,,[]\n'
    assert (tmp_path / "rules.csv").read_text() == text
    Table("rules", "", COLUMNS, ROWS, fields=("rate", "rule")).write_csv(tmp_path)
    assert (tmp_path / "rules.csv").read_text() == 'rate,rule\n0.5,a|b\n,"<c>\nd"\n'


HEADS = ("task", "method", "value", "95 %", "dense tokens", "re-masks", "bytes per token")
SHARED = ("16.1", "[15.1, 17.2]", "100.0%", "0", "1.000")
WIDE = [
    dict(zip(HEADS, ("perplexity:embedded", method, *SHARED), strict=True))
    for method in ("dense", "dart-token@0.5", "dart@0.5")
]


@pytest.mark.parametrize(
    ("width", "gone"),
    [(110, ""), (76, "bytes per token"), (68, "95 %, bytes per token")],
)
def test_columns_leave_before_a_word_is_broken(width, gone):
    columns = [Column(head, head, needed=head == "value") for head in HEADS]
    console = Console(width=width, no_color=True, markup=False)
    with console.capture() as capture:
        console.print(Table("", "Caption", tuple(columns), WIDE, left=2))
    text = capture.get()
    assert max(map(len, text.splitlines())) <= width
    words = text.split()
    assert (f"widen the terminal to see: {gone}" in " ".join(words)) == bool(gone)
    kept = [head for head in HEADS if head not in gone.split(", ")]  # the accounting stays
    assert {word for row in WIDE for key in kept for word in row[key].split()} <= set(words)
    assert words.count("16.1") == len(WIDE)  # what is needed stays
    sizes = {None: "–", 812: "812 B", 1536: "1.5 KiB", 2**20: "1.0 MiB", -(2**31): "-2.0 GiB"}
    assert [bytes_text(value) for value in sizes] == [*sizes.values()]
