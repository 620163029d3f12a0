"""An answer on a terminal while it is written: lines end between words."""

from __future__ import annotations

import re
from collections.abc import Callable

from rich.cells import cell_len

PIECES = re.compile(r"\n|\s|[^\s\u2e80-\uffef\U00020000-\U0003ffff]+|.")
"""Line breaks, spaces, words; a letter that needs no space beside it (Chinese, ...) is a word."""


class Wrapped:
    """Takes a text in pieces; a word is written when it has ended.

    ``write`` gets what to show; ``width``: columns of the terminal, asked for with every word.
    """

    def __init__(self, write: Callable[[str], None], width: Callable[[], int]) -> None:
        self._write, self._width = write, width
        self._column = 0
        self._gap = self._word = ""

    def add(self, text: str) -> None:
        """More of the text."""
        pieces = PIECES.findall(self._word + text)
        self._word = ""
        last = pieces.pop() if pieces and self._goes_on(pieces[-1]) else ""
        for piece in pieces:
            self._piece(piece)
        self._word = last

    def end(self) -> None:
        """Nothing more comes."""
        word, self._word = self._word, ""
        if word:
            self._piece(word)

    def _goes_on(self, piece: str) -> bool:
        """Whether the next text may belong to this piece; one that fills a line is not awaited."""
        return not piece.isspace() and cell_len(piece) < self._width()

    def _piece(self, piece: str) -> None:
        if piece == "\n":
            self._write("\n")
            self._column, self._gap = 0, ""
        elif piece.isspace():
            self._gap += piece
        else:
            self._place(piece)

    def _place(self, word: str) -> None:
        size = cell_len(self._gap + word)
        if self._column and self._column + size > self._width():
            self._write("\n")
            self._column, self._gap, size = 0, "", cell_len(word)
        self._write(self._gap + word)
        self._column += size
        if self._column > self._width():  # a word longer than a line, which the terminal broke
            self._column %= self._width()
        self._gap = ""
