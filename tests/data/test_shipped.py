"""What is shipped: texts, prompts, openings and passages; passages and prompts of one's own."""

import hashlib
import json
import subprocess
import sys
from importlib import resources

import pytest

from dart_llm.data import texts, topic_prompts
from dart_llm.data.passages import Passage, Segment, Topic, read_passages, shipped
from dart_llm.errors import ConfigError, UnknownName
from dart_llm.files import write_lines
from shells import ROOT

SUBJECTS = ("aqueduct", "bicycle", "bread", "court", "immunity", "tides")
PROMPTS = tuple("arithmetic code continue letter sky story summary two_topics".split())
PASSAGES = shipped()
FROZEN = {
    "texts": "3b3843426e01780d",
    "prompts": "8b4d3cf248bf4028",
    "openings": "c9fd726398486dc6",
    "passages": "a15012363fce4502",
    "two-topic prompts": "738940215a3967cb",
}
"""sha256 of what is shipped: published numbers were measured on it."""


def test_what_is_shipped_never_changes():
    found = {
        "texts": texts.all_text(),
        "prompts": "".join(map(texts.read_prompt, PROMPTS)),
        "openings": "".join(texts.openings()),
        "passages": json.dumps([passage.to_dict() for passage in PASSAGES]),
        "two-topic prompts": json.dumps([one.to_dict() for one in topic_prompts.shipped()]),
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


SCRIPT = ROOT / "benchmarks/make_prompts.py"
ONTOLOGY = """
domains:
  law: {field: law, expert: a judge, place: a court, singular: [a trial], plural: [patents]}
  sea: {field: seafaring, expert: an admiral, place: a port, singular: [the compass]}
templates: {plain: "{Topic_a} {is_a} for {expert_a}: why {it_a}? {Place_b}, {topic_b}, {word}."}
choices: {word: [so]}
"""


def make(*arguments):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_shipped_prompts_are_what_the_script_makes(tmp_path):
    data = resources.files("dart_llm.data") / "shipped" / "drift" / "prompts.jsonl"
    assert make(480).stdout == data.read_text(encoding="utf-8")
    assert make(3).stdout == "".join(data.read_text(encoding="utf-8").splitlines(True)[:3])
    ontology = tmp_path / "own.yaml"
    ontology.write_text(ONTOLOGY)
    made = [json.loads(line) for line in make(4, "--ontology", ontology).stdout.splitlines()]
    assert {prompt["text"] for prompt in made} == {
        "A trial is for a judge: why it? A port, the compass, so.",
        "Patents are for a judge: why they? A port, the compass, so.",
        "The compass is for an admiral: why it? A court, a trial, so.",
        "The compass is for an admiral: why it? A court, patents, so.",
    }
    assert "gives 4 prompts at most" in make(5, "--ontology", ontology).stderr


@pytest.mark.contract("every parser round-trips")
def test_prompts_are_written_and_read_back(tmp_path):
    path, prompts = tmp_path / "own.jsonl", topic_prompts.shipped()[:30]
    write_lines(path, [prompt.to_dict() for prompt in prompts])
    assert topic_prompts.read_prompts(path) == prompts
    path.write_text('{"text": "a"}\n\n{"text": "b", "id": 7}\n')  # only a text is needed
    assert topic_prompts.read_prompts(path) == [
        topic_prompts.DriftPrompt("1", "a"),
        topic_prompts.DriftPrompt("7", "b"),
    ]
    for line, problem in (
        ("", "the file .* is empty"),
        ("{", "line 1 of .* is not JSON"),
        ('{"text": " "}', 'the prompt "1" has no text'),
        ('{"text": "a", "domains": ["law", "law"]}', "needs two different domains, not law and"),
        ('{"text": "a", "id": "x"}\n{"text": "b", "id": "x"}', 'id "x" in line 2 of .* is taken'),
    ):
        path.write_text(line)
        with pytest.raises(ConfigError, match=problem):
            topic_prompts.read_prompts(path)
