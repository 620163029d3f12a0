"""Ontologies and templates of two-topic prompts: files of one's own, and what is wrong in them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from dart_llm.data.topic_prompts import Item, generate, load_ontology, maximum
from dart_llm.errors import ConfigError

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


def changed(place: str = "", value: Any = None) -> dict[str, Any]:
    """A sound ontology with a change such as ("law.plural", []); None removes."""
    data: dict[str, Any] = {"domains": copy.deepcopy(DOMAINS)}
    if place:
        *path, last = place.split(".")
        target = data["domains"][path[0]] if path else data["domains"]
        target[last] = value
        if value is None:
            del target[last]
    return data


def test_domains_of_ones_own_with_the_templates_of_the_package(tmp_path: Path) -> None:
    ontology = load_ontology(write(tmp_path, changed()))
    law, sea = ontology.domains.values()
    assert (law.field, law.expert, law.place) == ("law", "a judge", "a court")
    assert law.items == (Item("a trial", False), Item("patents", True), Item("wills", True))
    assert sea.items == (Item("the compass", False),)
    assert ontology.templates == load_ontology().templates
    assert maximum(ontology) == 24 * 6
    pairs = {prompt.domains for prompt in generate(144, 0, ontology)}
    assert pairs == {("law", "sea"), ("sea", "law")}


def test_templates_of_ones_own(tmp_path: Path) -> None:
    data = {**changed(), "templates": {"plain": PLAIN}, "choices": {"word": ["so"]}}
    ontology = load_ontology(write(tmp_path, data))
    prompts = generate(6, 0, ontology)
    assert {prompt.text for prompt in prompts} == {
        "A trial is for a judge: why it? A port, it, the compass, so.",
        "Patents are for a judge: why they? A port, it, the compass, so.",
        "Wills are for a judge: why they? A port, it, the compass, so.",
        "The compass is for an admiral: why it? A court, it, a trial, so.",
        "The compass is for an admiral: why it? A court, them, patents, so.",
        "The compass is for an admiral: why it? A court, them, wills, so.",
    }
    slots = "expert_a is_a it_a place_b them_b topic_a topic_b word".split()
    assert list(prompts[0].slots) == ontology.slots(ontology.templates["plain"]) == slots
    assert prompts[0].slots["word"] == "so"


def test_choices_of_ones_own_for_the_templates_of_the_package(tmp_path: Path) -> None:
    data = {**changed(), "choices": {"reader": ["a judge"]}}
    made = generate(144, 0, load_ontology(write(tmp_path, data)))
    essays = [prompt for prompt in made if prompt.template == "essay"]
    assert len(essays) == 6
    assert all("to a judge. The" in prompt.text for prompt in essays)
    words = {prompt.slots["words"] for prompt in made if "words" in prompt.slots}
    assert words == {"150", "200", "250", "300"}


def template(text: Any) -> dict[str, Any]:
    return {**changed(), "templates": {"mine": text}}


def choices(given: Any) -> dict[str, Any]:
    return {**template("{topic_a} {topic_b}"), "choices": given}


REFUSED: list[tuple[Any, str]] = [
    ("domains: [", "cannot read the ontology file .*own.yaml: while parsing"),
    ("- law", 'own.yaml needs "domains:" with names'),
    ("", 'own.yaml needs "domains:" with names'),
    ("domains:\n  law: {}\n  law: {}\n", 'the name "law" is given twice.* line 3'),
    (
        "domains:\n  1: {}\n  2: {}\n",
        "own.yaml, domains.1.*: is 1, which is not text: write a phrase",
    ),
    ({"domain": DOMAINS}, "own.yaml, domains: is missing"),
    ({"domains": DOMAINS, "template": {}}, "unknown key in .*'template'; did you mean templates"),
    ({"domains": ["law"]}, "own.yaml, domains: needs names and values"),
    ({"domains": {"law": DOMAINS["law"]}}, "domains: a change of topic needs two domains or more"),
    (changed("sea", "water"), "domains.sea: needs names and values"),
    (changed("law.expert"), "domains.law.expert: is missing"),
    (changed("law.field", " "), "domains.law.field: is empty: write a phrase"),
    (changed("law.experts", "a"), "unknown key in .*, domains.law.experts: .* did you mean expert"),
    (changed("law.plural", "wills"), "domains.law.plural: must be a list"),
    (changed("sea.singular", []), "domains.sea: has no items"),
    (
        changed("sea.singular", [1984]),
        "domains.sea.singular.0: is 1984, which is not text: write a phrase",
    ),
    (changed("sea.singular", [False]), "domains.sea.singular.0: is False, .* in quotes if need be"),
    (changed("sea.singular", [""]), "domains.sea.singular.0: is empty"),
    (changed("sea.singular", ["The  Trial"]), 'item "The Trial" of sea is also in law: keep it in'),
    (changed("law.plural", ["wills", "Wills"]), "domains: law has an item twice: drop one"),
    (template("About {topic_a}."), r'"mine" lacks the slot \{topic_b\}: it needs both topics'),
    (template("{topic_b} before {field_a}"), r'"mine" lacks the slot \{topic_a\}'),
    (template("{topic_a} {topic_b} {topics_a}"), "\"mine\": .*'topics_a'; did you mean topic_a"),
    (template("{topic_a} {topic_b} {}"), '"mine": unknown slot'),
    (template("{topic_a} {topic_b} {TOPIC_A}"), '"mine": unknown slot'),
    (template("{topic_a.name} {topic_b}"), '"mine": unknown slot'),
    (template("{topic_a} {topic_b} for {reader}"), "\"mine\": unknown slot 'reader'"),
    (template("{topic_a} {topic_b"), "\"mine\": expected '}'"),
    (template("{topic_a} {topic_b!r}"), '"mine": has a format in the slot "topic_b"'),
    (template("{topic_a:>9} {topic_b}"), '"mine": has a format in the slot "topic_a"'),
    (template(""), "templates.mine: is empty: write a phrase"),
    (template(7), "templates.mine: is 7, which is not text"),
    ({**changed(), "templates": {}}, "templates: is empty: list at least one"),
    (choices({"word": []}), "choices.word: is empty: list at least one"),
    (choices({"word": "so"}), "choices.word: must be a list"),
    (choices({"word": [3]}), "choices.word.0: is 3, which is not text"),
    (choices({"topic_a": ["so"]}), 'choices: "topic_a" cannot be a slot'),
    (choices({"Word": ["so"]}), 'choices: "Word" cannot be a slot'),
    (choices({"a word": ["so"]}), 'choices: "a word" cannot be a slot'),
]


@pytest.mark.parametrize(("data", "problem"), REFUSED)
def test_a_malformed_ontology(tmp_path: Path, data: Any, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        load_ontology(write(tmp_path, data))
    assert "\n" not in str(caught.value) and "own.yaml" in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the ontology file .*none.yaml"):
        load_ontology(tmp_path / "none.yaml")
