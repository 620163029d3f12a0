"""The texts of ``bench quality``: sources, the two sets, slices, second topics."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import settings as checked
from hypothesis import strategies as st

from dart_llm.data import passages as drift_passages
from dart_llm.data import texts
from dart_llm.data.documents import Source, paragraphs, sources
from dart_llm.errors import ConfigError, UnknownName
from dart_llm.studies.quality.slices import (
    CONTINUATION,
    LEAD,
    SHIFT,
    Pair,
    Shape,
    Slice,
    cut,
    pairs,
)
from lm_cases import loaded
from quality_cases import PROMPT, SHAPE, TOKENS, bees, loans, read_pairs


class Letters:
    """One token per character; ``start``: a token before every text."""

    bos_token_id = 1

    def __init__(self, start: bool = False) -> None:
        self.start = start

    def __call__(self, text: str, add_special_tokens: bool = True, **more: object) -> dict:
        own = [1] if self.start and add_special_tokens else []
        return {"input_ids": own + [ord(character) for character in text]}


def words(ids: torch.Tensor) -> str:
    return "".join(map(chr, ids.tolist()))


# sets


@checked(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=0, max_size=40), st.integers(3, 25))
def test_the_sets_never_share_a_document(lengths: list[int], size: int) -> None:
    """Every document has letters of its own, so that slices say where they come from."""
    source = Source("s", tuple(chr(0x4E00 + n) * length for n, length in enumerate(lengths)))
    used = {}
    for which in ("choose", "report"):
        found = list(cut(source, which, Letters(), size))
        letters = {letter for one in found for letter in words(one.body)} - {"\n"}
        named = {place for one in found for place in one.documents}
        assert letters <= {source.documents[place][0] for place in named}
        assert all(len(one.body) == size for one in found)
        used[which] = named
        assert named <= {place for place, _ in source.half(which)}
    assert not used["choose"] & used["report"]
    halves = [len(source.half(which)) for which in ("choose", "report")]
    assert sum(halves) == len(lengths) and halves[1] - halves[0] in (0, 1)


def test_an_unknown_set_is_named() -> None:
    with pytest.raises(UnknownName, match="unknown set 'reprot'; did you mean report"):
        bees().half("reprot")


# slices


def test_long_documents_are_cut_and_short_ones_joined() -> None:
    source = Source("s", (*"----", "ab", "cdefghijklm", "op", "qr", "stuv"))
    found = [(words(one.body), one.documents) for one in cut(source, "report", Letters(), 5)]
    # c to m gives two whole slices; ab + \n\n + op is the first to fill one of the short ones
    assert found == [("cdefg", (5,)), ("hijkl", (5,)), ("ab\n\no", (4, 6, 7))]


def test_slices_are_evenly_spaced() -> None:
    half = Source("s", (*["-"] * 10, *(chr(97 + n) * 74 for n in range(10))))
    made = pairs([half], "report", Letters(), Shape(10, 9), 4)
    assert [words(pair.first.body)[0] for pair in made] == ["a", "d", "g", "j"]
    assert [pair.first.id for pair in made] == ["s/0", "s/1", "s/2", "s/3"]
    made = pairs([half], "report", Letters(), Shape(10, 9), 10)
    assert [words(pair.first.body)[0] for pair in made] == list("abcdefghij")
    made = pairs([half], "report", Letters(), Shape(10, 9), 1, shift=False)
    assert [words(pair.first.body)[0] for pair in made] == ["a"]


def test_windows_of_both_cells() -> None:
    first, second = (Slice(name, 0, torch.arange(140) + base, (0,)) for name, base in
                     (("a", 1000), ("b", 5000)))  # fmt: skip
    pair = Pair(first, second, (), Shape(70, 40))
    one = pair.window(CONTINUATION)
    assert one.ids.tolist() == list(range(1000, 1110)) and one.first == 70
    two = pair.window(SHIFT)
    assert two.ids.tolist() == [*range(1000, 1000 + 70 + LEAD), *range(5000, 5040)]
    assert (two.first, two.scored) == (70, LEAD + 40)
    pair = Pair(first, second, (7,), Shape(70, 40))  # a start token counts as one of the prompt's
    assert pair.window(CONTINUATION).ids.tolist() == [7, *range(1000, 1109)]
    assert pair.window(SHIFT).ids.tolist() == [7, *range(1000, 1069 + LEAD), *range(5000, 5040)]


def test_a_start_token_stands_before_every_slice_and_not_before_the_second_topic() -> None:
    made = pairs([bees(), loans()], "report", Letters(start=True), SHAPE, 2)
    for pair in made:
        assert len(pair.first.body) == SHAPE.size - 1
        for cell in (CONTINUATION, SHIFT):
            assert [n for n, one in enumerate(pair.window(cell).ids.tolist()) if one == 1] == [0]


def test_the_second_topic_is_the_next_source() -> None:
    made = read_pairs(2)
    assert [pair.first.id for pair in made] == ["bees/0", "bees/1", "loans/0", "loans/1"]
    assert [pair.second.id for pair in made] == ["loans/0", "loans/1", "bees/0", "bees/1"]
    ids = made[0].window(SHIFT).ids
    text = loaded()[1].decode(ids)
    assert text[: PROMPT + LEAD] in bees().documents[4]
    assert text[PROMPT + LEAD :] in loans().documents[12] and len(ids) == PROMPT + LEAD + TOKENS


def test_one_source_alone_takes_another_document() -> None:
    made = read_pairs(4, bees())
    for pair in made:
        assert not set(pair.first.documents) & set(pair.second.documents)
    single = Source("one", ("-", bees().documents[0] * 4))
    with pytest.raises(ConfigError, match='"one" is all there is, and no other slice of it is of'):
        read_pairs(2, single)
    made = pairs([single], "report", loaded()[1], SHAPE, 2, shift=False)
    assert [pair.first.id for pair in made] == ["one/0", "one/1"]


def test_too_little_text_says_how_much_there_is() -> None:
    words = (
        'the text "bees" has 8 slices of 134 tokens in its set report (the second half of 8 '
        "documents), fewer than the 9 wanted: give a longer text, or a smaller --slices, --tokens "
        "or --prompt-tokens"
    )
    with pytest.raises(ConfigError) as error:
        read_pairs(9, bees())
    assert str(error.value) == words
    with pytest.raises(ConfigError, match="has no slices of 134 tokens in its set choose"):
        pairs([bees(1)], "choose", loaded()[1], SHAPE, 1)


def test_of_the_embedded_texts_there_are_as_many_as_there_are() -> None:
    (source,) = sources(["embedded"])
    long = Shape(1800, 900)  # characters
    tokenizer = loaded()[1]
    there = len(list(cut(source, "report", tokenizer, 2700)))
    assert 1 < there < 16
    assert len(pairs([source], "report", tokenizer, long, None)) == there
    with pytest.raises(ConfigError, match=f"has {there} slices"):
        pairs([source], "report", tokenizer, long, 16)
    read = Source("other", source.documents)
    with pytest.raises(ConfigError, match="fewer than the 16 wanted"):
        pairs([read], "report", tokenizer, long, None)


# sources


def test_the_embedded_texts_are_in_both_sets() -> None:
    (source,) = sources(["embedded"])
    parts = [part.text for one in drift_passages.shipped() for part in one.segments()]
    assert len(source.documents) == len(texts.subjects()) + len(parts)
    assert set(source.documents) == {*map(texts.read, texts.subjects()), *parts}
    for which in ("choose", "report"):
        own = {text for _, text in source.half(which)}
        assert len(own & set(parts)) == 14
        assert len(own - set(parts)) == 3


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a\nb\n\nc\n \t\nd", ["a\nb", "c", "d"]),
        ("a\nb\nc", ["a", "b", "c"]),
        ("one", ["one"]),
        ("", []),
    ],
)
def test_paragraphs_or_lines(text: str, found: list[str]) -> None:
    assert paragraphs(text) == found


def test_files_become_sources(tmp_path: Path) -> None:
    plain, rows = tmp_path / "notes.txt", tmp_path / "rows.jsonl"
    plain.write_text("first\n\nsecond\n\n  \n", encoding="utf-8")
    lines = [{"page": "p1", "code": "c1"}, {"page": " ", "code": "c2"}]
    rows.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    found = sources([str(plain), str(rows), f"{rows}:code"])
    assert [(one.label, one.documents) for one in found] == [
        ("notes", ("first", "second")),
        ("rows", ("p1",)),
        ("rows:code", ("c1", "c2")),
    ]
    assert found[0].digest != Source("notes", ("firs", "tsecond")).digest


def test_what_is_no_source(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"body": "x"}\n', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"line 1 of .* but body: name the column, as in rows"):
        sources([str(rows)])
    with pytest.raises(ConfigError, match='has no text under "bdy", but body'):
        sources([f"{rows}:bdy"])
    with pytest.raises(ConfigError, match='the text "rows:body" was given twice'):
        sources([f"{rows}:body", f"{rows}:body"])
    with pytest.raises(ConfigError, match=r'no text "nothing\.txt"'):
        sources(["nothing.txt"])
    (tmp_path / "blank.txt").write_text("\n \n", encoding="utf-8")
    with pytest.raises(ConfigError, match="holds nothing"):
        sources([str(tmp_path / "blank.txt")])
