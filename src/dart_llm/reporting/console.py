"""Terminal output: results go to stdout, everything else to stderr.  A quiet ``Ui`` prints neither.

When a command has printed nothing for a while, a line names its current work, with the progress and
the time left.
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
"""Seconds between checks for silence."""

RECENT = 10
"""Estimates of the time left use the latest items: this many, or a fifth of all if that is more."""

AT_ONCE_S = 0.005
"""Seconds per item.  Faster items were loaded from an earlier run; the estimate ignores them."""

clock = time.monotonic


class Pace:
    """Counts finished items, and estimates the time left from the speed of the latest items."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self._last = clock()
        self._recent = deque[tuple[float, int]](maxlen=max(RECENT, total // 5))

    def advance(self, count: int) -> None:
        """Count ``count`` more items as done."""
        if not count:
            return
        now = clock()
        if now - self._last >= AT_ONCE_S * count:
            self._recent.append((now - self._last, count))
        self.done, self._last = self.done + count, now

    def left(self) -> float | None:
        """Return the estimated seconds until all items are done; None if no item is computed yet.

        The estimate grows while an item takes longer than expected.
        """
        if not self._recent:
            return None
        seconds, counts = map(sum, zip(*self._recent, strict=True))
        rest, waited = self.total - self.done, clock() - self._last
        return max(rest * seconds / counts - waited, waited * rest / 2)


@dataclass(eq=False)
class Work:
    """A block of code whose progress is reported.

    ``text``: the block's name, which may change.  ``pace``: counts the block's finished items; None
    if items are not counted.  ``part``: the block's number among several blocks, such as "cell 2 of
    3, ", or "".  ``loud``: True if reports name this block instead of inner blocks that are not
    loud.  ``moving``: True if a spinner or a bar already shows the block.  ``began``: start time.
    """

    text: str
    pace: Pace | None = None
    part: str = ""
    loud: bool = False
    moving: bool = False
    began: float = field(default_factory=lambda: clock())

    def progress(self) -> str:
        """The block's name; if items are counted, also how many are done and the time left."""
        if self.pace is None:
            return self.text
        seconds = self.pace.left()
        estimate = f", about {duration(seconds)} left" if seconds else ""
        return f"{self.text}: {self.pace.done} of {self.pace.total}{estimate}"


class Heartbeat:
    """Reports the current work through ``say`` after ``SILENT_S`` seconds without output.

    While a block is open, a thread checks for silence.  While ``muted()`` is true, nothing is
    reported.
    """

    def __init__(self, say: Callable[[str], None], muted: Callable[[], bool]) -> None:
        self.say, self.muted = say, muted
        self.lock = threading.RLock()
        """Held while printing, so that lines do not mix."""
        self.works: list[Work] = []
        """The open blocks, innermost last."""
        self.spoke = clock()
        """Time of the last output."""
        self._ended = threading.Event()

    @contextlib.contextmanager
    def block(self, work: Work) -> Iterator[Work]:
        """Report ``work`` during the block; when it ends, blocks that began inside it end too."""
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
        """If silent for ``SILENT_S``, report the innermost block; loud blocks take precedence."""
        with self.lock:
            works = [work for work in self.works if work.loud] or self.works
            if not works or works[-1].moving or self.muted() or clock() - self.spoke < SILENT_S:
                return
            part = next((work.part for work in reversed(self.works) if work.part), "")
            self.spoke = clock()
            so_far = duration(self.spoke - works[-1].began)
            self.say(f"{part}{works[-1].progress()} ({so_far} so far)")


@contextlib.contextmanager
def logged(logger: logging.Logger, text: str) -> Iterator[Callable[[str], None]]:
    """Yield a function that logs each step of a library call; ``text`` names the first step.

    Steps are logged at level INFO, which is rarely shown.  A step that takes longer than
    ``SILENT_S`` seconds is logged again, as a warning.
    """
    with Heartbeat(logger.warning, lambda: False).block(Work(text, loud=True)) as work:

        def say(step: str) -> None:
            work.text = step
            logger.info(step)

        yield say


class Ui:
    """Terminal output of a command.  If ``quiet``, as with ``--json``, only errors are printed.

    While a block of ``working``, ``status`` or ``progress`` is open, a line is printed at least
    every ``SILENT_S`` seconds, unless a spinner or a bar moves.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        width = None if sys.stderr.isatty() else 110
        # no markup: rich would interpret square brackets in the names of models and variants
        self.err = Console(stderr=True, quiet=quiet, width=width, markup=False)
        self.out = Console(width=None if sys.stdout.isatty() else 160, markup=False)
        self.log: list[str] = []
        """The lines, tables and texts printed so far; studies save them in a file of the run."""
        self.live = sys.stderr.isatty() and not quiet
        self._streaming = False
        self.heartbeat = Heartbeat(self.remark, lambda: self._streaming or quiet)

    @classmethod
    @contextlib.contextmanager
    def started(cls, quiet: bool = False) -> Iterator[Ui]:
        """Yield the terminal output of a command, and report that the command is starting.

        Enter this block before PyTorch is imported, which takes seconds.
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
        """Print one line without adding it to the log."""
        with self._printing():
            self.err.print(text, highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """Print one line and add it to the log."""
        self.log.append(text)
        self.remark(text)

    def table(self, table: RenderableType) -> None:
        """Print a table and add it to the log as plain text."""
        plain = Console(width=100, no_color=True, markup=False)
        with plain.capture() as capture:
            plain.print(table)
        self.log.append(capture.get().rstrip())
        with self._printing():
            self.err.print(table)

    def result(self, output: RenderableType) -> None:
        """Print the result of a command on stdout."""
        if not self.quiet:
            with self._printing():
                self.out.print(output, highlight=False, soft_wrap=isinstance(output, str))

    def token(self, text: str) -> None:
        """Stream one token to stdout."""
        if not self.quiet:
            with self._printing():
                self._streaming = True
                sys.stdout.write(text)
                sys.stdout.flush()

    def end_text(self, text: str) -> None:
        """End a streamed text and add it to the log."""
        self.log.append(text)
        self._streaming = not self.quiet
        self.end_line()

    def end_line(self) -> None:
        """End the line of a streamed text, so that later output starts on a new line."""
        if self._streaming:
            self._streaming = False
            sys.stdout.write("\n")
            sys.stdout.flush()

    def working(
        self, text: str, number: int = 0, of: int = 0, noun: str = "cell"
    ) -> contextlib.AbstractContextManager[Work]:
        """Name the work of this block for reports after a long silence; print nothing now.

        If ``of`` is not 0, reports begin with ``noun``, ``number`` and ``of``: "cell 2 of 3, ".
        """
        return self.heartbeat.block(Work(text, part=f"{noun} {number} of {of}, " if of else ""))

    @contextlib.contextmanager
    def status(self, text: str) -> Iterator[Callable[[str], None]]:
        """Show a spinner with ``text`` during the block; yield a function that changes the text."""
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
        """Show a bar with the time left; yield ``advance(n)``, which counts n items as done."""
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
