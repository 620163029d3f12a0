"""The window in a real browser, in front of the real server with the real model."""

import pytest

from browser import need_browser, opened
from serve_cases import serving

pytestmark = pytest.mark.smollm2

ENDED = "document.getElementById('stop').hidden"
ANSWERS = "document.querySelectorAll('.answer')"
VIEW_OF = "document.getElementById('view-of').textContent"


@pytest.fixture(scope="module")
def browser(tmp_path_factory, native):
    need_browser()
    with (
        serving("--method", "dart", "--sparsity", 0.1) as server,  # as make window does
        opened(f"{server.url}/", tmp_path_factory.mktemp("profile")) as found,
    ):
        yield found


@pytest.fixture
def window(browser):
    browser.size(1280, 860)
    browser.js("localStorage.clear()")
    browser.js("sessionStorage.clear()")
    browser.driver.get("about:blank")  # the same address with another hash would load nothing
    browser.driver.get(browser.allowed)
    browser.wait("document.querySelectorAll('#prompts button').length === 3")
    yield browser
    assert browser.complaints() == []
    assert browser.strangers() == []


def slide(window, times):
    from selenium.webdriver.common.keys import Keys

    window.js("document.getElementById('sparsity').focus()")
    window.keys(*[Keys.ARROW_RIGHT] * times)


def share(window, name):
    return float(window.text(name).removesuffix(" %"))


def test_the_tours_prompt_re_masks_after_the_change_of_topic(window):
    slide(window, 20)
    assert window.text("sparsity-value") == "30 %"
    window.click("show-tour")
    window.click("tour-next")  # sets what it was measured with
    assert window.text("sparsity-value") == "10 %"
    window.wait("document.querySelectorAll('.text .pruned').length > 3")
    window.wait("document.querySelectorAll('.text .observe').length > 3")
    assert "being written" in window.text("view-of") or window.js(ENDED)
    window.wait(ENDED)
    window.wait(f"{VIEW_OF} === 'dart, 10 % sparsity: 192 tokens'")
    for marks in ("#drift-plot .remask-head", ".text .mark"):
        assert window.js(f"document.querySelectorAll('{marks}').length") == 1
    assert window.text("count-remasks") == "1"
    assert share(window, "count-dense") == 17  # 32 of 191 decoded tokens
    assert share(window, "count-sparsity") == pytest.approx(10 * (1 - 0.17), abs=0.2)
    assert "unlike the beginning" in window.text("remask-list")
    assert window.js("document.querySelectorAll('#layers tbody tr').length") == 30
    pixels = "document.getElementById('neurons').getContext('2d').getImageData(40, 10, 300, 200)"
    assert len(set(window.js(f"[...{pixels}.data]"))) > 20
