"""Stands in for the ``datasets`` library and records what was asked for."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

Call = tuple[str, str | None, str, bool]
"""Id, configuration, split, whether it was streamed."""


class FakeDatasets:
    """``rows`` by call; ``error`` is raised instead when it is set."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.revisions: list[str | None] = []
        self.rows: dict[Call, Any] = {}
        self.read = 0
        self.error: Exception | None = None

    def load_dataset(
        self, path: str, name: str | None, *, split: str, streaming: bool, revision: Any = None
    ) -> Any:
        self.calls.append((path, name, split, streaming))
        self.revisions.append(revision)
        if self.error is not None:
            raise self.error
        return self._iterate(self.rows[self.calls[-1]])

    def _iterate(self, rows: Any) -> Iterator[Any]:
        for row in rows:
            self.read += 1
            yield row


def install(monkeypatch: pytest.MonkeyPatch) -> FakeDatasets:
    """A fake ``datasets`` module for the length of the test."""
    fake = FakeDatasets()
    module = ModuleType("datasets")
    module.load_dataset = fake.load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return fake
