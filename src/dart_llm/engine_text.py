"""From tokens to text while they arrive: whole characters only, stop strings left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

HALF = "\ufffd"
"""What a decoder gives for part of a character."""

CONTEXT = 4
"""Tokens before a new one with which it is decoded: some tokenizers treat the first one apart."""


class Pieces:
    """The text of single tokens, special ones by their names; remembered."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def __getitem__(self, token: int) -> str:
        text = self._known.get(token)
        if text is None:
            text = self._known[token] = self._find(token)
        return text

    def _find(self, token: int) -> str:
        text: str = _decode(self._tokenizer, [token], special=True)
        if text and not text[0].isspace():  # a first token may have lost its leading space
            twice = _decode(self._tokenizer, [token, token], special=True)
            if twice.startswith(text) and twice.endswith(text):
                return twice[len(text) :]
        return text

    def of(self, ids: Sequence[int]) -> list[str]:
        """One text per token: a character of several tokens comes with its last one."""
        texts: list[str] = []
        held: list[int] = []
        for token in ids:
            own = self[token]
            if not held and HALF not in own:
                texts.append(own)
                continue
            held.append(token)
            joined = _decode(self._tokenizer, held, special=True)
            whole = not joined.endswith(HALF) or len(held) > CONTEXT
            texts.append(joined if whole else "")
            held = [] if whole else held
        if held:
            texts[-1] = _decode(self._tokenizer, held, special=True)
        return texts


class TextStream:
    """Decodes one answer token by token; special tokens say nothing."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []
        self._before = ""
        self._pending: list[int] = []

    def add(self, token: int) -> str:
        """What can be read now that could not before."""
        self._pending.append(token)
        after = _decode(self._tokenizer, self._context + self._pending)
        return "" if after.endswith(HALF) else self._take(after)

    def end(self) -> str:
        """What is left, half characters too: no token will follow."""
        if not self._pending:
            return ""
        return self._take(_decode(self._tokenizer, self._context + self._pending))

    def _take(self, after: str) -> str:
        new = after[len(self._before) :]
        self._context = (self._context + self._pending)[-CONTEXT:]
        self._before = _decode(self._tokenizer, self._context)
        self._pending = []
        return new


def _decode(tokenizer: Any, ids: Sequence[int], special: bool = False) -> str:
    text: str = tokenizer.decode(
        ids, skip_special_tokens=not special, clean_up_tokenization_spaces=False
    )
    return text


class StopFinder:
    """Ends a text at the first of some strings to be complete, and hides it.

    Text that may be the beginning of one is held back until that is known, so that what came out
    does not depend on how the text was cut into tokens.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def add(self, text: str) -> str:
        """What of the text so far may be shown now; nothing more once ``found``."""
        if not self._stops:
            return text
        held = self._held + text
        ends = [(at + len(stop), at) for stop in self._stops if (at := held.find(stop)) >= 0]
        if ends:
            self.found, self._held = True, ""
            return held[: min(ends)[1]]
        keep = max(_begun(held, stop) for stop in self._stops)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def end(self) -> str:
        """What was held back: nothing will follow."""
        held, self._held = self._held, ""
        return held


def _begun(text: str, stop: str) -> int:
    """Characters at the end of ``text`` with which ``stop`` begins."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
