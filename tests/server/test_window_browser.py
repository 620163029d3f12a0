"""The window in a real browser, in front of the real server with the real model."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from browser import Window, need_browser, opened
from serve_cases import until

pytestmark = pytest.mark.smollm2

ENDED = "document.getElementById('stop').hidden"
ANSWERS = "document.querySelectorAll('.answer')"
VIEW_OF = "document.getElementById('view-of').textContent"
MARKS = "document.querySelectorAll('#drift-plot .remask-head').length"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One results folder as ``dart-llm run`` leaves it, with a text of one word."""
    root = tmp_path_factory.mktemp("results")
    folder = root / "first" / "20260102-030405"
    folder.mkdir(parents=True)
    config = {"kind": "run", "status": "complete", "started": "2026-01-02T03:04:05+00:00"}
    prune = {"method": "griffin", "sparsity": 0.4}
    text = {"variant": "pruned", "method": "griffin", "sparsity": 0.4, "prompt": "Why?"}
    account = {"achieved_sparsity": 0.375, "dense_token_share": 0.1, "remasks": 2}
    words = {"tokens": ["Just", " because"], "phases": ["prefill", "pruned"], "token_ids": [1, 2]}
    remask = {"sequence": 0, "row": None, "step": 0, "cause": "first", "kept": [3, 5]}
    layers = [{"layer": i, "width": 8, "kept": k, "kept_share": k / 8} for i, k in ((0, 3), (1, 5))]
    drift = "sequence,row,step,layer,window,similarity,threshold,counter,trigger,state\n"
    (folder / "config.json").write_text(json.dumps({**config, "prune": prune}))
    (folder / "generation.jsonl").write_text(json.dumps({**text, **words, "accounting": account}))
    (folder / "masks.json").write_text(json.dumps({"remasks": [remask], "layers": layers}))
    (folder / "drift.csv").write_text(drift + "0,0,10,1,1,0.8,0.7,0,0,armed\n")
    return root


@pytest.fixture(scope="module")
def address(results: Path) -> Iterator[str]:
    """The link that ``dart-llm serve`` prints."""
    need_browser()
    command = [sys.executable, "-m", "dart_llm", "serve", "--port", "0"]
    process = subprocess.Popen(
        [*command, "--results-dir", str(results)], stderr=subprocess.PIPE, text=True
    )
    said: list[str] = []
    assert process.stderr
    threading.Thread(target=said.extend, args=(process.stderr,), daemon=True).start()
    try:
        until(lambda: "Ctrl-C ends" in "".join(said) or process.poll() is not None, 300)
        found = re.search(r"at (http://127\.0\.0\.1:\d+/)", "".join(said))
        assert found, said
        yield found[1]
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


@pytest.fixture(scope="module")
def browser(address: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Window]:
    with opened(address, tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture
def window(browser: Window) -> Iterator[Window]:
    """The page as a reader sees it for the first time."""
    browser.size(1280, 860)
    browser.js("localStorage.clear()")
    browser.js("sessionStorage.clear()")
    browser.driver.get("about:blank")  # the same address with another hash would load nothing
    browser.driver.get(browser.allowed)
    browser.wait("document.querySelectorAll('#prompts button').length === 3")
    yield browser
    assert browser.complaints() == []
    assert browser.strangers() == []


def shots(window: Window, name: str) -> None:
    """Pictures for people, where DART_SCREENSHOTS names a folder."""
    if folder := os.environ.get("DART_SCREENSHOTS"):
        window.driver.save_screenshot(str(Path(folder) / f"{name}.png"))


def slide(window: Window, key: str, times: int) -> None:
    window.js("document.getElementById('sparsity').focus()")
    for _ in range(times):
        window.keys(key)


def test_the_tours_prompt_re_masks_after_the_change_of_topic(window: Window) -> None:
    from selenium.webdriver.common.keys import Keys

    assert window.text("count-sparsity") == "\u2013"
    assert window.text("sparsity-value") == "10 %"
    slide(window, Keys.ARROW_RIGHT, 20)
    assert window.text("sparsity-value") == "30 %"
    window.driver.find_element("id", "tour-next").click()  # sets what it was measured with
    assert window.text("sparsity-value") == "10 %"
    window.wait("document.querySelectorAll('.text .pruned').length > 3")
    before = window.text("view-of")
    window.wait("document.querySelectorAll('.text .observe').length > 3")
    assert "live" in window.text("view-of") or window.js(ENDED)
    window.wait(ENDED)
    window.wait(f"{VIEW_OF} === 'dart, 10 % sparsity: 192 tokens'")
    assert before != window.text("view-of")
    assert window.js(MARKS) == 1
    assert window.js("document.querySelectorAll('.text .mark').length") == 1
    assert window.text("count-remasks") == "1"
    removed = float(window.text("count-sparsity").removesuffix(" %"))
    dense = float(window.text("count-dense").removesuffix(" %"))
    assert removed == pytest.approx(10 * (1 - dense / 100), abs=0.2)
    assert dense == 17  # 32 of 191 decoded tokens
    words = window.js("document.querySelector('.text').textContent")
    assert "photosynthesis" in words[: words.index("recipe")]
    assert words.index("recipe") < words.index("re-mask")  # the mark stands behind the change
    assert float(window.text("count-speed")) > 0
    assert "unlike the beginning" in window.text("remask-list")
    assert window.js("document.querySelectorAll('#layers tbody tr').length") == 30
    label = window.js("document.getElementById('neurons').getAttribute('aria-label')")
    assert re.search(r"mask 2, in force from token 1[2-7]\d", label)
    pixels = "document.getElementById('neurons').getContext('2d').getImageData(40, 10, 300, 200)"
    assert len(set(window.js(f"[...{pixels}.data]"))) > 20
    shots(window, "chat-1280-light")


def test_the_slider_and_the_dense_answer_beside(window: Window) -> None:
    from selenium.webdriver.common.keys import Keys

    slide(window, Keys.ARROW_RIGHT, 40)
    assert window.text("sparsity-value") == "50 %"
    window.driver.find_element("id", "compare").click()
    window.js("document.getElementById('max-tokens').value = 24")
    message = window.driver.find_element("id", "message")
    message.send_keys("Why is the sky blue?")
    message.send_keys(Keys.ENTER)
    window.wait(f"{ANSWERS}.length === 2")
    assert window.js(f"{ANSWERS}[1].querySelector('header span').textContent") == "queued"
    window.wait(ENDED)
    window.wait(f"{VIEW_OF} === 'dart, 50 % sparsity: 24 tokens'")
    pruned, dense = window.js(f"[...{ANSWERS}].map((a) => a.querySelector('.text').textContent)")
    assert pruned and dense and pruned != dense
    removed = float(window.text("count-sparsity").removesuffix(" %"))
    assert removed == pytest.approx(50, abs=0.5)
    assert window.text("of-sparsity") == "of 50 % asked"
    notes = window.js(f"[...{ANSWERS}].map((a) => a.querySelector('footer').textContent)")
    assert "50.0 % removed" in notes[0] and "the same as the other for" in notes[1]
    window.js(f"{ANSWERS}[1].querySelector('header button').click()")
    window.wait(f"{VIEW_OF}.startsWith('Dense')")
    assert window.text("count-sparsity") == "0.0 %"
    window.size(1280, 860, dark=True)
    shots(window, "side-by-side-1280-dark")


def test_a_second_turn_goes_on_and_stop_frees_the_model(window: Window) -> None:
    from selenium.webdriver.common.keys import Keys

    message = window.driver.find_element("id", "message")
    window.js("document.getElementById('max-tokens').value = 12")
    message.send_keys("Name a colour.", Keys.ENTER)
    window.wait(f"{ANSWERS}.length === 1 && {ENDED}")
    window.js("document.getElementById('max-tokens').value = 2000")
    message.send_keys("Tell a very long story about it.", Keys.ENTER)
    window.wait("document.querySelectorAll('.answer')[1]?.querySelectorAll('.pruned').length > 5")
    window.driver.find_element("id", "stop").click()
    window.wait(ENDED, 10)
    assert "stopped" in window.js(f"{ANSWERS}[1].querySelector('footer').textContent")
    assert window.focused() == "message"
    window.js("document.getElementById('max-tokens').value = 4")
    message.send_keys("Again, please.", Keys.ENTER)  # the model is free at once
    window.wait(f"{ANSWERS}.length === 3 && {ENDED}", 30)
    assert re.match(
        r"[1-4] tokens?, ", window.js(f"{ANSWERS}[2].querySelector('footer').innerText")
    )
    window.driver.find_element("id", "anew").click()
    assert window.js(f"{ANSWERS}.length") == 0
    window.wait(f"{VIEW_OF} === 'Nothing has been answered yet'")


def test_the_keyboard_alone(window: Window) -> None:
    from selenium.webdriver.common.keys import Keys

    window.js("document.getElementById('max-tokens').value = 6")
    window.js("document.getElementById('show-tour').focus()")
    window.keys(Keys.ENTER)
    assert window.focused() == "tour-title"
    for step in ("Step 1 of 3", "Step 2 of 3", "Step 3 of 3"):
        assert window.text("tour-count") == step
        assert window.js("document.querySelectorAll('.pointed').length") == 1
        window.js("document.getElementById('tour-next').focus()")
        window.keys(Keys.ENTER)
    assert window.js("document.getElementById('tour').hidden")
    assert window.focused() == "show-tour"
    window.wait(f"{ANSWERS}.length === 1 && {ENDED}")  # the tour asked its prompt
    window.js("document.getElementById('message').focus()")
    window.keys("Name three colours.", Keys.ENTER)
    window.wait(f"{ANSWERS}.length === 2 && {ENDED}")
    window.js("document.querySelector('.text').focus()")
    window.keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert window.js("document.querySelector('.text .current').dataset.token") == "1"
    assert re.search(r"token 1; pruned, probability [\d.]+ %; [\d.]+ ms", window.text("detail"))
    for shown in (".text", ".text .current"):
        outline = f"getComputedStyle(document.querySelector('{shown}')).outlineStyle"
        assert window.js(outline) == "solid"
    window.js("document.getElementById('neurons').focus()")
    window.keys(Keys.ARROW_DOWN, Keys.ARROW_RIGHT)
    assert re.fullmatch(
        r"layer 1 \(\d+ % kept\), neurons 16 to 31: \d+ % of them kept", window.text("neurons-cell")
    )


def test_past_runs(window: Window) -> None:
    window.driver.find_element("id", "show-runs").click()
    window.wait("document.querySelectorAll('#runs-list button').length === 1")
    assert "griffin at 40 %" in window.text("runs-list")
    window.wait("document.querySelector('#run .text')")  # the newest is opened
    shown = window.js("document.getElementById('run').innerText")
    for part in ("Just because", "37.5 %", "10.0 %", "Why?", "4 files in this folder"):
        assert part in shown
    assert window.js("document.querySelectorAll('#run .similarity-dot').length") == 1
    assert window.js("document.querySelector('#run canvas').getBoundingClientRect().height") > 5
    label = window.js("document.querySelector('#run canvas').getAttribute('aria-label')")
    assert "layer 0 keeps least (38\u00a0%), layer 1 most (63\u00a0%)" in label
    shots(window, "runs-1280-light")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_narrow_screen(window: Window, dark: bool) -> None:
    window.size(390, 844, dark=dark, reduced=True)
    window.js("document.getElementById('tour-close').click()")
    window.wait("!document.getElementById('more').open")
    window.js("document.getElementById('max-tokens').value = 8")
    window.js("document.querySelector('#prompts button').click()")
    window.wait(f"{ANSWERS}.length === 1 && {ENDED}")
    window.wait(f"{VIEW_OF} === 'dart, 10 % sparsity: 8 tokens'")
    assert window.js("document.documentElement.scrollWidth") == 390
    assert re.match(r"\d+\.\d % removed . 0 re-masks . \d+/s", window.text("strip-text"))
    assert window.js("getComputedStyle(document.getElementById('strip')).display") == "block"
    small = window.js(
        "[...document.querySelectorAll('button, input, select, textarea')]"
        ".filter((e) => e.checkVisibility() && e.getBoundingClientRect().height < 16)"
        ".map((e) => e.outerHTML)"
    )
    assert small == []
    shots(window, f"chat-390-{'dark' if dark else 'light'}")
    window.driver.find_element("css selector", "#strip a").click()
    window.wait("document.getElementById('view').getBoundingClientRect().top < 200")
    shots(window, f"view-390-{'dark' if dark else 'light'}")
    window.js("document.getElementById('show-runs').click()")
    window.wait("document.querySelector('#runs-list button')")
    assert window.js("document.documentElement.scrollWidth") == 390
