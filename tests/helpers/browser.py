"""Chromium without a window, driven by selenium: what it shows, asks for and complains about."""

import json
import os
import shutil
import time
from contextlib import contextmanager

import pytest

SWITCH = "DART_BROWSER"
"""``required``: a test that finds no browser fails; unset: it is skipped, with the reason."""

FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--hide-scrollbars",
)
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def browser():
    return next((found for name in BROWSERS if (found := shutil.which(name))), None)


def need_browser():
    """Skip the test without a browser, or fail it where one is required."""
    if browser() and shutil.which("chromedriver"):
        return
    lack = "there is no chromium with its driver: apt-get install chromium chromium-driver"
    if os.environ.get(SWITCH) == "required":
        pytest.fail(f"{SWITCH}=required, and {lack}")
    pytest.skip(lack)


class Window:
    """One page in one browser."""

    def __init__(self, driver, allowed):
        self.driver = driver
        self.allowed = allowed

    def js(self, script, *arguments):
        return self.driver.execute_script(f"return {script}", *arguments)

    def wait(self, script, seconds=180.0):
        """The value of an expression once it is true; time in which we stood still is free."""
        waited, last = 0.0, time.monotonic()
        while not (found := self.js(script)):
            assert waited < seconds, f"it never came true: {script}\n{self.js(BODY)}"
            time.sleep(0.02)
            now = time.monotonic()
            waited += min(0.5, now - last)
            last = now
        return found

    def text(self, name):
        return str(self.js("document.getElementById(arguments[0]).textContent", name))

    def put(self, name, value):
        self.js("(document.getElementById(arguments[0]).value = arguments[1])", name, value)

    def click(self, name):
        self.driver.find_element("id", name).click()

    def size(self, width, height, dark=False, reduced=False):
        """A screen of this size in CSS pixels, with these wishes of its reader."""
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        wishes = {
            "prefers-color-scheme": "dark" if dark else "light",
            "prefers-reduced-motion": "reduce" if reduced else "no-preference",
        }
        features = [{"name": name, "value": value} for name, value in wishes.items()]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def keys(self, *keys):
        from selenium.webdriver import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()

    def complaints(self):
        """Errors and warnings of the console so far, but of pixels that only the tests read."""
        messages = [entry["message"] for entry in self.driver.get_log("browser")]
        return [message for message in messages if "willReadFrequently" not in message]

    def strangers(self):
        """Addresses that were requested and are not the server's own."""
        log = [json.loads(row["message"])["message"] for row in self.driver.get_log("performance")]
        sent = [row["params"] for row in log if row["method"] == "Network.requestWillBeSent"]
        assert sent, "the browser sent no request: the log is not kept"
        local = (self.allowed, "data:", "blob:", "chrome:", "chrome-untrusted:")
        urls = [row["request"]["url"] for row in sent]
        return [url for url in urls if not url.startswith(local)]


BODY = "document.body ? document.body.innerText.slice(0, 2000) : ''"


@contextmanager
def opened(url, folder, width=1280, height=860):
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
