"""Stdout, stderr, progress, time left.

What the terminal shows: text on stdout, everything else on stderr, nothing when asked.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from dart_llm.reporting.words import duration

QUIET_S = 20.0
"""How long a log stays without a word about work that goes on."""

FEW = 3
"""Of parts that are done, fewer say nothing of how long the rest takes."""


class _Lines:
    """Says now and then how much is done, and how long the rest will take."""

    def __init__(self, say: Callable[[str], None], text: str, total: int) -> None:
        self.say, self.text, self.total = say, text, total
        self.done = 0
        self.began = self.told = time.monotonic()

    def advance(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.told >= QUIET_S and 0 < self.done < self.total:
            self.told = now
            left = duration((now - self.began) / self.done * (self.total - self.done))
            known = self.done >= FEW or 2 * self.done >= self.total
            about = f", about {left} left" if known else ""
            self.say(f"{self.text}: {self.done} of {self.total}{about}")


class Ui:
    """Terminal output of a job.  ``quiet``: nothing but errors (``--json``)."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        width = None if sys.stderr.isatty() else 110
        # no markup: names of models and variants may hold the square brackets that rich would read
        self.err = Console(stderr=True, quiet=quiet, width=width, markup=False)
        self.out = Console(width=None if sys.stdout.isatty() else 160, markup=False)
        self.log: list[str] = []
        self.live = sys.stderr.isatty() and not quiet
        self._streaming = False

    def say(self, text: str) -> None:
        """One line for people; kept for the log."""
        self.log.append(text)
        self.err.print(text, highlight=False, soft_wrap=True)

    def aside(self, text: str) -> None:
        """One line that matters less than the others."""
        self.log.append(text)
        self.err.print(text, style="dim", highlight=False, soft_wrap=True)

    def table(self, table: RenderableType) -> None:
        """Print a table; kept for the log as plain text."""
        plain = Console(width=100, no_color=True, markup=False)
        with plain.capture() as capture:
            plain.print(table)
        self.log.append(capture.get().rstrip())
        self.err.print(table)

    def result(self, what: RenderableType) -> None:
        """What a command was asked for, on stdout."""
        if not self.quiet:
            self.out.print(what, highlight=False, soft_wrap=isinstance(what, str))

    def token(self, text: str) -> None:
        """Stream one token to stdout."""
        if not self.quiet:
            self._streaming = True
            sys.stdout.write(text)
            sys.stdout.flush()

    def end_text(self, text: str) -> None:
        """A streamed text is complete."""
        self.log.append(text)
        self._streaming = not self.quiet
        self.end_line()

    def end_line(self) -> None:
        """End the line of a text that is being streamed, so that what follows has its own."""
        if self._streaming:
            self._streaming = False
            sys.stdout.write("\n")
            sys.stdout.flush()

    @contextlib.contextmanager
    def status(self, text: str) -> Iterator[Callable[[str], None]]:
        """A spinner while something runs; yields a function that changes its text."""
        if not self.live:
            self.say(text)
            yield lambda news: self.say(news) if news != text else None
            return
        with self.err.status(Text(text)) as status:
            yield lambda news: status.update(Text(news))

    @contextlib.contextmanager
    def progress(self, text: str, total: int) -> Iterator[Callable[[int], Any]]:
        """A progress bar with an estimate of the time left; yields ``advance(n)``.

        Where there is no terminal, a line every ``QUIET_S`` seconds.
        """
        if not self.live:
            yield _Lines(self.say, text, total).advance
            return
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.err, transient=True) as bar:
            task = bar.add_task(text, total=total)
            yield lambda count: bar.advance(task, count)
