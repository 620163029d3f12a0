"""A user who interrupts a job in the middle of it."""

import contextlib

from dart_llm.reporting.console import Ui


class Stopping(Ui):
    """Raises KeyboardInterrupt after some documents, passages or cells."""

    def __init__(self, after):
        super().__init__(quiet=True)
        self.left = after

    @contextlib.contextmanager
    def progress(self, text, total, told=False):
        def advance(count):
            self.left -= count
            if self.left <= 0:
                raise KeyboardInterrupt

        yield advance
