"""Every flag has a help text; every environment variable and every registered name is explained."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
import typer

from dart_llm.cli.app import app
from dart_llm.pruning.methods import listing
from dart_llm.server import settings as settings_serve
from dart_llm.studies.generate.settings import RunSettings
from shells import ROOT
from variables import documented, first_cells, read_by, read_by_shell, sections, silent_flags

SHELL = ("Makefile", ".ci/run", "scripts/setup.sh", "scripts/browser.sh")
ELSEWHERE = {"DEBIAN_FRONTEND", "BASH_SOURCE", "SECONDS", "CDPATH"}
"""Of Debian's tools and of bash."""
SCRIPTS = sorted([*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "scripts").glob("*.py")])
PAGE = (ROOT / "docs/scripts.md").read_text(encoding="utf-8")
KINDS = {
    "methods": "Methods",
    "scores": "Scores",
    "budgets": "Budgets",
    "drift_rules": "Drift",
}


def commands(found: click.Command, name: str = "dart-llm") -> list[tuple[str, click.Command]]:
    """All commands below one, by name."""
    inner = getattr(found, "commands", {})
    below = [pair for word, one in inner.items() for pair in commands(one, f"{name} {word}")]
    return [(name, found), *below]


ALL = dict(commands(typer.main.get_command(app)))


def test_the_commands_are_those_of_the_program() -> None:
    assert {"dart-llm run", "dart-llm bench speed", "dart-llm prompts show"} <= set(ALL)
    assert len(ALL) > 20


@pytest.mark.parametrize("name", ALL)
def test_every_flag_of_a_command_is_explained_and_in_the_docs(name: str) -> None:
    page = sections(ROOT / "docs/cli.md")
    for option in ALL[name].params:
        hidden = getattr(option, "hidden", False) or option.name == "help"
        if hidden or getattr(option, "param_type_name", "") == "argument":
            continue
        assert getattr(option, "help", ""), option.name
        if name in page:
            assert any(flag in page[name] for flag in option.opts), option.opts


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_every_flag_of_a_script_is_explained(path: Path) -> None:
    assert list(silent_flags(path.read_text(encoding="utf-8"))) == []


def test_every_environment_variable_is_documented() -> None:
    told, found = documented(PAGE), set[str]()
    for folder in ("src", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            found |= read_by(path.read_text(encoding="utf-8"))
    for name in SHELL:
        found |= read_by_shell((ROOT / name).read_text(encoding="utf-8"))
    fields = {*RunSettings.model_fields, *settings_serve.ServeSettings.model_fields}
    assert {"DART_CACHE", "DART_NATIVE", "HF_TOKEN", "RAY_ADDRESS", "VENV"} <= found
    settings = {name for name in found if name.lower().removeprefix("dart_") in fields}
    assert found - settings - ELSEWHERE - told == set()


def test_every_documented_variable_is_known_somewhere() -> None:
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py")]
    for folder in ("tests", "benchmarks"):
        texts += [path.read_text(encoding="utf-8") for path in (ROOT / folder).glob("*.py")]
    texts += [(ROOT / name).read_text(encoding="utf-8") for name in (*SHELL, "run_experiment.sh")]
    whole = "\n".join(texts)
    names = documented(PAGE) - {"DART_<SETTING>"}
    assert len(names) > 60  # those of the two scripts among them
    assert [name for name in sorted(names) if name not in whole] == []


@pytest.mark.parametrize("kind", KINDS)
def test_every_registered_name_is_explained(kind: str) -> None:
    told = first_cells(sections(ROOT / "docs/method.md")[KINDS[kind]])
    names = {entry["name"] for entry in listing()[kind]}
    assert len(names) > 4
    assert names <= {*told, *(name.split()[0] for name in told)}


# what the checks notice


def test_variables_are_found_in_python() -> None:
    code = (
        'import os\nA = "HF_ONE"\nos.environ.get("TWO")\nos.environ["THREE"]\n'
        'os.environ.setdefault("FOUR", "1")\nother.get("FIVE")\n"""HF_SIX in words."""\n'
    )
    assert read_by(code) == {"HF_ONE", "TWO", "THREE", "FOUR"}


def test_variables_are_found_in_shell() -> None:
    text = 'VENV ?= .venv\nx="${PYTHON:-python3}"\nexport ONE=1 TWO=PASSIVE\n\t@THREE=1 $(IN) x\n'
    assert read_by_shell(text) == {"VENV", "PYTHON", "ONE", "TWO", "THREE"}


def test_the_table_of_variables_is_read() -> None:
    page = "| variable | x |\n| --- | --- |\n| `A` `B` | `C` |\n\n| other |\n| --- |\n| `D` |\n"
    assert documented(page) == {"A", "B"}


def test_a_flag_without_help_is_noticed() -> None:
    flags = ('"--a", help="x"', '"--b", type=int', '"c", help=""')
    code = "\n".join(f"p.add_argument({flag})" for flag in flags)
    assert list(silent_flags(code)) == ["--b", "c"]
