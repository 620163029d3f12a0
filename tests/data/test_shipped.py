"""What is shipped: texts, prompts, openings and passages; passages of one's own."""

import hashlib
import json
import re
from collections import Counter

import pytest

from dart_llm.data import texts, topic_prompts
from dart_llm.data.passages import Passage, Segment, Topic, read_passages, shipped
from dart_llm.errors import ConfigError, UnknownName
from dart_llm.files import write_lines

SUBJECTS = ("aqueduct", "bicycle", "bread", "court", "immunity", "tides")
PROMPTS = tuple("arithmetic code continue letter sky story summary two_topics".split())
PASSAGES = shipped()
FROZEN = {
    "texts": "3b3843426e01780d",
    "prompts": "8b4d3cf248bf4028",
    "openings": "c9fd726398486dc6",
    "passages": "76504e183ca6eac8",
}
"""sha256 of what is shipped: published numbers were measured on it."""


def runs(text, words=8):
    """All runs of so many words."""
    found = re.findall(r"[\w'-]+", text.lower())
    return [" ".join(found[at : at + words]) for at in range(len(found) - words + 1)]


def test_what_is_shipped_never_changes():
    found = {
        "texts": texts.all_text(),
        "prompts": "".join(map(texts.read_prompt, PROMPTS)),
        "openings": "".join(texts.openings()),
        "passages": "".join(passage.text for passage in PASSAGES),
    }
    digests = {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in found.items()}
    assert digests == FROZEN
    assert texts.subjects() == SUBJECTS and texts.prompt_names() == PROMPTS
    assert texts.all_text() == "\n\n".join(map(texts.read, SUBJECTS))


def test_names_of_texts_and_prompts():
    assert texts.read_prompt("sky") == "Why is the sky blue?"
    with pytest.raises(UnknownName, match="unknown prompt 'storry'; did you mean story"):
        texts.read_prompt("storry")
    for name in ("", "prompts/sky", "../errors", "tides.txt"):  # a name is not a path
        with pytest.raises(UnknownName):
            texts.read(name)


def test_nothing_is_shipped_twice():
    """Nor do openings share eight words in a row with a text that is evaluated."""
    every = Counter(run for passage in PASSAGES for run in runs(passage.text))
    assert max(every.values()) == 1
    long = [*map(texts.read, SUBJECTS), *map(texts.read_prompt, PROMPTS)]
    long += [prompt.text for prompt in topic_prompts.shipped()]
    every.update(run for text in long for run in runs(text))
    openings = texts.openings()
    assert len(openings) == len(set(openings)) == 32
    assert not any(run in every for opening in openings for run in runs(opening))


def test_passages_change_their_topic_where_the_index_says():
    begins = {passage.id: passage.segments() for passage in PASSAGES}
    assert [len(parts) for parts in begins.values()] == [2] * 8 + [3] * 4
    for passage in PASSAGES:
        parts = begins[passage.id]
        assert [part.start for part in parts] == [0, *passage.changes]
        assert "\n\n".join(part.text for part in parts) == passage.text
        assert min(len(part.text.split()) for part in parts) >= 320
    topics = [topic for passage in PASSAGES for topic in passage.topics]
    assert len(topics) == 28 == len({topic.name for topic in topics})
    domains = {domain for prompt in topic_prompts.shipped() for domain in prompt.domains}
    assert {topic.domain for topic in topics} == domains and len(domains) == 16


PLAIN = {
    "id": "own",
    "text": "Bees dance.\n\nThey fly.\n\nLoans cost money.",
    "topics": [{"name": "bees", "domain": "zoology"}, {"name": "loans", "domain": "finance"}],
    "changes": [24],
}
BEES = PLAIN["topics"][0]
WASPS = {"name": "wasps", "domain": "zoology"}
REFUSED = [
    ({"id": None}, "line 1 of .*, id: is None, which is not text"),
    ({"topics": [{"name": "bees"}]}, "line 1 of .*, topics.0.domain: is missing"),
    ({"changes": []}, r"has 2 topic\(s\) and 0 change\(s\): .* one change less"),
    *(
        ({"changes": [at]}, f"the change at character {at} of .* begins no paragraph")
        for at in (0, 23, 25, 41, -17)
    ),
    ({"topics": [BEES, WASPS]}, 'goes from "bees" to "wasps", both of the domain zoology: give'),
]


@pytest.mark.contract("every parser round-trips")
def test_passages_of_ones_own(tmp_path):
    path = tmp_path / "own.jsonl"
    write_lines(path, [passage.to_dict() for passage in PASSAGES])
    assert read_passages(path) == PASSAGES
    topics = (Topic("bees", "zoology"), Topic("loans", "finance"))
    passage = Passage("own", PLAIN["text"], topics, (24,))
    assert passage.segments() == [
        Segment(topics[0], 0, 24, "Bees dance.\n\nThey fly."),
        Segment(topics[1], 24, 41, "Loans cost money."),
    ]
    assert passage.domains == ("zoology", "finance")
    assert json.loads(json.dumps(passage.to_dict())) == PLAIN
    refused = [([{**PLAIN, **changes}], problem) for changes, problem in REFUSED]
    refused += [([], "is empty: it has no"), ([PLAIN] * 2, 'the id "own" in line 2 of .* is tak')]
    for rows, problem in refused:
        write_lines(path, rows)
        with pytest.raises(ConfigError, match=problem):
            read_passages(path)
