"""Windows: whole sentences where they fit, nothing lost, nothing beyond the limit."""

from __future__ import annotations

import pytest

from dart_llm.errors import ConfigError
from dart_llm.evaluation.encoders import windows
from encoders import count_words


def test_a_text_that_fits_stays_as_it_is() -> None:
    text = "  One two.\n\nThree  four.  "
    assert windows(text, count_words, 4) == ["One two.\n\nThree  four."]
    assert windows(text, count_words, None) == ["One two.\n\nThree  four."]


@pytest.mark.parametrize("text", ["", " \n\t "])
def test_empty_text_has_no_window(text: str) -> None:
    assert windows(text, count_words, 5) == []


def test_sentences_are_packed_in_their_order() -> None:
    text = "One two. Three four five. Six. Seven eight. Nine."
    assert windows(text, count_words, 5) == [
        "One two. Three four five.",
        "Six. Seven eight. Nine.",
    ]
    assert windows(text, count_words, 4) == [
        "One two.",
        "Three four five. Six.",
        "Seven eight. Nine.",
    ]


def test_a_long_sentence_is_cut_at_words() -> None:
    words = [f"w{i}" for i in range(23)]
    found = windows(" ".join(words), count_words, 5)
    assert [word for piece in found for word in piece.split()] == words
    assert max(map(count_words, found)) <= 5


def test_a_long_word_is_cut_in_characters() -> None:
    found = windows("x" * 30 + "y", len, 8)
    assert "".join(found) == "x" * 30 + "y"
    assert max(map(len, found)) <= 8


def test_a_character_that_fits_nowhere_ends_the_cutting() -> None:
    assert windows("ab", lambda text: 3 * len(text), 2) == ["a", "b"]


@pytest.mark.parametrize("limit", [0, -1])
def test_a_window_without_room_is_refused(limit: int) -> None:
    with pytest.raises(ConfigError, match=f"at least 1 token, not {limit}"):
        windows("one", count_words, limit)
