"""``dart-llm prompts``: generate, list and show."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from dart_llm.cli.app import app
from dart_llm.cli.commands import COMMANDS
from dart_llm.data import passages as drift_passages
from dart_llm.data import topic_prompts as drift_prompts
from dart_llm.errors import ConfigError, DartError, ResultsError, UnknownName
from lm_cases import call

ONTOLOGY = """\
domains:
  law: {field: law, expert: a judge, place: a court, plural: ["[bold]wills[/bold]"]}
  sea: {field: seafaring, expert: an admiral, place: a port, singular: [the compass]}
templates:
  plain: Of {topic_a} and of {topic_b}.
"""


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["prompts", *map(str, arguments)])


def done(*arguments: object) -> Result:
    result = run(*arguments)
    assert result.exit_code == 0, result.exception
    return result


def document(*arguments: object) -> Any:
    result = done(*arguments, "--json")
    assert result.stderr == "" and result.stdout.count("\n") == 1
    return json.loads(result.stdout)


def rows(text: str) -> list[str]:
    """The first cell of each row of a table, without the heading."""
    lines = [line for line in text.splitlines() if line.strip() and "──" not in line]
    return [line.split()[0] for line in lines[1:] if not line.startswith("   ")]


def test_generated_prompts_go_to_stdout_as_lines() -> None:
    result = done("generate", 5, "--seed", 2)
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert found == [prompt.to_dict() for prompt in drift_prompts.generate(5, 2)]
    assert list(found[0]) == ["id", "text", "template", "slots", "domains", "seed"]
    assert result.stderr == ""


def test_generated_prompts_go_to_a_file(tmp_path: Path) -> None:
    result = done("generate", 5, "--out", tmp_path / "a.jsonl")
    assert result.stdout == ""
    assert result.stderr == f"wrote 5 of 1,128,960 possible prompts to {tmp_path / 'a.jsonl'}\n"
    assert drift_prompts.read_prompts(tmp_path / "a.jsonl") == drift_prompts.shipped()[:5]


def test_generate_with_an_ontology_and_json(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(ONTOLOGY)
    out = tmp_path / "a.jsonl"
    found = document("generate", 2, "--ontology", tmp_path / "own.yaml", "--out", out)
    assert {key: found[key] for key in ("seed", "ontology", "file", "possible")} == {
        "seed": 0,
        "ontology": str(tmp_path / "own.yaml"),
        "file": str(out),
        "possible": 2,
    }
    texts = {prompt["text"] for prompt in found["prompts"]}
    assert texts == {
        "Of [bold]wills[/bold] and of the compass.",
        "Of the compass and of [bold]wills[/bold].",
    }
    assert {prompt.text for prompt in drift_prompts.read_prompts(out)} == texts
    shown = done("list", "--file", out).stdout  # square brackets are no markup
    assert shown.count("[bold]wills[/bold]") == 2
    name = found["prompts"][0]["id"]
    assert found["prompts"][0]["text"] in done("show", name, "--file", out).stdout.splitlines()


def test_the_list_of_prompts() -> None:
    result = done("list")
    ids = [prompt.id for prompt in drift_prompts.shipped()]
    assert rows(result.stdout) == ids[:20]
    assert result.stderr == "20 of 480 prompts; --limit 480 shows all\n"
    assert "anesthesia" in result.stdout and "astronomy -> medicine" in result.stdout
    whole = done("list", "--limit", 480)
    assert rows(whole.stdout) == ids and whole.stderr == ""


def test_filters_of_the_list() -> None:
    found = document("list", "--domain", "law", "--template", "letter")
    chosen = [p for p in drift_prompts.shipped() if "law" in p.domains and p.template == "letter"]
    assert found == {"total": len(chosen), "prompts": [prompt.to_dict() for prompt in chosen]}
    assert len(chosen) == 4
    assert document("list", "--limit", 3)["total"] == 480
    assert document("list", "--limit", 3)["prompts"] == document("list")["prompts"][:3]
    assert len(document("list")["prompts"]) == 480
    assert rows(done("list", "--domain", "law", "--template", "letter").stdout) == [
        prompt.id for prompt in chosen
    ]


def test_filters_that_nothing_passes(tmp_path: Path) -> None:
    path = tmp_path / "two.jsonl"
    path.write_text(
        '{"text": "a", "template": "x", "domains": ["law", "sea"]}\n'
        '{"text": "b", "template": "y", "domains": ["sea", "art"]}\n'
    )
    assert document("list", "--file", path, "--domain", "sea", "--template", "x")["total"] == 1
    nothing = ("list", "--file", path, "--domain", "law", "--template", "y")
    assert done(*nothing).stdout == "no prompts match\n"
    assert document(*nothing) == {"total": 0, "prompts": []}
    (tmp_path / "plain.jsonl").write_text('{"text": "a"}\n')
    failed = run("list", "--file", tmp_path / "plain.jsonl", "--domain", "law")
    assert str(failed.exception) == "this file names no domain: leave out --domain"
    assert rows(done("list", "--file", tmp_path / "plain.jsonl").stdout) == ["1"]


def test_the_list_of_passages() -> None:
    result = done("list", "--passages")
    assert rows(result.stdout) == [passage.id for passage in drift_passages.shipped()]
    assert re.search(r"01-bees-\S+ +zoology +how honeybees dance +574 +0 *\n", result.stdout)
    assert re.search(r"\n +finance +how a mortgage is repaid +393 +3,081 *\n", result.stdout)
    found = document("list", "--passages", "--domain", "sport")
    assert [row["id"][:2] for row in found["passages"]] == ["06", "09"]
    assert found["total"] == 2
    assert found["passages"][0]["changes"] == [2768]
    assert rows(done("list", "--passages", "--limit", 1).stdout) == ["01-bees-to-mortgages"]


def test_a_prompt_is_shown() -> None:
    prompt = drift_prompts.shipped()[0]
    result = done("show", prompt.id)
    assert result.stdout.splitlines()[-1] == prompt.text
    assert re.search(r"slot topic_b +│ anesthesia +│", result.stdout)
    assert re.search(r"domains +│ astronomy -> medicine +│", result.stdout)
    assert document("show", prompt.id) == prompt.to_dict()


@pytest.mark.parametrize("name", ["09-earthquakes-to-marathons-to-ledgers", "09"])
def test_a_passage_is_shown_with_its_topics_marked(name: str) -> None:
    passage = drift_passages.shipped()[8]
    lines = done("show", name).stdout.splitlines()
    assert lines[0] == passage.id
    marks = {n: line for n, line in enumerate(lines) if line.startswith("--- ")}
    assert list(marks.values()) == [
        "--- topic 1 of 3: earthquakes (geology), characters 0 to 2,935, 541 words ---",
        "--- topic 2 of 3: the marathon (sport), characters 2,935 to 5,865, 526 words ---",
        "--- topic 3 of 3: double-entry bookkeeping (finance), characters 5,865 to 7,953, "
        "388 words ---",
    ]
    for number, segment in zip(marks, passage.segments(), strict=True):
        assert lines[number + 2] == segment.text.split("\n\n")[0]
    assert document("show", name) == passage.to_dict()


def test_a_passage_of_ones_own_is_shown(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps(drift_passages.shipped()[0].to_dict()) + "\n")
    assert document("list", "--passages", "--file", path)["total"] == 1
    assert "--- topic 2 of 2: how a mortgage" in done("show", "01", "--file", path).stdout


@pytest.mark.parametrize(
    ("arguments", "kind", "problem"),
    [
        (
            ["generate", 1_128_961],
            ConfigError,
            "this ontology gives 1128960 prompts at most, .* not 1128961",
        ),
        (["generate", 0], ConfigError, "ask for 1 to 1128960, not 0"),
        (["generate", 2, "--seed", -1], ConfigError, "the seed -1 is negative"),
        (["generate", 2, "--ontology", "none.yaml"], ConfigError, "cannot read the ontology file"),
        (["generate", 2, "--out", "none/a.jsonl"], ResultsError, "cannot write none/a.jsonl"),
        (["list", "--domain", "astronmy"], UnknownName, "domain 'astronmy'; .* astronomy"),
        (["list", "--template", "leter"], UnknownName, "template 'leter'; .* letter"),
        (["list", "--limit", 0], ConfigError, "--limit 0 is too small"),
        (["list", "--passages", "--template", "letter"], ConfigError, "have no template"),
        (["list", "--file", "none.jsonl"], ConfigError, "there is no file none.jsonl"),
        (["show", "13"], UnknownName, "unknown prompt or passage '13'"),
        (["show", ""], UnknownName, "unknown prompt or passage ''"),
        (["show", "essay"], ConfigError, '20 ids begin with "essay", such as essay-'),
    ],
)
def test_errors(
    arguments: list[Any],
    kind: type[DartError],
    problem: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert type(result.exception) is kind
    assert re.search(problem, str(result.exception))
    # The same through the real entry point: one sentence on stderr and exit code 2.
    end = call("prompts", *arguments)
    assert (end.code, end.out) == (2, "")
    assert end.err == f"{kind.__name__}: {result.exception}\n"


@pytest.mark.parametrize("command", ["generate", "list", "show"])
def test_examples_in_the_help_work(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_domains.yaml").write_text(
        ONTOLOGY.partition("templates")[0].replace("singular: [the", "singular: [a, b, the")
    )
    done("generate", 5, "--out", "prompts.jsonl")
    (entry,) = [one for one in COMMANDS if one.name == f"prompts {command}"]
    examples = [example.removeprefix("dart-llm prompts ") for example in entry.examples]
    assert len(examples) >= 2
    text = done(command, "--help").stdout
    for example in examples:
        assert example.split()[0] == command
        assert example.split()[1] in text
        done(*example.split())
