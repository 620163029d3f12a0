"""One definition of a table; what a job says where there is no terminal."""

import logging
import time

import pytest
from rich.console import Console

from dart_llm.reporting import console
from dart_llm.reporting.console import Pace, Ui, logged
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


@pytest.mark.parametrize(
    ("width", "gone"), [(110, ""), (76, "bytes per token"), (68, "95 %, bytes per token")]
)
def test_columns_leave_before_a_word_is_broken(width, gone):
    columns = [Column(head, head, needed=head == "value") for head in HEADS]
    values = ("16.1", "[15.1, 17.2]", "100.0%", "0", "1.000")
    methods = ("dense", "dart-token@0.5", "dart@0.5")
    rows = [dict(zip(HEADS, ("perplexity:embedded", m, *values), strict=True)) for m in methods]
    console = Console(width=width, no_color=True, markup=False)
    with console.capture() as capture:
        console.print(Table("", "Caption", tuple(columns), rows, left=2))
    text = capture.get()
    assert max(map(len, text.splitlines())) <= width
    words = text.split()
    assert (f"widen the terminal to see: {gone}" in " ".join(words)) == bool(gone)
    kept = [head for head in HEADS if head not in gone.split(", ")]  # the accounting stays
    assert {word for row in rows for key in kept for word in row[key].split()} <= set(words)
    assert words.count("16.1") == len(rows)  # needed columns stay
    sizes = {None: "–", 812: "812 B", 1536: "1.5 KiB", 2**20: "1.0 MiB", -(2**31): "-2.0 GiB"}
    assert [bytes_text(value) for value in sizes] == [*sizes.values()]


@pytest.fixture
def pass_time(monkeypatch):
    """Time that passes when a test says so, and a look at the clock then."""
    now = [100.0]
    monkeypatch.setattr(console, "clock", lambda: now[0])
    monkeypatch.setattr(console, "TICK_S", 3600.0)

    def wait(seconds, ui=None):
        now[0] += seconds
        if ui:
            ui.heartbeat.beat()

    return wait


@pytest.fixture
def ui():
    ui = Ui()
    ui.live = False
    return ui


def test_a_long_silence_is_broken(ui, pass_time, capsys):
    with ui.working("preparing"), ui.status("loading mine") as news:
        for seconds in (9, 1, 9, 1, 9):
            pass_time(seconds, ui)
        news("converting mine")  # which counts as output
        pass_time(9, ui)
        pass_time(1, ui)
    pass_time(100, ui)  # nothing is being done
    assert capsys.readouterr().err.splitlines() == [
        "loading mine",
        "loading mine (10 s so far)",
        "loading mine (20 s so far)",
        "converting mine",
        "converting mine (39 s so far)",
    ]
    assert ui.log == ["loading mine", "converting mine"]  # what is worth keeping


def test_counted_work_says_where_it_is_and_how_long_it_takes(ui, pass_time, capsys):
    with ui.working("dense on mine", 2, 3), ui.progress("dense on mine", 12) as advance:
        for _ in range(3):
            pass_time(10, ui)
            advance(1)
    assert capsys.readouterr().err.splitlines() == [
        "cell 2 of 3, dense on mine: 0 of 12 (10 s so far)",
        "cell 2 of 3, dense on mine: 1 of 12, about 2 min left (20 s so far)",
        "cell 2 of 3, dense on mine: 2 of 12, about 2 min left (30 s so far)",
    ]


def test_a_streamed_text_is_not_broken(ui, pass_time, capsys):
    with ui.working("writing"):
        ui.token("The sky ")
        pass_time(60, ui)
        ui.token("is blue")
        ui.end_text("The sky is blue")
        pass_time(10, ui)
    out, err = capsys.readouterr()
    assert (out, err) == ("The sky is blue\n", "writing (70 s so far)\n")


@pytest.mark.parametrize("what", ["quiet", "live"])
def test_nothing_is_said_for_programs_or_beside_a_bar(what, pass_time, capsys):
    ui = Ui(quiet=what == "quiet")
    ui.live = what == "live"
    with ui.working("preparing"), ui.progress("[a] slices", 4) as advance:
        pass_time(30, ui)
        advance(1)
        pass_time(30, ui)
    err = capsys.readouterr().err
    assert "so far)" not in err and (what == "live" or err == "")


def test_time_left_follows_the_latest_items(pass_time):
    pace = Pace(100)
    pace.advance(5)  # of an earlier run: no time passed
    assert pace.left() is None
    for items, seconds, left in ((25, 1, 70), (20, 5, 250)):  # other work has begun meanwhile
        for _ in range(items):
            pass_time(seconds)
            pace.advance(1)
        assert pace.left() == left
    last = Pace(2)
    pass_time(50)
    last.advance(1)
    for left in (50, 100, 150, 200):  # never "50 s" for minutes
        pass_time(100)
        assert last.left() == left


def test_a_library_call_warns_of_its_length(monkeypatch, caplog):
    monkeypatch.setattr(console, "TICK_S", 0.005)
    monkeypatch.setattr(console, "SILENT_S", 0.02)
    log = logging.getLogger("dart_llm")
    with caplog.at_level(logging.INFO, "dart_llm"), logged(log, "loading mine") as say:
        say("converting mine")
        end = time.monotonic() + 5
        while len(caplog.records) < 2 and time.monotonic() < end:
            time.sleep(0.01)
    first, second, *_ = ((record.levelname, record.message) for record in caplog.records)
    assert first == ("INFO", "converting mine")
    assert second == ("WARNING", "converting mine (0.0 s so far)")
