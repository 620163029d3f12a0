"""What the terminal and a log say: long work, and names with square brackets."""

from __future__ import annotations

import pytest
from rich.table import Table

from dart_llm.reporting import console as ui
from dart_llm.reporting.console import Ui


def test_a_log_hears_of_long_work_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 5.0, 25.0, 25.0, 30.0, 50.0])
    monkeypatch.setattr(ui.time, "monotonic", lambda: next(clock))
    out = Ui()
    assert not out.live
    with out.progress("slices", 10) as advance:
        for count in (1, 2, 3, 4):
            advance(count)
    assert out.log == ["slices: 3 of 10"]  # after 25 s; the end speaks for itself


def test_square_brackets_are_text() -> None:
    out = Ui()
    table = Table(title="model[v2].gguf")
    table.add_column("variant [a]")
    table.add_row("griffin [/b]")  # rich's markup, which ends nothing
    with out.out.capture() as found:
        out.result(table)
    out.table(table)
    for text in (found.get(), *out.log):
        assert all(name in text for name in ("model[v2].gguf", "variant [a]", "griffin [/b]"))
    out.live = True
    with out.status("loading a[/b]") as news, out.progress("c[/d]", 1):
        news("still a[/b]")
