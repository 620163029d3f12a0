"""How far a long computation is, now and then, where there is no progress bar."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

EVERY = 30.0
"""Seconds between two lines."""


@dataclass
class News:
    """Says how many of ``total`` things are done and how long the others will take."""

    say: Callable[[str], None]
    total: int
    noun: str = "cells"
    finished: int = 0
    began: float = field(default_factory=time.monotonic)
    said: float = field(default_factory=time.monotonic)

    def done(self) -> None:
        """One more was computed."""
        self.finished += 1
        now = time.monotonic()
        if now - self.said < EVERY or self.finished == self.total:
            return
        self.said = now
        left = (now - self.began) / self.finished * (self.total - self.finished)
        self.say(f"{self.finished} of {self.total} {self.noun}, about {minutes(left)} left")


def minutes(seconds: float) -> str:
    """ "42 s", "3 min"."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
