"""Progress of calibration: what happens, how far it is, how long the rest takes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping

from dart_llm.reporting.words import duration

logger = logging.getLogger("dart_llm")

Say = Callable[[str], None]
Advance = Callable[[float], None]
"""Takes the share of a stage that is done, from 0 to 1."""

FIRST_S, EVERY_S = 5.0, 10.0
"""Until the first line, and between two; forwards are the chances to log one."""


def ignore(share: float) -> None:
    """An ``Advance`` that logs nothing."""


class Progress:
    """Lines about ``stages``: their names for people, and the work of each, in tokens read."""

    def __init__(self, say: Say, stages: Mapping[str, float], what: str) -> None:
        """``what``: happens, for people.

        A library call logs warnings, where it takes long: else it seems to hang.
        """
        self._stages, self._total, self._before = stages, sum(stages.values()), 0.0
        quiet = say == logger.info
        self._say, self._what = (logger.warning, what) if quiet else (say, "")
        self._began = self._logged = time.monotonic()
        if not quiet:
            say(what)

    def stage(self, name: str) -> Advance:
        """Begin stage ``name``; returns what takes how far it is."""
        before, work = self._before, self._stages[name]
        self._before += work
        return lambda share: self._advance(name, before + share * work)

    def _advance(self, name: str, done: float) -> None:
        now = time.monotonic()
        first = self._logged == self._began
        if now - self._logged < (FIRST_S if first else EVERY_S) or not done:
            return
        left = (self._total - done) * (now - self._began) / done
        if first and left < FIRST_S:
            return
        if self._what:
            self._say(self._what)
        self._what, self._logged = "", now
        rough = duration(max(1.0, round(left, -1) if left > 20 else round(left))).replace(
            ".0 ", " "
        )
        self._say(f"learning ({name}): {100 * done / self._total:.0f} %, about {rough} left")
