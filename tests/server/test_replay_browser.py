"""The replay file in a real browser: it plays from the disk, and asks nobody."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from browser import SWITCH, Window, need_browser, opened
from dart_llm.server.window import page
from window_cases import QUESTION, READY, records

TOKENS = (
    "[...document.querySelectorAll('.text')].map((t) => t.querySelectorAll('[data-token]').length)"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Window]:
    need_browser()
    folder = tmp_path_factory.mktemp("replay")
    file = folder / "replay.html"
    file.write_text(page(records()), encoding="utf-8")
    with opened(file.as_uri(), folder / "profile") as found:
        yield found


@pytest.fixture
def window(browser: Window) -> Iterator[Window]:
    browser.size(1280, 860)
    browser.driver.get(browser.allowed)
    browser.wait("document.querySelectorAll('.answer').length === 2")
    yield browser
    assert browser.complaints() == []
    assert browser.strangers() == []


def seek(window: Window, position: int) -> None:
    window.js(
        "((p) => { p.value = arguments[0]; p.dispatchEvent(new Event('input')); })"
        "(document.getElementById('position'))",
        position,
    )


def test_it_opens_at_its_end_with_all_there_is_to_see(window: Window) -> None:
    assert window.js(TOKENS) == [24, 24]
    assert window.text("position-value") == "48 tokens"
    window.wait("document.getElementById('view-of').textContent.startsWith('dart')")
    assert window.text("count-remasks") == "1"
    assert window.js("document.querySelectorAll('#drift-plot .similarity-dot').length") == 3
    seek(window, 0)
    assert window.js(TOKENS) == [0, 0]
    assert window.text("position-value") == "0 tokens"
    seek(window, len(records()))
    assert window.text("model") == "tiny"
    assert window.js("document.querySelector('.question').textContent") == QUESTION
    assert window.js("document.querySelectorAll('.question b, .text b').length") == 0
    assert window.js(TOKENS) == [24, 24]
    first = window.js("document.querySelector('.text').textContent")
    assert first.startswith(" <i>0</i> <i>1</i>")
    assert not window.js("document.getElementById('composer').checkVisibility()")


def test_it_plays_and_pauses(window: Window) -> None:
    window.js("(document.getElementById('speed').value = '2')")
    window.driver.find_element("id", "play").click()
    assert window.text("play") == "Pause"
    window.wait("document.querySelectorAll('.text')[1].textContent.includes('23')")
    window.wait("document.getElementById('play').textContent === 'Play'")
    assert window.js(TOKENS) == [24, 24]
    window.wait("document.getElementById('view-of').textContent === 'Dense: 24 tokens'")
    window.js("document.querySelector('.answer header button').click()")
    window.wait(
        "document.getElementById('view-of').textContent === 'dart, 50 % sparsity: 24 tokens'"
    )
    assert window.text("count-sparsity") == "41.3 %"  # 19 of 23 decoded tokens at 50 %
    assert window.text("count-dense") == "17 %"
    assert window.text("count-remasks") == "1"
    assert window.text("count-speed") == "50.0"


def test_it_jumps_to_any_place(window: Window) -> None:
    found = records()
    mask = [i for i, record in enumerate(found) if record["kind"] == "mask"][1]
    seek(window, mask - 1)  # before the second mask: every neuron runs
    window.wait("document.getElementById('neurons-note').textContent.startsWith('Every neuron')")
    assert window.js(TOKENS) == [READY + 1, 0]
    assert window.text("count-remasks") == "0"
    assert window.js("document.querySelectorAll('.dense-band').length") == 1
    seek(window, mask + 2)
    window.wait("document.getElementById('neurons-note').textContent.startsWith('Mask 2')")
    assert window.text("count-remasks") == "1"
    assert window.js("document.querySelectorAll('.remask-head').length") == 1
    assert window.js("document.querySelector('.mark').nextSibling.dataset.token") == str(READY + 1)
    window.driver.find_element("id", "changes").click()
    window.wait("document.getElementById('scale-low').textContent === 'went dark'")


def test_colours_are_told_by_more_than_colour(window: Window) -> None:
    seek(window, len(records()) // 2)
    style = "getComputedStyle(document.querySelector('.text {}')).{}"
    assert window.js(style.format(".prefill", "borderBottomStyle")) == "dotted"
    assert window.js(style.format(".observe", "borderBottomStyle")) == "solid"
    assert window.js(style.format(".pruned", "borderBottomStyle")) == "none"
    window.driver.find_element("css selector", "input[value=confidence]").click()
    grounds = {
        window.js(style.format(f".doubt-{step}", "backgroundColor"))
        for step in (2, 3, 4)
        if window.js(f"document.querySelector('.text .doubt-{step}') !== null")
    }
    assert len(grounds) >= 2
    assert window.js(style.format(".doubt-4", "borderBottomStyle")) == "solid"
    assert window.text("legend") == "sureunder 80 %50 %25 %10 %"


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_sticks_out(window: Window, width: int) -> None:
    window.size(width, 844, dark=width == 390)
    assert window.js("document.documentElement.scrollWidth") == width


@pytest.mark.parametrize("switch", ["", "required"])
def test_without_a_browser_a_test_is_skipped_or_fails(
    monkeypatch: pytest.MonkeyPatch, switch: str
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv(SWITCH, switch)
    expected = pytest.fail.Exception if switch else pytest.skip.Exception
    with pytest.raises(expected, match="there is no chromium"):
        need_browser()
