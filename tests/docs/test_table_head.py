"""scripts/table_head.py: the lines above a published table, and today's names in old files."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.core import TyperGroup
from typer.main import get_command

from dart_llm.cli.app import app
from published import ROOT, scripts

with scripts():
    from measured_blocks import measured
    from table_head import above, today
    from table_registry import cut, registry

    MEASURED = measured(ROOT)

OLD = {"renamed": {"dart": "dart-prompt"}}


@pytest.mark.parametrize(
    ("label", "shown"),
    [
        ("dart", "dart-prompt"),
        ("dart@0.5", "dart-prompt@0.5"),
        ("dart (blend energy depth)", "dart-prompt (blend energy depth)"),
        ("observing (dart statistics)", "observing (dart-prompt statistics)"),
        ("dart-token@0.5", "dart-token@0.5"),
        ("dart-prompt", "dart-prompt"),
        ("griffin", "griffin"),
    ],
)
def test_old_files_show_the_names_of_today(label: str, shown: str) -> None:
    assert today(OLD, label) == shown
    assert today({}, label) == label


def test_the_command_can_be_copied_and_is_followed_by_checkpoint_and_file() -> None:
    assert above(ROOT, "budgets-smollm2-wikitext2-valid").splitlines() == [
        "```sh",
        "python benchmarks/budgets.py ../shared/data/wikitext2_valid.txt "
        "--out budgets-smollm2-wikitext2-valid",
        "```",
        "",
        "SmolLM2-135M-Instruct (file quantisation Q4_1, bfloat16, sha256 b179c9523d0e): "
        "[budgets-smollm2-wikitext2-valid.json]"
        "(@benchmarks/results/budgets-smollm2-wikitext2-valid.json). "
        "`dart-prompt` is called `dart` in the file.",
    ]


def test_two_files_have_two_commands_and_each_its_link() -> None:
    head = above(ROOT, "tracer-cost-dart-prompt", "tracer-cost-published")
    assert head.count("python benchmarks/tracer_cost.py --method ") == 2
    assert "no checkpoint, shapes alone: [tracer-cost-dart-prompt.json]" in head
    assert ") and [tracer-cost-published.json](" in head
    assert head.endswith("`dart-prompt` is called `dart` in tracer-cost-dart-prompt.json.")


def recorded(data: dict[str, object]) -> set[str]:
    """The commands that a results file says it was made by, without where its results went."""
    runs = data.get("runs")
    found = [run["command"] for run in runs] if isinstance(runs, list) else [data["command"]]
    return {re.sub(r" --experiment-name \S+", "", str(command)) for command in found}


def test_the_commands_of_the_registry_are_those_of_the_files() -> None:
    """But for files of before today's names, and sweeps, whose file the keeping script wrote."""
    different = []
    for name, table in registry(ROOT).tables.items():
        if not table.file(ROOT).is_file() or name.startswith("evaluation-"):
            continue
        data = json.loads(table.file(ROOT).read_text("utf-8"))
        if "renamed" not in data and recorded(data) != set(map(cut, table.run)):
            different.append(name)
    assert different == []


@pytest.mark.parametrize("name", registry(ROOT).tables)
def test_the_commands_parse(name: str) -> None:
    """Every option exists, in the whole form and in the short one."""
    table = registry(ROOT).tables[name]
    for run in (*table.run, *(f"{run} {table.short or ''}" for run in table.run)):
        program, *words = shlex.split(run)
        if program == "dart-llm":
            command: Any = get_command(app)
            while isinstance(command, TyperGroup):
                command = command.commands[words.pop(0)]
            context = command.make_context("x", words)
            assert context.params
            context.close()
        else:
            script = (ROOT / words[0]).read_text("utf-8")
            options = [word for word in words if word.startswith("--")]
            known = script + (ROOT / "benchmarks/common.py").read_text("utf-8")
            assert [option for option in options if f'"{option}"' not in known] == []


def test_a_file_that_is_renamed_has_no_method_of_the_new_name() -> None:
    """Else two rows would bear one name."""
    for table in registry(ROOT).tables.values():
        if table.file(ROOT).is_file():
            text = table.file(ROOT).read_text("utf-8")
            for new in json.loads(text).get("renamed", {}).values():
                assert len(re.findall(rf'"(?:method|label|rule)": "{new}', text)) == 0


def test_every_generated_table_has_an_entry_that_says_how_it_is_made() -> None:
    known = registry(ROOT).names()
    assert [name for name in MEASURED if name not in known] == []
    files = {path.stem for path in (ROOT / "benchmarks/results").glob("*.json")}
    assert files - set(registry(ROOT).tables) == set()


def test_above_every_generated_table_stands_a_command_and_a_link() -> None:
    for name, (page, text) in MEASURED.items():
        head = text.partition("\n| ")[0]
        assert re.search(r"```sh\n(dart-llm|python benchmarks/)", head), name
        links = re.findall(r"\((\S*benchmarks/results/\S+?\.json)\)", head)
        assert links and all((page.parent / Path(link)).is_file() for link in links), name
