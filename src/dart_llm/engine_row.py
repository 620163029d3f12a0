"""One choice of a request as it grows."""

from __future__ import annotations

from typing import Any

from dart_llm.engine_text import StopFinder, TextStream


class Row:
    """Tokens and text of one choice.

    ``ends``: tokens that end a text; ``limit``: tokens that it may have.
    """

    def __init__(
        self, tokenizer: Any, stops: tuple[str, ...], ends: frozenset[int], limit: int
    ) -> None:
        self.tokens: list[int] = []
        self.finish: str | None = None
        self._ends, self._limit = ends, limit
        self._stream, self._stops = TextStream(tokenizer), StopFinder(stops)
        self._texts: list[str] = []

    @property
    def text(self) -> str:
        """What was shown."""
        return "".join(self._texts)

    def add(self, token: int) -> str:
        """Take one token; what became readable with it.  Sets ``finish`` when it was the last."""
        self.tokens.append(token)
        ended, full = token in self._ends, len(self.tokens) >= self._limit
        text = "" if ended else self._stream.add(token)
        if ended or full:
            text += self._stream.end()
        shown = self._stops.add(text)
        if self._stops.found or ended:
            self.finish = "stop"
        elif full:
            self.finish = "length"
        if self.finish:
            shown += self._stops.end()
        self._texts.append(shown)
        return shown
