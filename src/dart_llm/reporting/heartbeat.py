"""Signs of life of long work: what is being done, how far it is, how long the rest takes."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dart_llm.reporting.words import duration

SILENT_S = 10.0
"""Seconds without output after which a line says that work continues."""

FIRST_S = 3.0
"""Seconds after which counted work is first reported, and its time estimated."""

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
        self.began = self.last = clock()
        self._recent = deque[tuple[float, int]](maxlen=max(RECENT, total // 5))

    def advance(self, count: int) -> None:
        """``count`` more items are done; 0 says nothing."""
        if not count:
            return
        now = clock()
        if now - self.last >= AT_ONCE_S * count:
            self._recent.append((now - self.last, count))
        self.done, self.last = self.done + count, now

    @property
    def each(self) -> float | None:
        """Seconds per item; None before one was computed."""
        counts = sum(count for _, count in self._recent)
        return sum(seconds for seconds, _ in self._recent) / counts if counts else None

    def left(self) -> float | None:
        """Seconds until all are done, which grow while an item takes longer than expected.

        None before one was computed.
        """
        each, rest = self.each, self.total - self.done
        if each is None:
            return None
        waited = clock() - self.last
        return max(each * rest - waited, waited * rest / 2)


@dataclass(eq=False)
class Work:
    """A block of work.

    ``text``: its name, which may change.  ``pace``: of counted work.  ``number``, ``of``: its
    place among like parts, called ``noun``; 0: none.  ``loud``: it speaks for what lies
    within it unless that is loud, too.  ``moving``: a spinner or bar shows it.
    """

    text: str
    pace: Pace | None = None
    number: int = 0
    of: int = 0
    noun: str = "cell"
    loud: bool = False
    moving: bool = False

    def __post_init__(self) -> None:
        self.began = clock()
        self.reported = self.pace is None
        """Whether it had its first line; uncounted work has none before a long silence."""

    def is_due(self, spoke: float) -> bool:
        """Whether the first line is: not right before the end.  ``spoke``: when the last was."""
        if self.reported or clock() - max(self.began, spoke) < FIRST_S:
            return False
        left = None if self.pace is None else self.pace.left()
        return left is None or left >= SILENT_S

    def progress(self) -> str:
        """Name, count and time left."""
        if self.pace is None:
            return self.text
        left = self.pace.left()
        about = f", about {duration(left)} left" if left else ""
        return f"{self.text}: {self.pace.done} of {self.pace.total}{about}"


class Heartbeat:
    """Reports through ``say`` what is being done where nothing was printed for ``SILENT_S``.

    From a thread of its own, which lives as long as a block is open.  ``muted``: asked before
    each line, e.g. whether a text is being streamed.
    """

    def __init__(
        self, say: Callable[[str], None], muted: Callable[[], bool] = lambda: False
    ) -> None:
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
                run = threading.Thread(
                    target=self._run, args=(self._ended,), name="heartbeat", daemon=True
                )
                run.start()
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
        """Report what is being done if it is time to."""
        with self.lock:
            work = self.speaking()
            if work is None or work.moving or self.muted():
                return
            if work.is_due(self.spoke) or clock() - self.spoke >= SILENT_S:
                work.reported, self.spoke = True, clock()
                far = duration(self.spoke - work.began)
                self.say(f"{self.place(work)}{work.progress()} ({far} so far)")

    def speaking(self) -> Work | None:
        """The innermost loud block, else the innermost."""
        loud = [work for work in self.works if work.loud]
        return next(reversed(loud or self.works), None)

    def part(self) -> Work | None:
        """The innermost block that is one of several like parts."""
        return next((work for work in reversed(self.works) if work.of), None)

    def place(self, work: Work) -> str:
        """ "cell 2 of 3, ": where ``work`` lies among the parts; "" where there are none."""
        part = self.part()
        return f"{part.noun} {part.number} of {part.of}, " if part else ""


@contextlib.contextmanager
def logged(logger: logging.Logger, text: str) -> Iterator[Callable[[str], None]]:
    """News of a library call for the log; yields what takes it, for what ``text`` names first.

    News is information, which few see: what takes longer than ``SILENT_S`` is a warning.
    """
    heartbeat = Heartbeat(logger.warning)
    with heartbeat.block(Work(text, loud=True)) as work:

        def say(news: str) -> None:
            work.text = news
            logger.info(news)

        yield say
