"""A user who interrupts a job in the middle of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from dart_llm.reporting.console import Ui


class Stopping(Ui):
    """Raises ``error`` after some documents, passages or cells."""

    def __init__(self, after: int, error: type[BaseException] = KeyboardInterrupt) -> None:
        super().__init__(quiet=True)
        self.left, self.error = after, error

    @contextlib.contextmanager
    def progress(self, text: str, total: int, told: bool = False) -> Iterator[Any]:
        def advance(count: int) -> None:
            self.left -= count
            if self.left <= 0:
                raise self.error

        yield advance
