"""Published tables: every one can be made of its results files, and the README has the newest."""

import json
import re

import docs_hooks
import pytest
import readme

from dart_llm.studies.generate.settings import RunSettings
from shells import ROOT

PAGES = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")}
KNOWN = docs_hooks.registry()
BLOCKS = [block for view in KNOWN["views"] for block in view["blocks"]]


def shown():
    for text in PAGES.values():
        yield from re.findall(r'^\{\{ measured\("([\w.-]+)"\) \}\}$', text, re.MULTILINE)


@pytest.mark.parametrize("block", BLOCKS)
def test_every_table_is_made(block):
    lines = [line for line in docs_hooks.measured(block).splitlines() if line.startswith("| ")]
    assert len({line.count("|") for line in lines if "Conv1D" not in line}) <= 2
    assert "None" not in "".join(lines) and "{" not in "".join(lines)


def test_every_table_stands_on_a_page_and_every_file_in_a_table():
    pages = [*shown(), *readme.PAGES]
    assert sorted(set(BLOCKS) - set(pages)) == ["speed-smollm2-methods"]  # the README's numbers
    assert set(pages) <= set(BLOCKS)
    files = {path.stem for path in docs_hooks.RESULTS.glob("*.json")}
    assert files == set(KNOWN["results"])
    assert {name for names in KNOWN["blocks"].values() for name in names} <= files
    assert readme.main(["--check"]) == 0


def test_cells_are_the_files_numbers():
    data = json.loads((docs_hooks.RESULTS / "evaluation-smollm2.json").read_text("utf-8"))
    row = next(r for r in data["rows"] if r["label"] == "dart@0.5" and "arc_easy" in r["task"])
    (line,) = [
        line
        for part in docs_hooks.measured("evaluation-smollm2").split("**arc_easy")[1:]
        for line in part.split("**")[1].splitlines()
        if line.startswith("| dart@0.5 |")
    ]
    assert f"| {row['achieved']:.1%} | {row['value']:.3f} (" in line
    assert line.endswith(f"| {row['dense_share']:.1%} | {row['remasks']:,} |")
    data = {"renamed": {"dart": "dart-prompt"}}
    assert docs_hooks.today("dart@0.5", data) == "dart-prompt@0.5"
    assert docs_hooks.today("dart-token", data) == "dart-token"


def test_every_variable_of_the_scripts_is_explained():
    table = docs_hooks.variables()
    script = (ROOT / "run_experiment.sh").read_text(encoding="utf-8")
    names = re.findall(r'^: "\$\{([A-Z_]+):=', script, re.MULTILINE)
    assert len(names) > 30
    assert [name for name in names if f"| `{name}` |" not in table] == []
    assert [name for name in names if not re.search(rf"\b{name}\b", PAGES["scripts.md"])] == []
    assert {name.lower() for name in names} <= set(RunSettings.model_fields)


def test_every_command_is_on_the_page_of_commands():
    page = docs_hooks.commands()
    for name in ("run", "compare", "bench quality", "prompts generate", "serve"):
        assert f"\n## dart-llm {name}\n" in page
    assert "| `--total-prune-percent`" in page and "\b" not in page


@pytest.mark.contract("no data set's text in the repository")
def test_results_hold_no_text_of_a_data_set():
    phrases = ("Homarus gammarus", "Prison Link Cymru", "Boarden", "type-Ia")
    for path in docs_hooks.RESULTS.iterdir():
        text = path.read_text(encoding="utf-8")
        assert [phrase for phrase in phrases if phrase in text] == [], path.name
