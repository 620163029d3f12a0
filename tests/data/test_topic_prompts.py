"""Two-topic prompts: the generator, the package's prompts, and ontologies of one's own."""

import copy
import json
from collections import Counter
from importlib import resources

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dart_llm.data.topic_prompts import (
    SHIPPED,
    DriftPrompt,
    Item,
    generate,
    load_ontology,
    maximum,
    read_prompts,
    shipped,
)
from dart_llm.errors import ConfigError
from dart_llm.files import write_lines

FOLDER = resources.files("dart_llm.data") / "shipped" / "drift"
OWN = load_ontology()
OWNER = {item.name: name for name, domain in OWN.domains.items() for item in domain.items}


def test_the_shipped_prompts_are_what_the_generator_makes():
    made = generate(SHIPPED, 0)
    lines = [json.dumps(prompt.to_dict()) + "\n" for prompt in made]
    assert (FOLDER / "prompts.jsonl").read_bytes() == "".join(lines).encode("ascii")
    assert shipped() == made


def test_the_shipped_set_is_large_and_even_and_changes_its_domain():
    prompts = shipped()
    assert len(prompts) == SHIPPED == 480
    assert len({prompt.id for prompt in prompts}) == len({prompt.text for prompt in prompts}) == 480
    assert set(Counter(prompt.template for prompt in prompts).values()) == {20}
    assert maximum(OWN) == 24 * (224 * 210)
    pairs = Counter(prompt.domains for prompt in prompts)
    assert len(pairs) == 16 * 15 and set(pairs.values()) == {2}
    topics = Counter(prompt.slots[f"topic_{side}"] for prompt in prompts for side in "ab")
    assert set(topics) == set(OWNER) and set(topics.values()) == {4, 5}


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**64), st.integers(1, 200), st.integers(1, 200))
def test_any_seed_and_count(seed, count, fewer):
    prompts = generate(count, seed, OWN)
    assert count == len({prompt.text for prompt in prompts}) == len({one.id for one in prompts})
    assert prompts[:fewer] == generate(min(fewer, count), seed, OWN)
    for prompt in prompts:
        one, other = prompt.slots["topic_a"], prompt.slots["topic_b"]
        assert (OWNER[one], OWNER[other]) == prompt.domains and OWNER[one] != OWNER[other]
        assert "{" not in prompt.text and one in prompt.text and other in prompt.text


def test_what_cannot_be_generated():
    for count, seed, problem in (
        (0, 0, "gives 1128960 prompts at most, .* ask for 1 to 1128960, not 0$"),
        (1_128_961, 0, "not 1128961$"),
        (5, -3, "the seed -3 is negative: give 0 or more"),
    ):
        with pytest.raises(ConfigError, match=problem):
            generate(count, seed)


@pytest.mark.contract("every parser round-trips")
def test_prompts_are_written_and_read_back(tmp_path):
    path, prompts = tmp_path / "own.jsonl", generate(30, 3)
    write_lines(path, [prompt.to_dict() for prompt in prompts])
    assert read_prompts(path) == prompts
    path.write_text('{"text": "a"}\n\n{"text": "b", "id": 7}\n')  # only a text is needed
    assert read_prompts(path) == [DriftPrompt("1", "a"), DriftPrompt("7", "b")]
    for line, problem in (
        ("", "the file .* is empty"),
        ("{", "line 1 of .* is not JSON"),
        ('{"text": " "}', 'the prompt "1" has no text'),
        ('{"text": "a", "domains": ["law", "law"]}', "needs two different domains, not law and"),
        ('{"text": "a", "id": "x"}\n{"text": "b", "id": "x"}', 'id "x" in line 2 of .* is taken'),
    ):
        path.write_text(line)
        with pytest.raises(ConfigError, match=problem):
            read_prompts(path)


DOMAINS = yaml.safe_load("""
law: {field: law, expert: a judge, place: a court, singular: [a trial], plural: [patents, wills]}
sea: {field: seafaring, expert: an admiral, place: a port, singular: ["the  compass"]}
""")
PLAIN = "{Topic_a} {is_a} for {expert_a}: why {it_a}? {Place_b}, {them_b}, {topic_b}, {word}."


def load(folder, data):
    path = folder / "own.yaml"
    text = data if isinstance(data, str) else yaml.safe_dump(data, sort_keys=False)
    path.write_text(text, encoding="utf-8")
    return load_ontology(path)


def changed(place="", value=None, **more):
    """A sound ontology with a change such as ("law.plural", [])."""
    data = {"domains": copy.deepcopy(DOMAINS), **more}
    if place:
        domain, _, key = place.partition(".")
        data["domains"][domain][key] = value
    return data


def template(text, **more):
    return changed(templates={"mine": text}, **more)


def test_domains_templates_and_choices_of_ones_own(tmp_path):
    ontology = load(tmp_path, changed(choices={"reader": ["a judge"]}))
    law, sea = ontology.domains.values()
    assert (law.field, law.expert, law.place) == ("law", "a judge", "a court")
    assert law.items == (Item("a trial", False), Item("patents", True), Item("wills", True))
    assert sea.items == (Item("the compass", False),)
    assert ontology.templates == OWN.templates and maximum(ontology) == 24 * 6
    made = generate(144, 0, ontology)
    assert {prompt.domains for prompt in made} == {("law", "sea"), ("sea", "law")}
    own = changed(templates={"plain": PLAIN}, choices={"word": ["so"]})
    prompts = generate(6, 0, load(tmp_path, own))
    assert {prompt.text for prompt in prompts} == {
        "A trial is for a judge: why it? A port, it, the compass, so.",
        "Patents are for a judge: why they? A port, it, the compass, so.",
        "Wills are for a judge: why they? A port, it, the compass, so.",
        "The compass is for an admiral: why it? A court, it, a trial, so.",
        "The compass is for an admiral: why it? A court, them, patents, so.",
        "The compass is for an admiral: why it? A court, them, wills, so.",
    }


REFUSED = [
    ("domains: [", "cannot read the ontology file .*own.yaml: while parsing"),
    ("- law", 'own.yaml needs "domains:" with names'),
    ("domains:\n  law: {}\n  law: {}\n", 'the name "law" is given twice.* line 3'),
    ("domains:\n  1: {}\n  2: {}\n", "own.yaml, domains.1.*: is 1, which is not text: write a ph"),
    ({"domain": DOMAINS}, "own.yaml, domains: is missing"),
    ({"domains": DOMAINS, "template": {}}, "unknown key in .*'template'; did you mean templates"),
    ({"domains": {"law": DOMAINS["law"]}}, "domains: a change of topic needs two domains or more"),
    (template("About {topic_a}."), r'"mine" lacks the slot \{topic_b\}: it needs both topics'),
    (template("{topic_a} {topic_b} {topics_a}"), "\"mine\": .*'topics_a'; did you mean topic_a"),
    (template("{topic_a} {topic_b!r}"), '"mine": has a format in the slot "topic_b"'),
    (template(PLAIN, choices={"word": []}), "choices.word: is empty: list at least one"),
    (template(PLAIN, choices={"topic_a": ["so"]}), 'choices: "topic_a" cannot be a slot'),
]


def test_a_malformed_ontology(tmp_path):
    for data, problem in REFUSED:
        with pytest.raises(ConfigError, match=problem) as caught:
            load(tmp_path, data)
        assert "\n" not in str(caught.value) and "own.yaml" in str(caught.value)
    with pytest.raises(ConfigError, match=r"cannot read the ontology file .*none.yaml"):
        load_ontology(tmp_path / "none.yaml")
