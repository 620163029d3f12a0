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
FIRST_WORDS = {
    "01-bees-to-mortgages": ["When a honeybee finds", "A mortgage is a"],
    "02-organs-to-cataracts": ["A pipe organ is", "The lens of the"],
    "03-cheese-to-version-control": ["Cheese is milk from", "Anyone who has saved"],
    "04-canal-to-tomatoes": ["The isthmus of Panama", "Tomatoes come from warm"],
    "05-mountain-walk-to-copyright": ["We left the last", "Copyright gives the author"],
    "06-stars-to-basketball": ["A star is a", "Basketball is one of"],
    "07-watercolor-to-plague": ["Watercolor is the most", "In October 1347 a"],
    "08-keys-to-penguins": ["For most of its", "The emperor penguin is"],
    "09-earthquakes-to-marathons-to-ledgers": [
        "The ground under our",
        "The marathon owes its",
        "Double-entry bookkeeping is a",
    ],
    "10-elevators-to-sleep-to-compost": [
        "Before there were safe",
        "Sleep looks like nothing",
        "A compost heap turns",
    ],
    "11-stage-to-eclipses-to-chocolate": [
        "Ruth unlocked the stage",
        "A total eclipse of",
        "Chocolate begins with a",
    ],
    "12-printing-to-jazz-to-salt-flats": [
        "Johannes Gutenberg did not",
        "A jazz musician who",
        "At seven in the",
    ],
}
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
    starts = [" ".join(passage.text[part.start :].split()[:4]) for part in parts]
    assert starts == FIRST_WORDS[passage.id]
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
    domains = {domain.name for domain in load_ontology().domains}
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


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"id": None}, "line 1 of .* needs an id and a text"),
        ({"id": ""}, "line 1 of .* needs an id and a text"),
        ({"text": 3}, "line 1 of .* needs an id and a text"),
        ({"topics": [{"name": "bees"}]}, "line 1 of .* needs topics: write"),
        ({"topics": "bees"}, "line 1 of .* needs topics: write"),
        ({"changes": None}, "line 1 of .* needs changes: a list of offsets"),
        ({"changes": [24.0]}, "line 1 of .* needs changes: a list of offsets"),
        ({"changes": [True]}, "line 1 of .* needs changes: a list of offsets"),
        ({"changes": []}, r"has 2 topic\(s\) and 0 change\(s\): .* one change less"),
        ({"changes": [], "topics": PLAIN["topics"][:1]}, r"1 topic\(s\) and 0 change\(s\)"),
        ({"changes": [0]}, "the change at character 0 of .* begins no paragraph"),
        ({"changes": [23]}, "the change at character 23 of .* begins no paragraph"),
        ({"changes": [25]}, "the change at character 25 of .* begins no paragraph"),
        ({"changes": [41]}, "the change at character 41 of .* begins no paragraph"),
        ({"changes": [-17]}, "the change at character -17 of .* begins no paragraph"),
        (
            {"changes": [24, 13], "topics": [*PLAIN["topics"], PLAIN["topics"][0]]},
            r"the changes \[24, 13\] of .* must rise",
        ),
        (
            {"topics": [PLAIN["topics"][0], {"name": "wasps", "domain": "zoology"}]},
            'goes from "bees" to "wasps", both of the domain zoology: give them different',
        ),
    ],
)
def test_a_malformed_passage(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    write_lines(tmp_path / "own.jsonl", [{**PLAIN, **changes}])
    with pytest.raises(ConfigError, match=problem):
        read_passages(tmp_path / "own.jsonl")


def test_a_file_without_passages_or_with_one_id_twice(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    write_lines(path, [])
    with pytest.raises(ConfigError, match="holds no passages"):
        read_passages(path)
    write_lines(path, [PLAIN, PLAIN])
    with pytest.raises(ConfigError, match=r'the id "own" in line 2 of .* is taken'):
        read_passages(path)
