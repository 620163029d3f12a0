"""``dart-llm prompts``: generate, list and show."""

import json
import re
from pathlib import Path

import pytest

from dart_llm.cli.commands import COMMANDS
from dart_llm.data import passages, topic_prompts
from lm_cases import call

ONTOLOGY = """\
domains:
  law: {field: law, expert: a judge, place: a court, plural: ["[bold]wills[/bold]"]}
  sea: {field: seafaring, expert: an admiral, place: a port, singular: [the compass]}
templates:
  plain: Of {topic_a} and of {topic_b}.
"""
SHIPPED, LONG = topic_prompts.shipped(), passages.shipped()


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("own.yaml").write_text(ONTOLOGY)


def done(*arguments):
    result = call("prompts", *arguments)
    assert result.code == 0, result.err
    return result


def document(*arguments):
    result = done(*arguments, "--json")
    assert result.err == "" and result.out.count("\n") == 1
    return result.json


def test_generate():
    result = done("generate", 5, "--seed", 2)
    found = [json.loads(line) for line in result.out.splitlines()]
    assert found == [prompt.to_dict() for prompt in topic_prompts.generate(5, 2)]
    result = done("generate", 5, "--out", "a.jsonl")
    assert (result.out, result.err) == ("", "wrote 5 of 1,128,960 possible prompts to a.jsonl\n")
    assert topic_prompts.read_prompts(Path("a.jsonl")) == SHIPPED[:5]
    made = document("generate", 2, "--ontology", "own.yaml", "--out", "b.jsonl")
    prompts = made.pop("prompts")
    assert made == {"seed": 0, "ontology": "own.yaml", "file": "b.jsonl", "possible": 2}
    assert {prompt["text"] for prompt in prompts} == {
        "Of [bold]wills[/bold] and of the compass.",
        "Of the compass and of [bold]wills[/bold].",
    }
    assert [prompt.to_dict() for prompt in topic_prompts.read_prompts(Path("b.jsonl"))] == prompts


def test_list_and_show():
    result = done("list")
    assert result.err == "20 of 480 prompts; --limit 480 shows all\n"
    assert "anesthesia" in result.out and "astronomy -> medicine" in result.out
    chosen = [p for p in SHIPPED if "law" in p.domains and p.template == "letter"]
    told = [prompt.to_dict() for prompt in chosen]
    asked = ("list", "--domain", "law", "--template", "letter")
    assert document(*asked) == {"total": 4, "prompts": told}
    assert len(document("list")["prompts"]) == document("list", "--limit", 3)["total"] == 480
    listed = done("list", "--passages").out
    assert re.search(r"01-bees-\S+ +zoology +how honeybees dance +574 +0 *\n", listed)
    prompt, passage = SHIPPED[0], LONG[8]
    assert done("show", prompt.id).out.splitlines()[-1] == prompt.text
    assert document("show", prompt.id) == prompt.to_dict()
    Path("own.jsonl").write_text(json.dumps(passage.to_dict()) + "\n")
    mark = "--- topic 2 of 3: the marathon (sport), characters 2,935 to 5,865, 526 words"
    for asked in ([passage.id], ["09"], ["09", "--file", "own.jsonl"]):
        lines = done("show", *asked).out.splitlines()
        (place,) = (n for n, line in enumerate(lines) if line.startswith(mark))
        assert lines[0] == passage.id
        assert lines[place + 2] == passage.segments()[1].text.split("\n\n")[0]
        assert document("show", *asked) == passage.to_dict()


WRONG = [
    ("generate 1128961", "ConfigError: this ontology gives 1128960 prompts at most"),
    ("generate 2 --ontology none.yaml", "ConfigError: cannot read the ontology file"),
    ("generate 2 --out none/a.jsonl", "ResultsError: cannot write none/a.jsonl"),
    ("list --domain astronmy", "UnknownName: .*domain 'astronmy'; .* astronomy"),
    ("list --template leter", "UnknownName: .*template 'leter'; .* letter"),
    ("list --limit 0", "ConfigError: --limit 0 is too small"),
    ("list --passages --template letter", "ConfigError: .*have no template"),
    ("list --file plain.jsonl --domain law", "ConfigError: this file names no domain: leave out"),
    ("show 13", "UnknownName: unknown prompt or passage '13'"),
    ("show essay", 'ConfigError: 20 ids begin with "essay", such as essay-'),
]


def test_errors_and_examples():
    Path("plain.jsonl").write_text('{"text": "a"}\n')
    for arguments, problem in WRONG:
        end = call("prompts", *arguments.split())
        assert (end.code, end.out, end.err.count("\n")) == (2, "", 1)
        assert re.match(problem, end.err), end.err
    assert "unknown prompt or passage ''" in call("prompts", "show", "").err
    text = ONTOLOGY.partition("templates")[0].replace("singular: [the", "singular: [a, b, the")
    Path("my_domains.yaml").write_text(text)
    done("generate", 5, "--out", "prompts.jsonl")
    entries = [entry for entry in COMMANDS if entry.name.startswith("prompts ")]
    assert len(entries) == 3
    for entry in entries:
        assert len(entry.examples) >= 2
        for example in entry.examples:
            done(*example.removeprefix("dart-llm prompts ").split())
