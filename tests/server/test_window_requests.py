"""The window in a real browser, before an engine without a model, and playing a recording."""

import json
from contextlib import ExitStack
from pathlib import Path

import axe_core_python
import pytest

from browser import need_browser, opened
from dart_llm.pruning.config import DEFAULT_SPARSITY
from dart_llm.server import window as server_window
from dart_llm.server.window import GREETING, STATIC, page, read_records
from serve_cases import KEYS, FakeEngine, running, until
from window_cases import QUESTION, past_run, records

ENDED = "document.getElementById('stop').hidden"
TEXTS = "[...document.querySelectorAll('.answer .text')].map((t) => t.textContent)"
HEADLINES = "[...document.querySelectorAll('.headline')].map((t) => t.textContent)"
FEET = "[...document.querySelectorAll('.answer footer')].map((t) => t.textContent)"
RETRY = "document.querySelector('.answer footer button:last-child')"
PLAYER = "document.getElementById('player')"
TIP = "document.getElementById('tip').checkVisibility()"
READY_PAGE = "document.querySelectorAll('#prompts button').length === 3"


@pytest.fixture
def start(tmp_path):
    need_browser()
    with ExitStack() as stack:

        def made(engine=None, **settings):
            server = stack.enter_context(running(engine, **settings))
            window = stack.enter_context(opened(f"{server.url}/", tmp_path / "profile"))
            allowed = {"behavior": "allow", "downloadPath": str(tmp_path)}
            window.driver.execute_cdp_cmd("Browser.setDownloadBehavior", allowed)
            window.wait("document.getElementById('ask-key').open" if server.service.settings.keys
                        else READY_PAGE)  # fmt: skip
            window.js("document.getElementById('compare').click()")  # one answer, unless asked
            return server, window

        yield made


def send(window, text, answers, tokens=None):
    if tokens is not None:
        window.put("max-tokens", tokens)
    window.driver.find_element("id", "message").send_keys(text)
    window.js("document.getElementById('composer').requestSubmit()")
    window.wait(f"document.querySelectorAll('.answer').length === {answers} && {ENDED}")


def prompt(server, number):
    return bytes(server.engine.asked[number].ids).decode()


def test_settings_and_conversation_reach_the_engine(start, tmp_path):
    server, window = start()
    send(window, "<b>one</b>", 1, tokens=3)
    for name, value in (("masking-step", 5), ("drift", "paper"), ("method", "static")):
        window.put(name, value)
    window.put("sparsity", 40)
    window.click("compare")
    send(window, "two", 3)
    assert window.js(TEXTS) == ["w0 w1 w2 "] * 3
    first, second, dense = server.engine.asked
    assert (first.config.method, first.config.target) == ("griffin", DEFAULT_SPARSITY)
    assert first.config.drift.rule == "never"
    assert (second.config.method, second.config.target) == ("static", 0.4)
    assert (second.config.masking_step, second.config.drift.rule) == (5, "paper")
    assert (second.sampling.max_tokens, second.sampling.temperature) == (3, 0)
    assert dense.config is None
    turns = "<user><b>one</b><assistant>w0 w1 w2 <user>two<assistant>"
    assert prompt(server, 1) == prompt(server, 2) == turns
    assert first.conversation == second.conversation != dense.conversation
    assert window.js("document.querySelectorAll('.question b').length") == 0
    feet = window.js(FEET)
    assert window.js(HEADLINES) == [
        "30.0 % of the neurons skipped",
        "40.0 % of the neurons skipped, identical to the dense answer",
    ]
    window.js("document.querySelector('.answer footer button').click()")  # its records are saved
    file = tmp_path / "answer-1.jsonl"
    until(lambda: file.exists() and file.stat().st_size)
    saved = read_records(str(file))
    assert [record["kind"] for record in saved] == ["start", "token", "token", "token", "done"]
    assert saved[-1]["texts"] == ["w0 w1 w2 "] and "fake-model" in page(saved)
    window.driver.refresh()  # keeps the conversation
    window.wait(READY_PAGE)
    window.click("compare")
    assert (window.js(TEXTS), window.js(FEET)) == (["w0 w1 w2 "] * 3, feet)
    send(window, "three", 4, tokens=1)
    assert server.engine.asked[3].conversation == first.conversation
    assert prompt(server, 3) == f"{turns}w0 w1 w2 <user>three<assistant>"
    window.click("anew")
    send(window, "four", 1)
    assert server.engine.asked[4].conversation != first.conversation
    assert prompt(server, 4) == "<user>four<assistant>"
    assert window.complaints() == [] and window.strangers() == []


def test_faults_refusals_and_edits(start):
    """A fault gives the question back; a refusal is shown once; an edit removes the later turns."""
    from selenium.webdriver.common.keys import Keys

    engine = FakeEngine(fault=RuntimeError("a secret path"), fault_at=2)
    server, window = start(engine, max_tokens=8)
    message = "document.getElementById('message').value"
    send(window, "one", 1, tokens=4)
    shown = window.js(FEET)[0]
    assert window.js(TEXTS) == ["w0 w1 "] and shown and "secret" not in shown
    assert window.js(message) == "one"
    engine.fault = None
    window.click("anew")
    window.put("message", "")
    send(window, "one", 1, tokens=-5)
    shown = window.js(FEET)[0]  # the field as the page names it
    assert "“Longest answer”: input should be greater than or equal to -1" in shown
    assert shown.startswith(window.text("alert"))
    window.click("anew")
    window.put("message", "")
    busy = (  # as with --max-waiting when all places are taken
        "(() => { const real = fetch; fetch = async (...given) => { fetch = real;"
        " return new Response(JSON.stringify({error: {message: 'try again in 1 s'}}),"
        " {status: 429, headers: {'Retry-After': '1'}}); }; })()"
    )
    window.js(busy)
    send(window, "one", 1, tokens=2)
    assert window.text("alert") == "try again in 1 s"
    window.js(f"{RETRY}.click()")
    window.wait(f"{TEXTS}.join() === 'w0 w1 ' && {ENDED}")
    assert window.js(message) == "" and len(server.engine.asked) == 2
    send(window, "two", 2)
    edit = "document.querySelectorAll('.asked .edit')[0].click()"
    window.js(edit)
    assert window.js(message) == "one" and "removes all later turns" in window.text("hint")
    window.keys(Keys.ESCAPE)  # left alone
    assert window.js(message) == "" and window.js(TEXTS) == ["w0 w1 "] * 2
    window.js(edit)
    send(window, " or three", 1)
    assert prompt(server, 3) == "<user>one or three<assistant>"
    assert server.engine.asked[3].conversation != server.engine.asked[1].conversation


def test_a_recording_is_played_until_the_visitor_asks(start):
    """What greets is what the program recorded: its masks, its windows, its dense answer."""
    from selenium.webdriver.common.keys import Keys

    _, window = start()
    assert "A recording, until you ask something: " in window.text("greeting-of")
    count = "document.querySelectorAll('.text [data-token]').length"
    window.wait(f"{count} > 3")
    window.click("play")
    assert window.text("play") == "Play"
    recorded = json.loads((STATIC / GREETING).read_text("utf-8"))
    seek(window, len(recorded))
    done = [record for record in recorded if record["kind"] == "done"]
    shown = "[...arguments[0].querySelectorAll('[data-token]')].map((s) => s.textContent).join('')"
    texts = window.driver.find_elements("css selector", ".answer .text")
    assert [window.js(shown, text) for text in texts] == [record["texts"][0] for record in done]
    (headline,) = window.js(HEADLINES)
    assert f"{done[0]['report']['achieved_sparsity']:.1%}".replace("%", " %") in headline
    assert violations(window) == []
    terms = window.js("[...document.querySelectorAll('.term')].map((t) => t.dataset.term)")
    assert set(terms) == {"dense", "drift", "mask", "neuron", "remask", "sparsity"}
    window.js("document.querySelector('.term').focus()")
    assert len(window.text("tip")) > 40 and window.js(TIP)
    window.keys(Keys.ESCAPE)
    assert not window.js(TIP)
    send(window, "one", 1, tokens=1)
    assert window.js(TEXTS) == ["w0 "] and not window.js(f"{PLAYER}.checkVisibility()")
    window.size(1280, 860, reduced=True)
    window.click("anew")
    window.driver.refresh()
    window.wait(f"{PLAYER}.checkVisibility() && {count} > 0")
    assert window.text("play") == "Play"  # nothing moves by itself
    assert window.strangers() == []


def test_a_key_is_asked_for_and_past_runs_have_addresses(start, tmp_path, monkeypatch):
    from selenium.webdriver.common.keys import Keys

    report = "<!doctype html><title>T</title><p id=p>no</p><script>p.textContent = 'yes'</script>"
    for second in (4, 5, 6):
        past_run(tmp_path / f"results/tides/20260102-03040{second}", report_html=report)
    monkeypatch.setattr(server_window, "MOST_RUNS", 2)
    _, window = start(results_dir=str(tmp_path / "results"), api_key=KEYS[0])
    key = window.driver.find_element("id", "key")
    key.send_keys(KEYS[1], Keys.ENTER)
    window.wait("document.getElementById('key-said').textContent")
    assert window.text("key-said") == "The server does not accept this key."
    key.send_keys(Keys.CONTROL, "a")
    key.send_keys(KEYS[0], Keys.ENTER)
    window.wait(READY_PAGE)
    assert KEYS[0] not in window.js("JSON.stringify(localStorage)")
    assert all("status of 401" in complaint for complaint in window.complaints())
    heading = "document.querySelector('#run h2')?.textContent.includes('20260102-03040{}')"
    window.click("show-runs")
    window.wait(heading.format(6))
    assert window.text("runs-note").startswith("2 of the 2 newest results folders")
    window.js("document.querySelectorAll('#runs-list button')[1].click()")
    window.wait("location.hash === '#runs/tides/20260102-030405'")
    window.wait(heading.format(5))
    window.driver.back()
    window.wait(heading.format(6))
    window.wait("document.querySelector('#run a')?.textContent === 'Save the report'")
    window.js("document.querySelector('#run a').click()")
    file = tmp_path / "tides-20260102-030406.html"
    until(lambda: file.exists() and file.stat().st_size)
    assert file.read_text() == report and window.complaints() == []


AXE = (Path(axe_core_python.__file__).parent / "axe.min.js").read_text(encoding="utf-8")
FOUND = (
    "const done = arguments[0]; axe.run({resultTypes: ['violations']}).then((all) =>"
    " done(all.violations.map((one) => [one.impact, one.id, one.nodes.map((node) => node.html)])))"
)


def violations(window):
    """What axe calls a violation, of any severity, with everything unfolded."""
    assert window.complaints() == []
    window.js("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    window.js("document.getElementById('further')?.showPopover()")
    window.driver.execute_script(AXE)
    complaints = list(window.driver.execute_async_script(FOUND))
    window.complaints()  # of axe's own
    window.js("document.getElementById('further').hidePopover()")
    return complaints


TOKENS = (
    "[...document.querySelectorAll('.text')].map((t) => t.querySelectorAll('[data-token]').length)"
)


@pytest.fixture
def replay(tmp_path):
    """A recording from the disk, which sends no requests."""
    need_browser()
    file = tmp_path / "replay.html"
    file.write_text(page(records()), encoding="utf-8")
    with opened(file.as_uri(), tmp_path / "profile") as window:
        window.wait("document.querySelectorAll('.answer').length === 2")
        yield window
        assert window.complaints() == [] and window.strangers() == []


def seek(window, position):
    """In one go: while it plays, the slider moves by itself."""
    place = "document.getElementById('position')"
    window.js(f"({place}.value = {position}, {place}.dispatchEvent(new Event('input')))")


def test_a_recording_plays_and_pauses(replay):
    from selenium.webdriver.common.keys import Keys

    replay.wait(f"{TOKENS}[0] > 4")  # it plays at once
    seek(replay, 0)
    assert (replay.js(TOKENS), replay.text("position-value")) == ([0, 0], "0 tokens")
    replay.put("speed", "2")
    replay.click("play")
    assert replay.text("play") == "Pause"
    replay.wait("document.querySelectorAll('.text')[1]?.textContent.includes('23')")
    replay.wait("document.getElementById('play').textContent === 'Play'")
    assert replay.js(TOKENS) == [24, 24]
    assert replay.js("document.querySelector('.question').textContent") == QUESTION
    assert replay.js("document.querySelectorAll('.question b, .text b').length") == 0
    assert not replay.js("document.getElementById('composer').checkVisibility()")
    pruned = "'dart, 50 % sparsity: 24 tokens'"
    replay.wait(f"document.getElementById('view-of').textContent === {pruned}")
    counts = {name: replay.text(f"count-{name}") for name in ("sparsity", "dense", "remasks")}
    # 19 of 23 decoded tokens at 50 %
    assert counts == {"sparsity": "41.3 %", "dense": "17 %", "remasks": "1"}
    said = "41.3 % of the neurons skipped, identical to the dense answer"
    assert replay.js(HEADLINES) == [said]
    end = len(records())
    seek(replay, end // 2)  # colours are told by more than colour
    style = "getComputedStyle(document.querySelector('.text {}')).{}"
    for phase, border in (("prefill", "dotted"), ("observe", "solid"), ("pruned", "none")):
        assert replay.js(style.format(f".{phase}", "borderBottomStyle")) == border
    for width in (390, 1920):  # nothing sticks out, nor does axe find anything
        replay.size(width, 844, dark=width == 390)
        assert replay.js("document.documentElement.scrollWidth") == width
        assert violations(replay) == []
    seek(replay, end)
    replay.js("document.querySelector('.text').focus()")
    replay.keys(Keys.HOME, *[Keys.ARROW_RIGHT] * 5)  # token 5, which ends the first window
    dots = "[...document.querySelectorAll('#drift-plot [data-check]')]"
    replay.wait(f"{dots}.map((d) => d.classList.contains('lit')).join() === 'true,false,false'")
    replay.wait("document.getElementById('neurons-note').textContent.startsWith('Mask 1')")
    assert replay.text("scrub-value") == "token 5, mask 1 of 2"
