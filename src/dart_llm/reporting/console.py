"""What the terminal shows: results on stdout, everything else on stderr, nothing when quiet.

Work that is silent for long reports what it is doing, how far it is and how long the rest takes.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import Progress
from rich.text import Text

from dart_llm.reporting.words import duration

SILENT_S = 10.0
"""Seconds without output after which a line says that work continues."""

TICK_S = 1.0
"""Seconds between two looks at the clock."""

RECENT = 10
"""Items, at least, whose mean time is that of the items to come."""

AT_ONCE_S = 0.005
"""An item that took less was there already, from an earlier run: its time says nothing."""

clock = time.monotonic


class Pace:
    """Items done of a total, and the time of the rest at the speed of the latest items."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self._last = clock()
        self._recent = deque[tuple[float, int]](maxlen=max(RECENT, total // 5))

    def advance(self, count: int) -> None:
        """``count`` more items are done."""
        if not count:
            return
        now = clock()
        if now - self._last >= AT_ONCE_S * count:
            self._recent.append((now - self._last, count))
        self.done, self._last = self.done + count, now

    def left(self) -> float | None:
        """Seconds until all are done; None before one was computed.

        They grow while an item takes longer than expected.
        """
        if not self._recent:
            return None
        seconds, counts = map(sum, zip(*self._recent, strict=True))
        rest, waited = self.total - self.done, clock() - self._last
        return max(rest * seconds / counts - waited, waited * rest / 2)


@dataclass(eq=False)
class Work:
    """A block of work.

    ``text``: its name, which may change.  ``pace``: of counted work.  ``part``: its place among
    several, e.g. "cell 2 of 3, ".  ``loud``: it speaks for what lies within it unless that is loud,
    too.  ``moving``: a spinner or bar shows it.
    """

    text: str
    pace: Pace | None = None
    part: str = ""
    loud: bool = False
    moving: bool = False
    began: float = field(default_factory=lambda: clock())

    def progress(self) -> str:
        """Name, count and time left."""
        if self.pace is None:
            return self.text
        left = self.pace.left()
        about = f", about {duration(left)} left" if left else ""
        return f"{self.text}: {self.pace.done} of {self.pace.total}{about}"


class Heartbeat:
    """Reports through ``say`` what is being done after ``SILENT_S`` without output.

    From a thread that lives as long as a block is open.  ``muted``: asked before each line.
    """

    def __init__(self, say: Callable[[str], None], muted: Callable[[], bool]) -> None:
        self.say, self.muted = say, muted
        self.lock = threading.RLock()
        """Whoever prints takes it, so that lines do not mix."""
        self.works: list[Work] = []
        self.spoke = clock()
        self._ended = threading.Event()

    @contextlib.contextmanager
    def block(self, work: Work) -> Iterator[Work]:
        """Report ``work`` while the block lasts; its end ends all blocks that began within it."""
        with self.lock:
            self.works.append(work)
            if len(self.works) == 1:
                self.spoke, self._ended = clock(), threading.Event()
                threading.Thread(target=self._run, args=(self._ended,), daemon=True).start()
        try:
            yield work
        finally:
            with self.lock:
                if work in self.works:
                    del self.works[self.works.index(work) :]
                if not self.works:
                    self._ended.set()

    def _run(self, ended: threading.Event) -> None:
        while not ended.wait(TICK_S):
            self.beat()

    def beat(self) -> None:
        """Report the innermost loud block, or else the innermost, if it is time to."""
        with self.lock:
            works = [work for work in self.works if work.loud] or self.works
            if not works or works[-1].moving or self.muted() or clock() - self.spoke < SILENT_S:
                return
            where = next((work.part for work in reversed(self.works) if work.part), "")
            self.spoke = clock()
            so_far = duration(self.spoke - works[-1].began)
            self.say(f"{where}{works[-1].progress()} ({so_far} so far)")


@contextlib.contextmanager
def logged(logger: logging.Logger, text: str) -> Iterator[Callable[[str], None]]:
    """Yields a function that logs news of a library call; ``text``: what is done at first.

    News is logged as information, which few see; after ``SILENT_S`` a warning repeats it.
    """
    with Heartbeat(logger.warning, lambda: False).block(Work(text, loud=True)) as work:

        def say(news: str) -> None:
            work.text = news
            logger.info(news)

        yield say


class Ui:
    """Terminal output of a job.  ``quiet``: nothing but errors (``--json``).

    While a block of ``working``, ``status`` or ``progress`` is open, a line comes at least every
    ``SILENT_S`` seconds, or a bar moves.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        width = None if sys.stderr.isatty() else 110
        # no markup: names of models and variants may have square brackets, which rich would read
        self.err = Console(stderr=True, quiet=quiet, width=width, markup=False)
        self.out = Console(width=None if sys.stdout.isatty() else 160, markup=False)
        self.log: list[str] = []
        self.live = sys.stderr.isatty() and not quiet
        self._streaming = False
        self.heartbeat = Heartbeat(self.remark, lambda: self._streaming or quiet)

    @classmethod
    @contextlib.contextmanager
    def started(cls, quiet: bool = False) -> Iterator[Ui]:
        """The terminal of a command that computes: says at once that it begins.

        To be entered before PyTorch is imported, which takes seconds.
        """
        ui = cls(quiet)
        with ui.working("starting"):
            if "torch" not in sys.modules:
                ui.remark("starting (loading PyTorch)")
            yield ui

    @contextlib.contextmanager
    def _printing(self) -> Iterator[None]:
        with self.heartbeat.lock:
            self.heartbeat.spoke = clock()
            yield

    def remark(self, text: str) -> None:
        """One line that the log does not keep."""
        with self._printing():
            self.err.print(text, highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """One line for people; kept for the log."""
        self.log.append(text)
        self.remark(text)

    def table(self, table: RenderableType) -> None:
        """Print a table; kept for the log as plain text."""
        plain = Console(width=100, no_color=True, markup=False)
        with plain.capture() as capture:
            plain.print(table)
        self.log.append(capture.get().rstrip())
        with self._printing():
            self.err.print(table)

    def result(self, what: RenderableType) -> None:
        """The result of a command, on stdout."""
        if not self.quiet:
            with self._printing():
                self.out.print(what, highlight=False, soft_wrap=isinstance(what, str))

    def token(self, text: str) -> None:
        """Stream one token to stdout."""
        if not self.quiet:
            with self._printing():
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

    def working(
        self, text: str, number: int = 0, of: int = 0, noun: str = "cell"
    ) -> contextlib.AbstractContextManager[Work]:
        """Name what runs, for the lines of a long silence; says nothing now.

        ``number``, ``of``: its place among several, each called ``noun``.
        """
        return self.heartbeat.block(Work(text, part=f"{noun} {number} of {of}, " if of else ""))

    @contextlib.contextmanager
    def status(self, text: str) -> Iterator[Callable[[str], None]]:
        """A spinner while something runs; yields a function that changes its text."""
        with self.heartbeat.block(Work(text, loud=True, moving=self.live)) as work:
            if self.live:
                with self.err.status(Text(text)) as status:
                    yield lambda news: status.update(Text(news))
                return

            def renew(news: str) -> None:
                if news != work.text:
                    work.text = news
                    self.say(news)

            self.say(text)
            yield renew

    @contextlib.contextmanager
    def progress(self, text: str, total: int) -> Iterator[Callable[[int], Any]]:
        """A progress bar with an estimate of the time left; yields ``advance(n)``."""
        pace = Pace(total)
        with self.heartbeat.block(Work(text, pace=pace, loud=True, moving=self.live)):
            if not self.live:
                yield pace.advance
                return
            with Progress(console=self.err, transient=True) as bar:
                task = bar.add_task(escape(text), total=total)

                def advance(count: int) -> None:
                    pace.advance(count)
                    bar.advance(task, count)

                yield advance
