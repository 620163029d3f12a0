"""``dart-llm prompts``: list and show."""

import json
import re
from pathlib import Path

import pytest

from dart_llm.cli.app import COMMANDS
from dart_llm.data import passages
from lm_cases import call, refusal

SHIPPED, LONG = passages.listed_prompts(), passages.shipped()


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def done(*arguments):
    result = call("prompts", *arguments)
    assert result.code == 0, result.err
    return result


def document(*arguments):
    result = done(*arguments, "--json")
    assert result.err == "" and result.out.count("\n") == 1
    return result.json


def test_list_and_show():
    result = done("list")
    assert result.err == "20 of 480 prompts; --limit 480 shows all\n"
    assert "anesthesia" in result.out and "astronomy -> medicine" in result.out
    chosen = [p for p in SHIPPED if "law" in p.domains]
    documents = [prompt.to_dict() for prompt in chosen]
    assert document("list", "--domain", "law") == {"total": len(chosen), "prompts": documents}
    assert len(document("list")["prompts"]) == document("list", "--limit", 3)["total"] == 480
    listed = done("list", "--passages").out
    assert "01-bees" in listed and "zoology -> " in listed
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


def test_errors_and_examples():
    Path("plain.jsonl").write_text('{"text": "a"}\n')
    for arguments, problem in [
        ("list --domain astronmy", "UnknownName: .*domain 'astronmy'; .* astronomy"),
        ("list --limit 0", "ConfigError: --limit 0 must be at least 1"),
        ("list --file plain.jsonl --domain law", "UnknownName: unknown domain"),
        ("show 13", "UnknownName: unknown prompt or passage '13'"),
        ("show essay", "UnknownName: .*'essay'; known: essay-"),
    ]:
        assert re.match(problem, refusal("prompts", *arguments.split()))
    assert "unknown prompt or passage ''" in refusal("prompts", "show", "")
    lines = [json.dumps(prompt.to_dict()) for prompt in SHIPPED[:5]]
    Path("prompts.jsonl").write_text("\n".join(lines))
    entries = [entry for entry in COMMANDS if entry.name.startswith("prompts ")]
    assert len(entries) == 2
    for entry in entries:
        assert len(entry.examples) >= 2
        for example in entry.examples:
            done(*example.removeprefix("dart-llm prompts ").split())
