"""The window in a real browser, in front of an engine without a model: what it asks and shows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from browser import Window, need_browser, opened
from dart_llm.server import window as serve_runs
from dart_llm.server.window import page, read_records
from serve_cases import FakeEngine, Running, running, until

ENDED = "document.getElementById('stop').hidden"
TEXTS = "[...document.querySelectorAll('.answer .text')].map((t) => t.textContent)"
FEET = "[...document.querySelectorAll('.answer footer')].map((t) => t.textContent)"
RETRY = "document.querySelector('.answer footer button:last-child')"

Start = Callable[..., tuple[Running, Window]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    need_browser()
    with ExitStack() as stack:

        def made(engine: FakeEngine | None = None, **settings: Any) -> tuple[Running, Window]:
            server = stack.enter_context(running(engine, **settings))
            return server, stack.enter_context(opened(f"{server.url}/", tmp_path / "profile"))

        yield made


def ready(window: Window) -> None:
    window.wait("document.querySelectorAll('#prompts button').length === 3")


def send(window: Window, text: str, answers: int) -> None:
    """Ask, and wait until so many answers are there."""
    message = window.driver.find_element("id", "message")
    message.send_keys(text)
    window.js("document.getElementById('composer').requestSubmit()")
    window.wait(f"document.querySelectorAll('.answer').length === {answers} && {ENDED}")


def test_settings_and_conversation_reach_the_engine(start: Start) -> None:
    server, window = start()
    ready(window)
    window.js("document.getElementById('max-tokens').value = 3")
    send(window, "<b>one</b>", 1)
    window.js("document.getElementById('masking-step').value = 5")
    window.js("document.getElementById('drift').value = 'paper'")
    window.js("document.getElementById('method').value = 'static'")
    window.js("document.getElementById('sparsity').value = 40")
    window.driver.find_element("id", "compare").click()
    send(window, "two", 3)
    assert window.js(TEXTS) == ["w0 w1 w2 "] * 3
    first, second, dense = server.engine.asked
    assert (first.config.method, first.config.target) == ("griffin", 0.1)
    assert first.config.drift.rule == "never"
    assert (second.config.method, second.config.target) == ("static", 0.4)
    assert (second.config.masking_step, second.config.drift.rule) == (5, "paper")
    assert second.sampling.max_tokens == 3
    assert second.sampling.temperature == 0
    assert dense.config is None
    asked = "<user><b>one</b><assistant>w0 w1 w2 <user>two<assistant>"
    assert bytes(second.ids).decode() == bytes(dense.ids).decode() == asked
    assert first.conversation == second.conversation != dense.conversation
    assert window.js("document.querySelectorAll('.question b').length") == 0
    assert "the same as the other for 3 tokens" in window.js(FEET)[2]
    window.driver.find_element("id", "anew").click()
    send(window, "three", 2)
    assert server.engine.asked[3].conversation != first.conversation
    assert bytes(server.engine.asked[3].ids).decode() == "<user>three<assistant>"
    assert window.complaints() == []
    assert window.strangers() == []


def test_the_records_can_be_saved_and_replayed(start: Start, tmp_path: Path) -> None:
    _, window = start()
    ready(window)
    allowed = {"behavior": "allow", "downloadPath": str(tmp_path)}
    window.driver.execute_cdp_cmd("Browser.setDownloadBehavior", allowed)
    window.js("document.getElementById('max-tokens').value = 3")
    send(window, "one", 1)
    window.js("document.querySelector('.answer footer button').click()")
    file = tmp_path / "answer-1.jsonl"
    until(file.exists)
    found = read_records(str(file))
    assert [record["kind"] for record in found] == ["start", "token", "token", "token", "done"]
    assert found[-1]["texts"] == ["w0 w1 w2 "]
    assert "fake-model" in page(found)
    assert window.complaints() == []


def test_a_fault_is_said_and_the_next_answer_comes(start: Start) -> None:
    engine = FakeEngine(fault=RuntimeError("a secret path"), fault_at=2)
    _, window = start(engine)
    ready(window)
    window.js("document.getElementById('max-tokens').value = 4")
    send(window, "one", 1)
    assert window.js(TEXTS) == ["w0 w1 "]
    said = window.js(FEET)[0]
    assert said and "secret" not in said
    assert window.js("document.querySelectorAll('.answer .failure').length") == 1
    engine.fault = None
    send(window, "two", 2)
    assert window.js(TEXTS)[1] == "w0 w1 w2 w3 "


def test_a_refusal_names_the_field_as_the_page_does(start: Start) -> None:
    server, window = start(max_tokens=8)
    ready(window)
    assert window.js("document.getElementById('max-tokens').max") == "8"
    assert window.js("document.getElementById('max-tokens').value") == "8"  # not the page's 192
    window.js("document.getElementById('max-tokens').value = -5")
    send(window, "one", 1)
    assert "“Longest answer”: input should be greater than or equal to -1" in window.js(FEET)[0]
    assert window.js(FEET)[0].startswith(window.text("alert"))
    assert server.engine.asked == []


def test_a_server_with_a_key(start: Start) -> None:
    from selenium.webdriver.common.keys import Keys

    _, window = start(api_key="a-good-long-key")
    window.wait("document.getElementById('ask-key').open")
    assert window.js("document.querySelectorAll('#prompts button').length") == 0
    window.driver.find_element("id", "key").send_keys("a-good-long-key", Keys.ENTER)
    ready(window)
    window.js("document.getElementById('max-tokens').value = 2")
    send(window, "one", 1)
    assert window.js(TEXTS) == ["w0 w1 "]
    assert "a-good" not in window.js("JSON.stringify(localStorage)")
    complaints = window.complaints()
    assert complaints and all("status of 401" in one for one in complaints)


def test_a_refused_key_is_said(start: Start) -> None:
    from selenium.webdriver.common.keys import Keys

    _, window = start(api_key="a-good-long-key")
    window.wait("document.getElementById('ask-key').open")
    window.driver.find_element("id", "key").send_keys("another-long-key", Keys.ENTER)
    window.wait("document.getElementById('key-said').textContent")
    assert window.text("key-said") == "That key is not accepted."
    assert window.js("document.getElementById('ask-key').open") and window.focused() == "key"
    assert window.js("sessionStorage.length") == 0
    window.driver.find_element("css selector", "#ask-key button[value=cancel]").click()
    window.wait("document.getElementById('model').textContent.startsWith('no connection: ')")
    window.wait("document.getElementById('reconnect').checkVisibility()")
    window.driver.find_element("id", "reconnect").click()
    window.wait("document.getElementById('ask-key').open")
    window.driver.find_element("id", "key").send_keys(Keys.CONTROL, "a")
    window.driver.find_element("id", "key").send_keys("a-good-long-key", Keys.ENTER)
    ready(window)
    assert not window.js("document.getElementById('ask-key').open")
    assert not window.js("document.getElementById('reconnect').checkVisibility()")


def test_the_servers_own_sparsity_is_sent_as_it_is(start: Start) -> None:
    from selenium.webdriver.common.keys import Keys

    server, window = start(sparsity=0.333)
    ready(window)
    assert window.text("sparsity-value") == "33.3 %"
    window.js("document.getElementById('max-tokens').value = 2")
    send(window, "one", 1)
    assert server.engine.asked[0].config.target == 0.333
    window.js("document.getElementById('sparsity').focus()")
    window.keys(Keys.ARROW_RIGHT)
    assert window.text("sparsity-value") == "34 %"
    send(window, "two", 2)
    assert server.engine.asked[1].config.target == 0.34


def test_a_sparsity_beyond_the_sliders_end(start: Start) -> None:
    _, window = start(sparsity=0.95)
    ready(window)
    assert window.text("sparsity-value") == "95 %"
    assert window.js("document.getElementById('sparsity').value") == "95"


def test_a_full_queue_is_said_once_and_retry_asks_again(start: Start) -> None:
    """The worker takes none: as with --max-waiting when all places are taken."""
    server, window = start()
    ready(window)
    window.js("document.getElementById('max-tokens').value = 2")
    busy = (
        "(() => { const real = fetch; fetch = async (...given) => { fetch = real;"
        " return new Response(JSON.stringify({error: {message:"
        " 'too many requests wait already: try again in 1 s'}}),"
        " {status: 429, headers: {'Retry-After': '1'}}); }; })()"
    )
    window.js(busy)
    send(window, "one", 1)
    assert window.text("alert") == "too many requests wait already: try again in 1 s"
    assert window.js("document.getElementById('message').value") == "one"
    assert window.js(f"{RETRY}.checkVisibility()")
    window.js(f"{RETRY}.click()")
    window.wait(f"{TEXTS}.join() === 'w0 w1 ' && {ENDED}")
    assert window.js("document.getElementById('message').value") == ""
    assert len(server.engine.asked) == 1
    assert not window.js(f"{RETRY}.checkVisibility()")


def test_a_reload_keeps_the_conversation(start: Start) -> None:
    server, window = start()
    ready(window)
    window.js("document.getElementById('max-tokens').value = 3")
    window.driver.find_element("id", "compare").click()
    send(window, "one", 2)
    feet = window.js(FEET)
    assert "the same as the other for 3 tokens" in feet[1]
    window.driver.refresh()
    ready(window)
    assert window.js(TEXTS) == ["w0 w1 w2 "] * 2
    assert window.js(FEET) == feet
    assert not window.js("document.getElementById('welcome').checkVisibility()")
    window.wait("document.getElementById('view-of').textContent.includes('3 tokens')")
    window.js("document.getElementById('max-tokens').value = 3")
    send(window, "two", 3)
    first, _, second = server.engine.asked
    assert second.conversation == first.conversation
    assert bytes(second.ids).decode() == "<user>one<assistant>w0 w1 w2 <user>two<assistant>"
    window.driver.find_element("id", "anew").click()
    window.driver.refresh()
    ready(window)
    assert window.js(TEXTS) == []
    assert window.js("document.getElementById('welcome').checkVisibility()")


def test_a_reload_in_the_middle_of_an_answer(start: Start) -> None:
    server, window = start(FakeEngine(pause=0.05))
    ready(window)
    window.driver.find_element("id", "message").send_keys("one")
    window.js("document.getElementById('composer').requestSubmit()")
    window.wait(f"{TEXTS}[0].includes('w2')")
    window.driver.refresh()
    ready(window)
    assert "the page was left before the answer ended" in window.js(FEET)[0]
    assert window.js("document.querySelector('.question').textContent") == "one"
    window.js("document.getElementById('max-tokens').value = 2")
    window.js(f"{RETRY}.click()")
    window.wait(f"{TEXTS}.join() === 'w0 w1 ' && {ENDED}")
    assert bytes(server.engine.asked[-1].ids).decode() == "<user>one<assistant>"


def test_a_broken_answer_gives_its_question_back_and_is_no_part_of_the_next(start: Start) -> None:
    engine = FakeEngine(fault=RuntimeError("a secret path"), fault_at=2)
    server, window = start(engine)
    ready(window)
    window.js("document.getElementById('max-tokens').value = 4")
    send(window, "one", 1)
    assert window.js("document.getElementById('message').value") == "one"
    engine.fault = None
    window.js("document.getElementById('message').value = ''")
    send(window, "two", 2)
    assert bytes(server.engine.asked[1].ids).decode() == "<user>two<assistant>"


def a_run(root: Path, name: str, **files: str) -> None:
    folder = root / name
    folder.mkdir(parents=True)
    config = {"kind": "run", "status": "complete", "prune": {"method": "griffin", "sparsity": 0.4}}
    (folder / "config.json").write_text(json.dumps(config))
    for file, text in files.items():
        (folder / file.replace("_", ".")).write_text(text)


def test_past_runs_open_at_the_newest_and_have_addresses(start: Start, tmp_path: Path) -> None:
    report = "<!doctype html><title>T</title><p id=p>no</p><script>p.textContent = 'yes'</script>"
    for second in (5, 6):
        a_run(tmp_path / "results", f"tides/20260102-03040{second}", report_html=report)
    _, window = start(results_dir=str(tmp_path / "results"))
    ready(window)
    window.js("document.getElementById('show-runs').click()")
    window.wait("document.querySelector('#run h2')")
    assert window.text("runs-note") == "2 of 2 results folders, newest first."
    current = "document.querySelector('#runs-list [aria-current]').dataset.name"
    assert window.js(current) == "tides/20260102-030406"
    shown = window.js("[...document.querySelectorAll('#runs-list button')].map((b) => b.innerText)")
    assert len(set(shown)) == 2 and "tides/20260102-030405" in shown[1]
    window.js("document.querySelectorAll('#runs-list button')[1].click()")
    window.wait("location.hash === '#runs/tides/20260102-030405'")
    window.wait("document.querySelector('#run h2')?.textContent.includes('20260102-030405')")
    window.driver.refresh()
    window.wait("document.querySelector('#run h2')?.textContent.includes('20260102-030405')")
    window.driver.back()
    window.wait("document.querySelector('#run h2')?.textContent.includes('20260102-030406')")
    window.driver.back()
    window.wait("document.getElementById('page-chat').checkVisibility()")
    window.driver.forward()
    window.wait("document.querySelector('#run a')")
    window.js("(document.getElementById('runs-filter').value = 'zzz')")
    window.js("document.getElementById('runs-filter').dispatchEvent(new Event('input'))")
    assert window.text("runs-note").startswith("None of these results folders has “zzz”")
    link = window.js("document.querySelector('#run a').href")
    assert link.endswith("/api/runs/tides/20260102-030406/report.html")
    assert window.complaints() == []
    window.driver.get(link)
    assert window.js("document.getElementById('p').textContent") == "yes"
    assert window.js("self.origin") == "null"


def test_a_report_behind_a_key_is_saved(start: Start, tmp_path: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    a_run(tmp_path / "results", "tides/20260102-030405", report_html="<p>the report</p>")
    _, window = start(results_dir=str(tmp_path / "results"), api_key="a-good-long-key")
    window.wait("document.getElementById('ask-key').open")
    window.driver.find_element("id", "key").send_keys("a-good-long-key", Keys.ENTER)
    ready(window)
    allowed = {"behavior": "allow", "downloadPath": str(tmp_path)}
    window.driver.execute_cdp_cmd("Browser.setDownloadBehavior", allowed)
    window.js("document.getElementById('show-runs').click()")
    window.wait("document.querySelector('#run a')?.textContent === 'Save its report'")
    window.js("document.querySelector('#run a').click()")
    file = tmp_path / "tides-20260102-030405.html"
    until(file.exists)
    assert file.read_text() == "<p>the report</p>"


def test_more_runs_than_are_listed(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve_runs, "MOST_RUNS", 2)
    for second in range(3):
        a_run(tmp_path / "results", f"tides/20260102-03040{second}")
    _, window = start(results_dir=str(tmp_path / "results"))
    ready(window)
    window.js("document.getElementById('show-runs').click()")
    window.wait("document.querySelector('#run h2')")
    said = "2 of the 2 newest results folders, newest first; the older ones of 3 are left out."
    assert window.text("runs-note") == said


def test_past_runs_of_other_kinds_show_what_they_measured(start: Start, tmp_path: Path) -> None:
    study = tmp_path / "results/tides/20260102-030405"
    study.mkdir(parents=True)
    row = {"method": "dart", "label": "dart", "sparsity": 0.5, "cells": 2, "remasks": 7}
    row |= {"achieved_sparsity": 0.473, "dense_token_share": 0.053}
    row["loss"] = {"after": {"mean": 4.5678}}
    (study / "config.json").write_text(json.dumps({"kind": "drift", "status": "complete"}))
    (study / "summary.json").write_text(json.dumps({"mode": "forced", "rows": [row]}))
    (study / "summary.md").write_text(f"# Methods <b>side by side</b>\n{'wide ' * 80}")
    (study / "drift.csv").write_text(
        "key,sequence,row,step,layer,window,similarity,threshold,counter,trigger,state\n"
        "a,0,0,10,1,1,0.8,0.7,0,0,armed\n"
    )
    _, window = start(results_dir=str(tmp_path / "results"))
    ready(window)
    window.size(390, 844)
    window.js("document.getElementById('show-runs').click()")
    window.wait("document.querySelectorAll('#runs-list button').length === 1")
    window.js("document.querySelector('#runs-list button').click()")
    window.wait("document.querySelector('#run table')")
    cells = window.js("[...document.querySelectorAll('#run tbody td')].map((c) => c.textContent)")
    assert cells == ["drift:forced", "dart", "loss_after", "4.568", "47.3 %", "5.3 %", "7"]
    assert window.js("document.querySelectorAll('#run .similarity-dot').length") == 0
    window.js("document.querySelectorAll('#run details').forEach((d) => { d.open = true; })")
    assert "<b>side by side</b>" in window.js("document.querySelector('#run pre').textContent")
    assert window.js("document.documentElement.scrollWidth") == 390
    assert window.complaints() == []
