"""What a log says of work that takes long, where there is no terminal."""

from __future__ import annotations

import pytest

from dart_llm import ui
from dart_llm.ui import Ui


def test_a_log_hears_of_long_work_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 5.0, 25.0, 25.0, 30.0, 50.0])
    monkeypatch.setattr(ui.time, "monotonic", lambda: next(clock))
    out = Ui()
    assert not out.live
    with out.progress("slices", 10) as advance:
        for count in (1, 2, 3, 4):
            advance(count)
    assert out.log == ["slices: 3 of 10"]  # after 25 s; the end speaks for itself
