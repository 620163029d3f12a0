"""Every view of the window, read by axe: nothing that it calls a violation, of any severity."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import axe_core_python
import pytest

from browser import Window, need_browser, opened
from dart_llm.server.window import page
from serve_cases import running
from window_cases import records

AXE = Path(axe_core_python.__file__).parent / "axe.min.js"
FOUND = (
    "const done = arguments[0]; axe.run({resultTypes: ['violations']}).then((all) =>"
    " done(all.violations.map((one) => [one.impact, one.id, one.nodes.map((node) => node.html)])))"
)
TABLES = "# Speed\n" + "| wide " * 60 + "\n" + "| row\n" * 60


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A benchmark with long tables and a report, and a measured run."""
    root = tmp_path / "results"
    files: dict[str, dict[str, Any]] = {
        "speed/20260102-030405": {"kind": "speed", "status": "complete"},
        "tides/20260102-030405": {"kind": "drift", "status": "complete"},
    }
    for name, config in files.items():
        folder = root / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "report.html").write_text("<p>report</p>")
        (folder / ("speed.md" if "speed" in name else "summary.md")).write_text(TABLES)
    row = {"method": "dart", "label": "dart", "sparsity": 0.5, "cells": 2, "remasks": 7}
    row |= {"achieved_sparsity": 0.47, "dense_token_share": 0.05, "loss": {"after": {"mean": 4.5}}}
    summary = json.dumps({"mode": "forced", "rows": [row]})
    (root / "tides/20260102-030405/summary.json").write_text(summary)
    return root


@pytest.fixture
def window(results: Path, tmp_path: Path) -> Iterator[Window]:
    need_browser()
    with (
        running(results_dir=str(results)) as server,
        opened(f"{server.url}/", tmp_path / "profile") as found,
    ):
        found.wait("document.querySelectorAll('#prompts button').length === 3")
        yield found


def violations(window: Window) -> list[Any]:
    window.driver.execute_script(AXE.read_text(encoding="utf-8"))
    return list(window.driver.execute_async_script(FOUND))


def test_the_conversation(window: Window) -> None:
    assert violations(window) == []  # the tour is open
    window.js("(document.getElementById('max-tokens').value = 3)")
    window.driver.find_element("id", "compare").click()
    window.driver.find_element("css selector", "#prompts button").click()
    window.wait("document.getElementById('view-of').textContent.endsWith('3 tokens')")
    window.js("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert violations(window) == []
    window.size(390, 844, dark=True)
    assert violations(window) == []


def test_past_runs(window: Window) -> None:
    for name in ("speed", "tides"):
        window.js(f"(location.hash = 'runs/{name}/20260102-030405')")
        window.wait(f"document.querySelector('#run h2')?.textContent.startsWith('{name}')")
        window.js("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        for width, dark in ((1280, False), (390, True)):
            window.size(width, 844, dark=dark)
            assert violations(window) == [], (name, width)


def test_the_replay(tmp_path: Path) -> None:
    need_browser()
    file = tmp_path / "replay.html"
    file.write_text(page(records()), encoding="utf-8")
    with opened(file.as_uri(), tmp_path / "profile") as window:
        window.js("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        assert violations(window) == []
