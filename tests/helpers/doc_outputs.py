"""Whether what a command printed is what its page shows, but for numbers, paths and frames."""

from __future__ import annotations

import re

_FRAME = re.compile(r"[─-╿]+")
_STAMP = re.compile(r"\b\d{8}-\d{6}(?:-\d+)?\b")
_NUMBER = re.compile(r"(?<![A-Za-z_])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
_ELLIPSIS = re.compile(r"\S*…")
_REST = (" ...", " …")
"""The end of a shown line whose rest is left out."""
LEFT_OUT = "…"
"""A line that stands for others."""
_SPEAKER = re.compile(r"--- [\w -]+ ---$")
_PROGRESS = re.compile(
    r"(?:loading|learning|the model writes|fetching|converting|making) |perplexity on \S+: # of #$"
)
NUMBER = "#"


def shape(line: str) -> str:
    """A line with ``#`` for every number, without frames and runs of spaces."""
    line = _FRAME.sub(" ", line.rstrip("\n"))
    line = _NUMBER.sub(NUMBER, _STAMP.sub(NUMBER, line))
    return " ".join(_ELLIPSIS.sub("…", line).split())


def shapes(text: str) -> list[str]:
    """All lines but empty ones, progress, and texts that a model wrote between ``--- name ---``."""
    found: list[str] = []
    speaking = False
    for line in text.splitlines():
        if speaking and re.match(r"\w[\w-]*: ", line) is None and not _SPEAKER.match(line):
            continue
        speaking = _SPEAKER.match(line) is not None
        one = shape(line)
        if one and not _PROGRESS.match(one):
            found.append(one)
    return found


def differences(documented: str, printed: str, varies: str = "") -> list[str]:
    """What the page shows and was not printed, and the other way round; [] if they match.

    ``varies``: a pattern of what is not compared.
    """
    if varies:
        documented, printed = (re.sub(varies, "", text) for text in (documented, printed))
    if LEFT_OUT in documented.splitlines():
        return [f"the page shows {one!r}" for one in missing(documented, printed)]
    expected, actual = shapes(documented), shapes(printed)
    wrong = []
    for at in range(max(len(expected), len(actual))):
        left = expected[at] if at < len(expected) else "nothing"
        right = actual[at] if at < len(actual) else "nothing"
        if not _same(left, right):
            wrong.append(f"the page shows {left!r}, printed was {right!r}")
    return wrong


def missing(documented: str, printed: str) -> list[str]:
    """Lines that were not printed in this order; what is typed, ``> ``, is left out."""
    rest = iter(shapes(printed))
    rows = documented.splitlines()
    wanted = shapes("\n".join(row for row in rows if row[:2] != "> " and row != LEFT_OUT))
    return [one for one in wanted if not any(_same(one, printed) for printed in rest)]


def _same(documented: str, printed: str) -> bool:
    if documented.endswith(_REST):
        return True
    return documented == printed
