"""Stdout, stderr, progress, time left.

What the terminal shows: text on stdout, everything else on stderr, nothing when asked.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from dart_llm.files import size_text
from dart_llm.reporting.heartbeat import FIRST_S, SILENT_S, Heartbeat, Pace, Work, clock
from dart_llm.reporting.words import duration


class _Left(ProgressColumn):
    """The time left of a bar."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self.work = work

    def render(self, task: Task) -> Text:
        return Text(self.work.progress().removeprefix(self.work.text + ": "))


class Ui:
    """Terminal output of a job.  ``quiet``: nothing but errors (``--json``).

    While a block of ``working``, ``status`` or ``progress`` is open, nobody waits longer than
    ``SILENT_S`` for a line, or sees something move.
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
        self.heartbeat = Heartbeat(self.remark, muted=lambda: self._streaming)
        self._estimated = False

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
        """One line that says only that work continues, which the log does not keep."""
        with self._printing():
            self.err.print(text, highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """One line for people; kept for the log."""
        self.log.append(text)
        self.remark(text)

    def aside(self, text: str) -> None:
        """One line that matters less than the others."""
        self.log.append(text)
        with self._printing():
            self.err.print(text, style="dim", highlight=False, soft_wrap=True)

    def table(self, table: RenderableType) -> None:
        """Print a table; kept for the log as plain text."""
        plain = Console(width=100, no_color=True, markup=False)
        with plain.capture() as capture:
            plain.print(table)
        self.log.append(capture.get().rstrip())
        with self._printing():
            self.err.print(table)

    def result(self, what: RenderableType) -> None:
        """What a command was asked for, on stdout."""
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

    def _block(self, work: Work) -> contextlib.AbstractContextManager[Work]:
        return contextlib.nullcontext(work) if self.quiet else self.heartbeat.block(work)

    def working(
        self, text: str, number: int = 0, of: int = 0, noun: str = "cell"
    ) -> contextlib.AbstractContextManager[Work]:
        """Name what runs, for the lines of a long silence; says nothing now.

        ``number``, ``of``: its place among like parts, called ``noun``.
        """
        return self._block(Work(text, number=number, of=of, noun=noun))

    @contextlib.contextmanager
    def status(self, text: str) -> Iterator[Callable[[str], None]]:
        """A spinner while something runs; yields a function that changes its text."""
        with self._block(Work(text, loud=True, moving=self.live)) as work:
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
        """A progress bar with an estimate of the time left; yields ``advance(n)``.

        Where there is no terminal, lines now and then.
        """
        work = Work(text, pace=Pace(total), loud=True, moving=self.live)
        with self._block(work):
            if not self.live:
                yield lambda count: self._advance(work, count)
                return
            columns = TextColumn("{task.description}", markup=False), BarColumn(), _Left(work)
            with Progress(*columns, console=self.err, transient=True) as bar:
                task = bar.add_task(text, total=total)

                def advance(count: int) -> None:
                    bar.advance(task, count)
                    self._advance(work, count)

                yield advance

    def _advance(self, work: Work, count: int) -> None:
        """Report ``work`` where nothing was for a while; once, how long all will take."""
        pace, now = work.pace, clock()
        assert pace is not None
        with self.heartbeat.lock:
            pace.advance(count)
            if self.quiet or pace.done >= pace.total:
                return
            quiet_for = now - self.heartbeat.spoke
            outlook = "" if now - pace.began < FIRST_S else self._outlook(pace)
            if outlook or (quiet_for >= SILENT_S and not work.moving):
                work.reported = True
                self.remark(self.heartbeat.place(work) + work.progress() + outlook)

    def _outlook(self, pace: Pace) -> str:
        """Once, where it is long: the time of all parts, and the memory."""
        left, part, outlook = pace.left(), self.heartbeat.part(), ""
        if self._estimated or left is None or pace.each is None:
            return ""
        if part is not None and part.number < part.of:
            left += (part.of - part.number) * pace.total * pace.each
            outlook = f"; about {duration(left)} for all {part.of} {part.noun}s"
        if left < SILENT_S:
            return ""
        from dart_llm.native.memory import peak  # PyTorch is there by now

        self._estimated, memory = True, peak()
        return f"{outlook}; peak memory so far {size_text(memory)}" if memory else outlook
