"""Ontologies and templates of two-topic prompts: files of one's own, and what is wrong in them."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from dart_llm.data.topic_prompts import Domain, Item, generate, load_ontology, maximum
from dart_llm.errors import ConfigError, DartError, UnknownName

DOMAINS: dict[str, Any] = {
    "law": {
        "field": "law",
        "expert": "a judge",
        "place": "a court",
        "singular": ["a trial"],
        "plural": ["patents", "wills"],
    },
    "sea": {
        "field": "seafaring",
        "expert": "an admiral",
        "place": "a port",
        "singular": ["the  compass"],
    },
}
PLAIN = "{Topic_a} {is_a} for {expert_a}: why {it_a}? {Place_b}, {them_b}, {topic_b}, {word}."


def write(folder: Path, data: Any) -> Path:
    path = folder / "own.yaml"
    text = data if isinstance(data, str) else yaml.safe_dump(data, sort_keys=False)
    path.write_text(text, encoding="utf-8")
    return path


def changed(*changes: tuple[str, Any]) -> dict[str, Any]:
    """A sound ontology with changes such as ``("law.plural", [])``; None removes."""
    data: dict[str, Any] = {"domains": copy.deepcopy(DOMAINS)}
    for place, value in changes:
        *path, last = place.split(".")
        target = data["domains"]
        for name in path:
            target = target[name]
        target[last] = value
        if value is None:
            del target[last]
    return data


def test_domains_of_ones_own_with_the_templates_of_the_package(tmp_path: Path) -> None:
    ontology = load_ontology(write(tmp_path, changed()))
    assert ontology.domains == (
        Domain(
            "law",
            "law",
            "a judge",
            "a court",
            (Item("a trial", False), Item("patents", True), Item("wills", True)),
        ),
        Domain("sea", "seafaring", "an admiral", "a port", (Item("the compass", False),)),
    )
    assert ontology.templates == load_ontology().templates
    assert maximum(ontology) == 24 * 6
    assert {prompt.domains for prompt in generate(144, 0, ontology)} == {
        ("law", "sea"),
        ("sea", "law"),
    }


def test_templates_of_ones_own(tmp_path: Path) -> None:
    data = {**changed(), "templates": {"plain": PLAIN}, "choices": {"word": ["so"]}}
    ontology = load_ontology(write(tmp_path, data))
    assert ontology.templates[0].slots == (
        "expert_a",
        "is_a",
        "it_a",
        "place_b",
        "them_b",
        "topic_a",
        "topic_b",
        "word",
    )
    assert {prompt.text for prompt in generate(6, 0, ontology)} == {
        "A trial is for a judge: why it? A port, it, the compass, so.",
        "Patents are for a judge: why they? A port, it, the compass, so.",
        "Wills are for a judge: why they? A port, it, the compass, so.",
        "The compass is for an admiral: why it? A court, it, a trial, so.",
        "The compass is for an admiral: why it? A court, them, patents, so.",
        "The compass is for an admiral: why it? A court, them, wills, so.",
    }
    first = generate(6, 0, ontology)[0]
    assert set(first.slots) == set(ontology.templates[0].slots)
    assert first.slots["word"] == "so"


def test_choices_of_ones_own_for_the_templates_of_the_package(tmp_path: Path) -> None:
    data = {**changed(), "choices": {"reader": ["a judge"]}}
    made = generate(144, 0, load_ontology(write(tmp_path, data)))
    essays = [prompt for prompt in made if prompt.template == "essay"]
    assert len(essays) == 6
    assert all("to a judge. The" in prompt.text for prompt in essays)
    assert {prompt.slots["words"] for prompt in made if "words" in prompt.slots} == {
        "150",
        "200",
        "250",
        "300",
    }


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ("domains: [", "cannot read the ontology file .*own.yaml: while parsing"),
        ("- law", 'own.yaml needs "domains:" with names'),
        ("", 'own.yaml needs "domains:" with names'),
        ({"domain": DOMAINS}, "unknown key in .*own.yaml: 'domain'; did you mean domains"),
        ({"domains": ["law"]}, 'own.yaml needs "domains:" with names and values'),
        ({"domains": {"law": DOMAINS["law"]}}, r"own.yaml has 1 domain\(s\): .* two or more"),
        (changed(("sea", "water")), "the domain sea in .*own.yaml needs names and values"),
        (changed(("law.expert", None)), "the expert of the domain law in .*own.yaml is missing"),
        (changed(("law.field", " ")), "the field of the domain law in .* is empty"),
        (changed(("law.experts", "a")), "unknown key in the domain law .*; did you mean expert"),
        (changed(("law.plural", "wills")), '"plural" of the domain law .* must be a list'),
        (changed(("sea.singular", [])), "the domain sea in .* has no items"),
        (changed(("sea.singular", [1984])), "item under singular of the domain sea .* is 1984,"),
        (changed(("sea.singular", [False])), "is False, which is not text: .* in quotes"),
        (changed(("sea.singular", [""])), "item under singular of the domain sea .* is empty"),
        (
            changed(("sea.singular", ["The  Trial"])),
            'the item "The Trial" of the domain sea in .* is also in the domain law: keep it in',
        ),
        (changed(("law.plural", ["wills", "Wills"])), 'law in .* has the item "Wills" twice'),
        ("domains:\n  law: {}\n  law: {}\n", 'the name "law" in line 3 of .* is given twice'),
        ("domains:\n  1: {}\n  2: {}\n", "the name under domains of .* is 1, which is not text"),
    ],
)
def test_a_malformed_ontology(tmp_path: Path, data: Any, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        load_ontology(write(tmp_path, data))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("About {topic_a}.", r"lacks the slot \{topic_b\}: it needs both topics"),
        ("{topic_b} before {field_a}", r"lacks the slot \{topic_a\}"),
        ("{topic_a} {topic_b} {topics_a}", "unknown slot in .* 'topics_a'; did you mean topic_a"),
        ("{topic_a} {topic_b} {}", "unknown slot in the template"),
        ("{topic_a} {topic_b} {TOPIC_A}", "unknown slot in the template"),
        ("{topic_a} {topic_b", "has braces that do not match"),
        ("{topic_a} {topic_b!r}", 'has a format in the slot "topic_b"'),
        ("{topic_a:>9} {topic_b}", 'has a format in the slot "topic_a"'),
        ("{topic_a.name} {topic_b}", "unknown slot in the template"),
        ("", "is empty: write a phrase"),
        (7, "is 7, which is not text"),
    ],
)
def test_a_malformed_template(tmp_path: Path, template: Any, problem: str) -> None:
    data = {**changed(), "templates": {"mine": template}}
    with pytest.raises(DartError, match=problem) as caught:
        load_ontology(write(tmp_path, data))
    assert re.search(r'"mine" (in|of) .*own\.yaml', str(caught.value))


@pytest.mark.parametrize(
    ("choices", "problem"),
    [
        ({}, 'needs "choices:" with names'),
        ({"word": []}, 'the choice "word" in .* is empty'),
        ({"word": "so"}, '"word" of .* must be a list'),
        ({"word": [3]}, 'entry of the choice "word" .* is 3, which is not text'),
        ({"topic_a": ["so"]}, 'the choice "topic_a" .* cannot be a slot'),
        ({"Word": ["so"]}, 'the choice "Word" .* cannot be a slot'),
        ({"a word": ["so"]}, 'the choice "a word" .* cannot be a slot'),
    ],
)
def test_malformed_choices(tmp_path: Path, choices: Any, problem: str) -> None:
    data = {**changed(), "templates": {"mine": "{topic_a} {topic_b}"}, "choices": choices}
    with pytest.raises(ConfigError, match=problem):
        load_ontology(write(tmp_path, data))


def test_a_template_needs_its_choices(tmp_path: Path) -> None:
    data = {**changed(), "templates": {"mine": "{topic_a} {topic_b} for {reader}"}}
    with pytest.raises(UnknownName, match=r"unknown slot in .*: 'reader'"):
        load_ontology(write(tmp_path, data))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the ontology file .*none.yaml"):
        load_ontology(tmp_path / "none.yaml")
