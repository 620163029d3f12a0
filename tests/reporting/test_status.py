"""What a job says where there is no terminal, and how long it is silent at most."""

import logging
import threading
import time

import pytest

from dart_llm.native import memory
from dart_llm.reporting import console, heartbeat
from dart_llm.reporting.console import Ui
from dart_llm.reporting.heartbeat import Pace, logged


class Clock:
    now = 100.0

    def __call__(self):
        return self.now

    def pass_time(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    """Time that passes when a test says so; no line comes by itself."""
    found = Clock()
    monkeypatch.setattr(heartbeat, "clock", found)
    monkeypatch.setattr(console, "clock", found)
    monkeypatch.setattr(heartbeat, "TICK_S", 3600.0)
    monkeypatch.setattr(memory, "peak", lambda: 1_100_000_000)
    return found


@pytest.fixture
def ui():
    found = Ui()
    found.live = False
    return found


def lines(capsys):
    return capsys.readouterr().err.splitlines()


def test_a_long_silence_is_broken(ui, clock, capsys):
    with ui.working("preparing"), ui.status("loading mine") as news:
        for seconds in (9, 1, 9, 1):
            clock.pass_time(seconds)
            ui.heartbeat.beat()
        clock.pass_time(9)
        news("converting mine")  # which counts as output
        clock.pass_time(9)
        ui.heartbeat.beat()
        clock.pass_time(1)
        ui.heartbeat.beat()
    clock.pass_time(100)
    ui.heartbeat.beat()  # nothing is being done
    assert lines(capsys) == [
        "loading mine",
        "loading mine (10 s so far)",
        "loading mine (20 s so far)",
        "converting mine",
        "converting mine (39 s so far)",
    ]
    assert ui.log == ["loading mine", "converting mine"]  # what is worth keeping


def test_counted_work_says_where_it_is_and_how_long_it_takes(ui, clock, capsys):
    with ui.working("dense on mine", 2, 3), ui.progress("dense on mine", 12) as advance:
        clock.pass_time(3)
        ui.heartbeat.beat()  # before the first item is done
        clock.pass_time(7)
        advance(1)
        clock.pass_time(9)
        advance(1)
        clock.pass_time(9)
        advance(1)
        clock.pass_time(10)
        ui.heartbeat.beat()
    assert lines(capsys) == [
        "cell 2 of 3, dense on mine: 0 of 12 (3.0 s so far)",
        "cell 2 of 3, dense on mine: 1 of 12, about 2 min left; about 4 min for all 3 cells; "
        "peak memory so far 1.1 GB",
        "cell 2 of 3, dense on mine: 3 of 12, about 84 s left",
        "cell 2 of 3, dense on mine: 3 of 12, about 74 s left (38 s so far)",
    ]


def test_a_streamed_text_is_not_broken(ui, clock, capsys):
    with ui.working("writing"):
        ui.token("The sky ")
        clock.pass_time(60)
        ui.heartbeat.beat()
        ui.token("is blue")
        ui.end_text("The sky is blue")
        clock.pass_time(10)
        ui.heartbeat.beat()
    out, err = capsys.readouterr()
    assert (out, err) == ("The sky is blue\n", "writing (70 s so far)\n")


@pytest.mark.parametrize("what", ["quiet", "live"])
def test_nothing_is_said_for_programs_or_beside_a_bar(what, clock, capsys):
    ui = Ui(quiet=what == "quiet")
    ui.live = what == "live"
    before = threading.active_count()
    with ui.working("preparing"), ui.progress("slices", 4) as advance:
        assert what == "live" or threading.active_count() == before
        for _ in range(2):
            clock.pass_time(2)
            advance(1)
            clock.pass_time(30)
            ui.heartbeat.beat()
    told = capsys.readouterr().err
    assert "so far)" not in told and (what == "live" or told == "")


def test_time_left_follows_the_latest_items(clock):
    pace = Pace(100)
    assert pace.left() is None
    pace.advance(5)  # of an earlier run: no time passed
    assert pace.left() is None
    for _ in range(25):
        clock.pass_time(1)
        pace.advance(1)
    assert pace.left() == 70
    for _ in range(20):  # other work has begun on this machine
        clock.pass_time(5)
        pace.advance(1)
    assert pace.left() == 250
    last = Pace(2)
    clock.pass_time(50)
    last.advance(1)
    found = []
    for _ in range(4):
        clock.pass_time(100)
        found.append(last.left())
    assert found == [50, 100, 150, 200]  # never "50 s" for minutes


@pytest.fixture
def hurry(monkeypatch):
    """Lines come by themselves, hundreds of times as often."""
    monkeypatch.setattr(heartbeat, "TICK_S", 0.005)
    monkeypatch.setattr(heartbeat, "SILENT_S", 0.02)


def wait_for(found):
    end = time.monotonic() + 5
    while not found() and time.monotonic() < end:
        time.sleep(0.01)


def test_a_library_call_warns_of_its_length(hurry, caplog):
    log = logging.getLogger("dart_llm")
    with caplog.at_level(logging.INFO, "dart_llm"), logged(log, "loading mine") as say:
        say("converting mine")
        wait_for(lambda: len(caplog.records) > 1)
    first, second, *_ = ((one.levelname, one.message) for one in caplog.records)
    assert first == ("INFO", "converting mine")
    assert second == ("WARNING", "converting mine (0.0 s so far)")


def test_the_first_word(monkeypatch, capsys):
    with Ui.started():
        pass
    assert capsys.readouterr().err == ""  # PyTorch is there already
    monkeypatch.delitem(console.sys.modules, "torch")
    with Ui.started(quiet=True):
        pass
    assert capsys.readouterr().err == ""
    with Ui.started() as ui:
        assert capsys.readouterr().err == "starting (loading PyTorch)\n"
    assert ui.log == []
