"""The long passages: their sizes, the places where their topics change, and files of one's own."""

from __future__ import annotations

import json
import re
from collections import Counter
from importlib import resources
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from dart_llm.data import texts
from dart_llm.data.passages import Passage, Segment, Topic, read_passages, shipped
from dart_llm.data.topic_prompts import load_ontology
from dart_llm.errors import ConfigError
from dart_llm.files import write_lines

PASSAGES = shipped()
SEGMENTS = [segment for passage in PASSAGES for segment in passage.segments()]
FOLDER = resources.files("dart_llm.data") / "shipped" / "drift" / "passages"
FIRST_WORDS = dict(
    line.split(": ")
    for line in """\
01-bees-to-mortgages: When a / A mortgage
02-organs-to-cataracts: A pipe / The lens
03-cheese-to-version-control: Cheese is / Anyone who
04-canal-to-tomatoes: The isthmus / Tomatoes come
05-mountain-walk-to-copyright: We left / Copyright gives
06-stars-to-basketball: A star / Basketball is
07-watercolor-to-plague: Watercolor is / In October
08-keys-to-penguins: For most / The emperor
09-earthquakes-to-marathons-to-ledgers: The ground / The marathon / Double-entry bookkeeping
10-elevators-to-sleep-to-compost: Before there / Sleep looks / A compost
11-stage-to-eclipses-to-chocolate: Ruth unlocked / A total / Chocolate begins
12-printing-to-jazz-to-salt-flats: Johannes Gutenberg / A jazz / At seven""".splitlines()
)
"""The words that a reader finds where a topic begins."""
PLAIN = {
    "id": "own",
    "text": "Bees dance.\n\nThey fly.\n\nLoans cost money.",
    "topics": [{"name": "bees", "domain": "zoology"}, {"name": "loans", "domain": "finance"}],
    "changes": [24],
}
COMMON = set(
    """
    about after again also always another because become been before begin begins between both
    called cannot come comes could different does down each enough even every first from give gives
    goes have hold holds hundred into just keep kept kind known large last left less like little
    long made make makes many more most much must never next none nothing often only other others
    over part people place same several short should since small some still such takes than that
    their them then there these they thing this those thousand three through time times took turn
    turns under until used usually very were what when where which while whole whose with within
    without would year years
    """.split()
)


def sentences(text: str) -> list[str]:
    return [part for part in re.split(r"(?<=[.?!])\s+", text) if part]


def content_words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]{4,}", text.lower())) - COMMON


def test_there_are_eight_of_two_topics_and_four_of_three() -> None:
    assert [passage.id for passage in PASSAGES] == list(FIRST_WORDS)
    assert Counter(len(passage.topics) for passage in PASSAGES) == {2: 8, 3: 4}
    files = {entry.name for entry in FOLDER.iterdir()}
    assert files == {f"{passage.id}.txt" for passage in PASSAGES} | {"index.jsonl"}


@pytest.mark.parametrize("passage", PASSAGES, ids=lambda passage: passage.id)
def test_parts_are_long_enough_and_begin_where_the_index_says(passage: Passage) -> None:
    parts = passage.segments()
    sizes = [len(part.text.split()) for part in parts]
    assert min(sizes[:-1]) >= 460
    assert sizes[-1] >= 320
    assert max(sizes) <= 600
    starts = [" ".join(passage.text[part.start :].split()[:2]) for part in parts]
    assert " / ".join(starts) == FIRST_WORDS[passage.id]
    assert [part.start for part in parts] == [0, *passage.changes]
    assert all(passage.text[offset - 2 : offset] == "\n\n" for offset in passage.changes)
    assert "\n\n".join(part.text for part in parts) == passage.text


@pytest.mark.parametrize("passage", PASSAGES, ids=lambda passage: passage.id)
def test_a_passage_is_plain_paragraphs(passage: Passage) -> None:
    assert passage.text == passage.text.strip() and passage.text.isascii()
    for paragraph in passage.text.split("\n\n"):
        assert paragraph == " ".join(paragraph.split())
        assert paragraph[0].isupper() and paragraph[-1] == "."
        assert 60 <= len(paragraph.split()) <= 170
    assert passage.text.count('"') % 2 == 0


def test_no_sentence_occurs_twice_anywhere() -> None:
    known = Counter(
        sentence
        for text in [*(passage.text for passage in PASSAGES), texts.all_text()]
        for sentence in sentences(text)
    )
    assert len(known) > 900
    assert [sentence for sentence, count in known.items() if count > 1] == []


def test_no_phrase_of_eight_words_occurs_twice() -> None:
    runs = Counter[str]()
    for passage in PASSAGES:
        words = re.findall(r"[\w'-]+", passage.text.lower())
        runs.update(" ".join(words[n : n + 8]) for n in range(len(words) - 7))
    assert max(runs.values()) == 1


def test_topics_are_all_different_and_cover_every_domain() -> None:
    domains = set(load_ontology().domains)
    assert len(SEGMENTS) == 28 == len({segment.topic.name for segment in SEGMENTS})
    assert {segment.topic.domain for segment in SEGMENTS} == domains
    for passage in PASSAGES:
        assert len(set(passage.domains)) == len(passage.topics)


@pytest.mark.parametrize("passage", PASSAGES, ids=lambda passage: passage.id)
def test_topics_of_a_passage_share_few_words(passage: Passage) -> None:
    for one, other in combinations(map(content_words, (s.text for s in passage.segments())), 2):
        assert len(one & other) / len(one | other) < 0.11


def test_segments_and_json() -> None:
    topics = (Topic("bees", "zoology"), Topic("loans", "finance"))
    passage = Passage("own", PLAIN["text"], topics, (24,))
    assert passage.segments() == [
        Segment(topics[0], 0, 24, "Bees dance.\n\nThey fly."),
        Segment(topics[1], 24, 41, "Loans cost money."),
    ]
    assert passage.domains == ("zoology", "finance")
    assert json.loads(json.dumps(passage.to_dict())) == PLAIN


def test_passages_are_written_and_read_back(tmp_path: Path) -> None:
    write_lines(tmp_path / "own.jsonl", [passage.to_dict() for passage in PASSAGES])
    assert read_passages(tmp_path / "own.jsonl") == PASSAGES


THREE_TOPICS = [*PLAIN["topics"], PLAIN["topics"][0]]
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"id": None}, "line 1 of .*, id: is None, which is not text"),
    ({"id": ""}, "line 1 of .*, id: "),
    ({"text": 3}, "line 1 of .*, text: is 3"),
    ({"topics": [{"name": "bees"}]}, "line 1 of .*, topics.0.domain: is missing"),
    ({"topics": "bees"}, "line 1 of .*, topics: must be a list"),
    ({"changes": None}, "line 1 of .*, changes: must be a list"),
    ({"changes": [24.0]}, "line 1 of .*, changes.0: .* integer"),
    ({"changes": [True]}, "line 1 of .*, changes.0: .* integer"),
    ({"changes": []}, r"has 2 topic\(s\) and 0 change\(s\): .* one change less"),
    ({"changes": [], "topics": PLAIN["topics"][:1]}, r"1 topic\(s\) and 0 change\(s\)"),
    *(
        ({"changes": [at]}, f"the change at character {at} of .* begins no paragraph")
        for at in (0, 23, 25, 41, -17)
    ),
    ({"changes": [24, 13], "topics": THREE_TOPICS}, r"the changes \[24, 13\] of .* must rise"),
    (
        {"topics": [PLAIN["topics"][0], {"name": "wasps", "domain": "zoology"}]},
        'goes from "bees" to "wasps", both of the domain zoology: give them different',
    ),
]


@pytest.mark.parametrize(("changes", "problem"), REFUSED)
def test_a_malformed_passage(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    write_lines(tmp_path / "own.jsonl", [{**PLAIN, **changes}])
    with pytest.raises(ConfigError, match=problem):
        read_passages(tmp_path / "own.jsonl")


def test_a_file_without_passages_or_with_one_id_twice(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    write_lines(path, [])
    with pytest.raises(ConfigError, match="is empty: it holds no"):
        read_passages(path)
    write_lines(path, [PLAIN, PLAIN])
    with pytest.raises(ConfigError, match=r'the id "own" in line 2 of .* is taken'):
        read_passages(path)
