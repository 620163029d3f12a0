"""Texts that are longer than an encoder's window, cut into pieces that fit.

Encoders drop what is beyond their window without a word.  Here whole sentences are packed into
windows in their order; a sentence that fits none is halved at a word until its parts do.
"""

from __future__ import annotations

from collections.abc import Callable

from dart_llm.errors import ConfigError
from dart_llm.rouge import sentences

Count = Callable[[str], int]
"""How many of a window's tokens a text takes."""


def windows(text: str, count: Count, limit: int | None) -> list[str]:
    """``text`` in consecutive pieces of at most ``limit`` tokens each; together they hold it all.

    A text that fits is returned as it is, without the white space around it; without a limit
    every text fits.  Empty text gives no window.  Where the text is cut, white space between
    sentences becomes one blank.  Raises ``ConfigError`` for a limit below 1.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"a window needs room for at least 1 token, not {limit}")
    text = text.strip()
    if not text:
        return []
    if limit is None or count(text) <= limit:
        return [text]
    found: list[str] = []
    for piece in (part for one in sentences(text) for part in _fitting(one, count, limit)):
        joined = f"{found[-1]} {piece}" if found else piece
        if found and count(joined) <= limit:
            found[-1] = joined
        else:
            found.append(piece)
    return found


def _fitting(piece: str, count: Count, limit: int) -> list[str]:
    """The piece itself if it fits or is one character, else its halves, cut further as needed."""
    if len(piece) < 2 or count(piece) <= limit:
        return [piece]
    words = piece.split()
    if len(words) > 1:
        half = len(words) // 2
        parts = (" ".join(words[:half]), " ".join(words[half:]))
    else:
        half = len(piece) // 2
        parts = (piece[:half], piece[half:])
    return [fitting for part in parts for fitting in _fitting(part, count, limit)]
