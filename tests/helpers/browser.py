"""Chromium without a window, driven by selenium: what it shows, asks for and complains about."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

SWITCH = "DART_BROWSER"
"""``required``: a test that finds no browser fails; unset: it is skipped, with the reason."""

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def missing() -> str:
    """What a browser test lacks here; "" where it can run."""
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "selenium is not installed: pip install '.[dev]'"
    if browser() is None:
        return "there is no chromium: apt-get install chromium chromium-driver"
    if shutil.which("chromedriver") is None:
        return "there is no chromedriver: apt-get install chromium-driver"
    return ""


def browser() -> str | None:
    return next((found for name in BROWSERS if (found := shutil.which(name))), None)


def need_browser() -> None:
    """Skip the test without a browser, or fail it where one is required."""
    lack = missing()
    if lack and os.environ.get(SWITCH) == "required":
        pytest.fail(f"{SWITCH}=required, and {lack}")
    if lack:
        pytest.skip(lack)


class Window:
    """One page in one browser."""

    def __init__(self, driver: Any, allowed: str) -> None:
        self.driver = driver
        self.allowed = allowed

    def js(self, script: str, *arguments: Any) -> Any:
        """The value of an expression."""
        return self.driver.execute_script(f"return {script}", *arguments)

    def wait(self, script: str, seconds: float = 60.0) -> Any:
        """The value of an expression once it is true; time in which we stood still is free."""
        waited, last = 0.0, time.monotonic()
        while not (found := self.js(script)):
            assert waited < seconds, f"it never came true: {script}\n{self.js(BODY)}"
            time.sleep(0.02)
            now = time.monotonic()
            waited += min(0.5, now - last)
            last = now
        return found

    def text(self, name: str) -> str:
        return str(self.js("document.getElementById(arguments[0]).textContent", name))

    def size(self, width: int, height: int, dark: bool = False, reduced: bool = False) -> None:
        """A screen of this size in CSS pixels, with these wishes of its reader."""
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        wishes = {
            "prefers-color-scheme": "dark" if dark else "light",
            "prefers-reduced-motion": "reduce" if reduced else "no-preference",
        }
        features = [{"name": name, "value": value} for name, value in wishes.items()]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def keys(self, *keys: str) -> None:
        """Press keys where the focus is."""
        from selenium.webdriver import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()

    def focused(self) -> str:
        """id, class or tag of what has the focus."""
        return str(self.js("((e) => e.id || e.className || e.tagName)(document.activeElement)"))

    def complaints(self) -> list[str]:
        """Errors and warnings of the console so far, refusals of the policy among them."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def strangers(self) -> list[str]:
        """Addresses asked for that are not the server's own."""
        asked = []
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                asked.append(message["params"]["request"]["url"])
        assert asked, "the browser asked for nothing: the log is not kept"
        own = (self.allowed, "data:", "blob:", "chrome:", "chrome-untrusted:")
        return [url for url in asked if not url.startswith(own)]


BODY = "document.body ? document.body.innerText.slice(0, 2000) : ''"


@contextmanager
def opened(url: str, folder: Path, width: int = 1280, height: int = 860) -> Iterator[Window]:
    """``url`` in a fresh browser; ``folder`` keeps its profile."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = browser() or ""
    for flag in (*FLAGS, f"--user-data-dir={folder}", f"--window-size={width},{height}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    try:
        window = Window(driver, url)
        window.size(width, height)
        driver.set_page_load_timeout(60)
        driver.get(url)
        yield window
    finally:
        driver.quit()
