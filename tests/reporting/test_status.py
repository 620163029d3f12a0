"""What a job says where there is no terminal, and how long it is silent at most."""

import logging
import time

import pytest

from dart_llm.reporting import console
from dart_llm.reporting.console import Pace, Ui, logged


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
    found = Ui()
    found.live = False
    return found


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
    first, second, *_ = ((one.levelname, one.message) for one in caplog.records)
    assert first == ("INFO", "converting mine")
    assert second == ("WARNING", "converting mine (0.0 s so far)")
