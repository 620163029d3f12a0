"""Text while tokens arrive: whole characters, and nothing of a stop string."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dart_llm.engine.decoding import HALF, Pieces, StopFinder, TextStream
from engine_cases import tokenizer
from tiny import VOCAB

TEXTS = st.text("abc", max_size=30)
STOPS = st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=4)
IDS = st.lists(st.integers(0, VOCAB - 1), max_size=40)


def first_end(text: str, stops: list[str]) -> tuple[int, int] | None:
    """End and beginning of the stop string that is complete first, the longest of several."""
    found = [
        (end, end - len(stop))
        for end in range(len(text) + 1)
        for stop in stops
        if text[:end].endswith(stop)
    ]
    return min(found, default=None)


@settings(deadline=None)
@given(TEXTS, STOPS, st.data())
def test_stop_strings_do_not_depend_on_how_a_text_is_cut(text, stops, data) -> None:
    finder, shown, rest = StopFinder(stops), "", text
    while rest and not finder.found:
        cut = data.draw(st.integers(1, len(rest)))
        shown += finder.add(rest[:cut])
        rest = rest[cut:]
        seen = text[: len(text) - len(rest)]
        if not finder.found:
            # nothing that may belong to a stop string, and nothing more than that, is held back
            begun = {stop[:n] for stop in stops for n in range(1, len(stop))}
            held = seen[len(shown) :]
            longest = max(
                n for n in range(len(seen) + 1) if seen[len(seen) - n :] in begun or not n
            )
            assert seen.startswith(shown) and len(held) == longest
    end = first_end(text, stops)
    assert finder.found == (end is not None)
    if end is None:
        assert shown + finder.end() == text
    else:
        assert shown == text[: end[1]] and finder.end() == ""


@settings(deadline=None)
@given(TEXTS)
def test_without_stop_strings_nothing_is_held_back(text) -> None:
    finder = StopFinder(())
    assert finder.add(text) == text and finder.end() == "" and not finder.found


@settings(deadline=None)
@given(IDS)
def test_streamed_text_is_the_decoded_one(ids) -> None:
    stream = TextStream(tokenizer())
    parts = [stream.add(token) for token in ids]
    shown = "".join(parts)
    whole = tokenizer().decode(ids, skip_special_tokens=True)
    assert whole.startswith(shown)
    assert not shown.endswith(HALF) and shown + stream.end() == whole


@pytest.mark.parametrize("text", ["été", "über ö", "plain"])
def test_a_character_comes_when_it_is_whole(text: str) -> None:
    stream, shown = TextStream(tokenizer()), ""
    for token in tokenizer()(text).input_ids:
        shown += stream.add(token)
        assert text.startswith(shown)
    assert shown == text and stream.end() == ""


def test_pieces_of_a_prompt() -> None:
    pieces = Pieces(tokenizer())
    ids = tokenizer()("<s>é b</s>").input_ids
    assert pieces.of(ids) == ["<s>", "", "é", " ", "b", "</s>"]
    assert pieces[ids[0]] == "<s>" and pieces[ids[1]] == HALF
    assert pieces.of(ids[:2]) == ["<s>", HALF]


@settings(deadline=None)
@given(IDS)
def test_pieces_are_the_whole_text(ids) -> None:
    pieces = Pieces(tokenizer()).of(ids)
    assert len(pieces) == len(ids)
    if HALF not in (whole := tokenizer().decode(ids)):
        assert "".join(pieces) == whole
