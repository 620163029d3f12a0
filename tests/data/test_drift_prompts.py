"""Two-topic prompts: the generator, the ontology it draws from, and the prompts in the package."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from importlib import resources
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dart_llm.data.topic_prompts import (
    SHIPPED,
    DriftPrompt,
    Ontology,
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
PLURAL = {item.name: item.plural for domain in OWN.domains.values() for item in domain.items}


def small(*sizes: int, templates: int = 1) -> Ontology:
    """Domains d0, d1, ... with so many items."""
    domains = {
        f"d{d}": {
            "field": f"field {d}",
            "expert": "a man",
            "place": "a hall",
            "singular": [f"i{d}.{n}" for n in range(0, size, 2)],
            "plural": [f"i{d}.{n}" for n in range(1, size, 2)],
        }
        for d, size in enumerate(sizes)
    }
    texts = {
        f"t{number}": f"{number}: {{topic_a}} {{is_a}}, {{topic_b}}, {{word}}."
        for number in range(templates)
    }
    data = {"domains": domains, "templates": texts, "choices": {"word": ("one", "two")}}
    return Ontology.model_validate(data)


def test_the_shipped_prompts_are_what_the_generator_makes() -> None:
    lines = [json.dumps(prompt.to_dict()) + "\n" for prompt in generate(SHIPPED, 0)]
    assert (FOLDER / "prompts.jsonl").read_bytes() == "".join(lines).encode("ascii")
    assert shipped() == generate(SHIPPED, 0)


def test_hash_seeds_do_not_matter_and_the_import_is_light() -> None:
    code = (
        "import sys; from dart_llm.data.topic_prompts import generate;"
        "assert not {'torch', 'rich', 'yaml'} & set(sys.modules);"
        "print([prompt.id for prompt in generate(60, 5)])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert outputs == {f"{[prompt.id for prompt in generate(60, 5)]}\n"}


def test_the_shipped_set_is_large_and_even() -> None:
    prompts = shipped()
    assert len(prompts) == SHIPPED == 480
    assert len({prompt.id for prompt in prompts}) == len({prompt.text for prompt in prompts}) == 480
    assert set(Counter(prompt.template for prompt in prompts).values()) == {20}
    pairs = Counter(prompt.domains for prompt in prompts)
    assert len(pairs) == 16 * 15 and set(pairs.values()) == {2}
    topics = Counter(prompt.slots[f"topic_{side}"] for prompt in prompts for side in "ab")
    assert set(topics) == set(OWNER)
    assert set(topics.values()) == {4, 5}
    assert Counter(prompt.seed for prompt in prompts) == {0: 480}


def test_the_domain_changes_in_every_shipped_prompt() -> None:
    for prompt in shipped():
        topics = [prompt.slots[f"topic_{side}"] for side in "ab"]
        assert prompt.domains == tuple(OWNER[topic] for topic in topics)
        assert prompt.domains[0] != prompt.domains[1]
        first, second = (prompt.text.index(topic) for topic in topics)
        assert first < second, prompt.text


def test_prompts_are_clean_english() -> None:
    for prompt in [*shipped(), *generate(1000, 1)]:
        text = prompt.text
        assert text == " ".join(text.split())
        assert text[-1] in ".?"
        assert not set(text) & set("{}[]<>_")
        assert all(part[0].isupper() for part in re.split(r"(?<=[.?]) ", text))
        for article, word in re.findall(r"\b([Aa]n?) (\w+)", text):
            vowel = word[0] in "aeiou" or word in ("herb", "hour")
            assert (article.lower() == "an") == vowel, f"{article} {word}"
        for name, value in prompt.slots.items():
            assert value in text or value[0].upper() + value[1:] in text, name
        for verb, topic in re.findall(r"why (is|are) (.+?) worth", text):
            assert (verb == "are") == PLURAL[topic]
        for topic, pronoun in re.findall(r"Explain (.+?) step by step.* (it|them) to a", text):
            assert (pronoun == "them") == PLURAL[topic]


def test_the_package_has_enough_to_choose_from() -> None:
    assert len(OWN.domains) == 16 and len(OWN.templates) == 24
    assert all(len(d.singular) + len(d.plural) == 14 for d in OWN.domains.values())
    assert all(d.singular and d.plural for d in OWN.domains.values())
    assert len({" ".join(text.split()[:5]) for text in OWN.templates.values()}) == 24
    assert maximum(OWN) == 24 * (224 * 210)


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**64), st.integers(1, 200), st.integers(1, 200))
def test_any_seed_and_count(seed: int, count: int, fewer: int) -> None:
    prompts = generate(count, seed, OWN)
    assert len(prompts) == count == len({prompt.text for prompt in prompts})
    assert len({prompt.id for prompt in prompts}) == count
    assert prompts[:fewer] == generate(min(fewer, count), seed, OWN)
    for prompt in prompts:
        one, other = prompt.slots["topic_a"], prompt.slots["topic_b"]
        assert (OWNER[one], OWNER[other]) == prompt.domains
        assert OWNER[one] != OWNER[other]
        assert "{" not in prompt.text and one in prompt.text and other in prompt.text


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=2, max_size=4), st.integers(1, 3), st.integers(0, 9))
def test_all_that_exist_can_be_made_and_no_more(
    sizes: list[int], templates: int, seed: int
) -> None:
    ontology = small(*sizes, templates=templates)
    names = [item.name for domain in ontology.domains.values() for item in domain.items]
    every = {
        (f"t{t}", one, other)
        for t in range(templates)
        for one in names
        for other in names
        if one.split(".")[0] != other.split(".")[0]
    }
    assert maximum(ontology) == len(every)
    made = generate(len(every), seed, ontology)
    assert {(p.template, p.slots["topic_a"], p.slots["topic_b"]) for p in made} == every
    with pytest.raises(ConfigError, match=f"gives {len(every)} prompts at most"):
        generate(len(every) + 1, seed, ontology)


def test_seeds_differ_and_ids_do_not_depend_on_them() -> None:
    ontology = small(4, 4, templates=2)
    one, other = (generate(maximum(ontology), seed, ontology) for seed in (1, 2))
    assert [prompt.text for prompt in one] != [prompt.text for prompt in other]
    ids = {prompt.text: prompt.id for prompt in one}
    common = [prompt for prompt in other if prompt.text in ids]
    assert 10 < len(common) < 64  # the word in them is drawn
    assert all(prompt.id == ids[prompt.text] for prompt in common)
    assert {prompt.seed for prompt in other} == {2}


@pytest.mark.parametrize(
    ("count", "seed", "problem"),
    [
        (0, 0, "gives 1128960 prompts at most, .* ask for 1 to 1128960, not 0$"),
        (-1, 0, "not -1$"),
        (1_128_961, 0, "not 1128961$"),
        (5, -3, "the seed -3 is negative: give 0 or more"),
    ],
)
def test_what_cannot_be_generated(count: int, seed: int, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        generate(count, seed)


def test_two_combinations_with_the_same_text() -> None:
    words = {"field": "x", "expert": "a man", "place": "a hall"}
    domains = {
        "x": {**words, "singular": ["p and q", "p"]},
        "y": {**words, "singular": ["r", "q and r"]},
    }
    ontology = Ontology.model_validate(
        {"domains": domains, "templates": {"t": "{topic_a} and {topic_b}"}}
    )
    with pytest.raises(ConfigError, match='give the same prompt, "p and q and r": rename'):
        generate(8, 0, ontology)


def test_prompts_are_written_and_read_back(tmp_path: Path) -> None:
    prompts = generate(30, 3)
    write_lines(tmp_path / "own.jsonl", [prompt.to_dict() for prompt in prompts])
    assert read_prompts(tmp_path / "own.jsonl") == prompts


def test_a_prompt_of_ones_own_needs_only_a_text(tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").write_text('{"text": "a"}\n\n{"text": "b", "id": 7}\n')
    assert read_prompts(tmp_path / "own.jsonl") == [DriftPrompt("1", "a"), DriftPrompt("7", "b")]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("", "the file .* is empty"),
        ("{", "line 1 of .* is not JSON"),
        ('{"prompt": "a"}', "line 1 of .*, text: is missing"),
        ('{"text": " "}', 'the prompt "1" has no text'),
        ('{"text": 3}', "line 1 of .*, text: is 3, which is not text"),
        ('{"text": "a", "slots": ["b"]}', "line 1 of .*, slots: needs names and values"),
        ('{"text": "a", "domains": ["law"]}', "needs two different domains, not law"),
        ('{"text": "a", "domains": ["law", "law"]}', "needs two different domains, not law and"),
        ('{"text": "a", "id": "x"}\n{"text": "b", "id": "x"}', 'id "x" in line 2 of .* is taken'),
    ],
)
def test_a_file_that_holds_no_prompts(tmp_path: Path, line: str, problem: str) -> None:
    (tmp_path / "own.jsonl").write_text(line)
    with pytest.raises(ConfigError, match=problem):
        read_prompts(tmp_path / "own.jsonl")
