"""Two-topic prompts: the package's are even, made by the script beside the benchmarks, and read."""

import json
import subprocess
import sys
from collections import Counter
from importlib import resources

import pytest

from dart_llm.data.topic_prompts import DriftPrompt, read_prompts, shipped
from dart_llm.errors import ConfigError
from dart_llm.files import write_lines
from shells import ROOT

SCRIPT = ROOT / "benchmarks/make_prompts.py"
OWN = """
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
    ontology.write_text(OWN)
    made = [json.loads(line) for line in make(4, "--ontology", ontology).stdout.splitlines()]
    assert {prompt["text"] for prompt in made} == {
        "A trial is for a judge: why it? A port, the compass, so.",
        "Patents are for a judge: why they? A port, the compass, so.",
        "The compass is for an admiral: why it? A court, a trial, so.",
        "The compass is for an admiral: why it? A court, patents, so.",
    }
    assert "gives 4 prompts at most" in make(5, "--ontology", ontology).stderr


def test_the_shipped_set_is_large_and_even_and_changes_its_domain():
    prompts = shipped()
    assert len(prompts) == 480
    assert len({prompt.id for prompt in prompts}) == len({prompt.text for prompt in prompts}) == 480
    assert set(Counter(prompt.template for prompt in prompts).values()) == {20}
    pairs = Counter(prompt.domains for prompt in prompts)
    assert len(pairs) == 16 * 15 and set(pairs.values()) == {2}
    topics = Counter(prompt.slots[f"topic_{side}"] for prompt in prompts for side in "ab")
    assert len(topics) == 224 and set(topics.values()) == {4, 5}


@pytest.mark.contract("every parser round-trips")
def test_prompts_are_written_and_read_back(tmp_path):
    path, prompts = tmp_path / "own.jsonl", shipped()[:30]
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
