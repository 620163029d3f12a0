"""Published tables and lists: every one is made of its results files, and no page is stale."""

import json
import re

import lists
import pytest
import rendering
import tables

from dart_llm.studies.generate.settings import RunSettings
from shells import ROOT

PAGES = {path: path.read_text(encoding="utf-8") for path in tables.pages()}
KNOWN = rendering.registry()
BLOCKS = [block for view in KNOWN["views"] for block in view["blocks"]]


@pytest.mark.parametrize("block", BLOCKS)
def test_every_table_is_made(block):
    made = rendering.whole(block)
    lines = [line for line in made.splitlines() if line.startswith("| ")]
    assert len({line.count("|") for line in lines if "Conv1D" not in line}) <= 2
    assert "None" not in "".join(lines) and "{" not in "".join(lines)


def test_every_table_stands_on_a_page_or_is_linked_and_every_file_is_in_a_table():
    text = "".join(PAGES.values())
    named = {*re.findall(r"<!-- table: ([\w.-]+) -->\n", text)}
    named |= {*re.findall(r"results/([\w.-]+)\.md\)", text)}
    assert named == set(BLOCKS)
    files = {path.stem for path in rendering.RESULTS.glob("*.json")}
    assert files == set(KNOWN["results"])
    beside = {path.stem for path in rendering.RESULTS.glob("*.md")}
    assert {name for name in beside if not name.startswith("gpu-")} == set(BLOCKS)
    assert {name for names in KNOWN["blocks"].values() for name in names} <= files


def test_no_table_or_list_is_stale(capsys):
    assert tables.main(["--check"]) == 0, capsys.readouterr().out


def test_a_stale_page_is_named_and_written_again(tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text("Before.\n\n<!-- table: kills -->\nold\n<!-- end of table -->\n\nAfter.\n")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "written", lambda: {page: tables.filled(page.read_text(), ROOT)})
    assert tables.main(["--check"]) == 1
    assert capsys.readouterr().out == "page.md is stale: run python benchmarks/tables.py\n"
    assert tables.main([]) == 0 == tables.main(["--check"])
    text = page.read_text()
    assert text.startswith("Before.\n\n<!-- table: kills -->\n\n| command | SIGKILLs |")
    assert "(benchmarks/results/kills.md)" in text and "old" not in text
    assert text.endswith("\n\n<!-- end of table -->\n\nAfter.\n")


def test_a_page_of_prose_shows_two_tables_at_most():
    for path, text in PAGES.items():
        assert len(re.findall("<!-- table: .* -->\n", text)) <= 2, path.name


def test_no_placeholder_is_left_in_markdown_of_the_repository():
    """Whoever reads a page without building the site sees what the site shows."""
    folders = (
        ROOT / name for name in ("docs", "benchmarks", "examples", "recipes", "tests", "src")
    )
    found = [*ROOT.glob("*.md"), *(path for folder in folders for path in folder.rglob("*.md"))]
    assert len(found) > 80
    for path in found:
        prose = re.sub(r"^```.*?^```$", "", path.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
        assert "{{" not in re.sub(r"`[^`]+`", "", prose), path


def test_cells_are_the_files_numbers():
    data = json.loads((rendering.RESULTS / "evaluation-smollm2.json").read_text("utf-8"))
    row = next(r for r in data["rows"] if r["label"] == "dart@0.5" and "arc_easy" in r["task"])
    (line,) = [
        line
        for part in rendering.whole("evaluation-smollm2").split("**arc_easy")[1:]
        for line in part.split("**")[1].splitlines()
        if line.startswith("| dart@0.5 |")
    ]
    assert f"| {row['achieved']:.1%} | {row['value']:.3f} (" in line
    assert line.endswith(f"| {row['dense_share']:.1%} | {row['remasks']:,} |")
    data = {"renamed": {"dart": "dart-prompt"}}
    assert rendering.today("dart@0.5", data) == "dart-prompt@0.5"
    assert rendering.today("dart-token", data) == "dart-token"


def test_the_first_numbers_of_the_readme_are_the_files():
    """No speed-up above what the bytes allow, though one was timed."""
    tuned, packed = (rendering.result(n) for n in ("tune-smollm2", "speed-packed-smollm2"))
    dense, token, mask = rendering.shown("front").splitlines()[2:5]
    ms = {row["row"]: row["ms"] for row in tuned["rows"] + tuned["reference_rows"]}
    assert f"| 1.00 x | {ms['llama.cpp Q4_1'] / ms['dense, weights file']:.2f} x |" in dense
    over = ms["dense, weights file"] / ms["dart-token 30 %, weights file"]
    assert f"| {over:.2f} x |" in token
    row = next(r for r in packed["runs"][0]["rows"] if r["row"] == "griffin 50 %, slim, file")
    assert row["times_own_dense"] > 1.02 * row["limit"]
    assert f"| {row['limit']:.2f} x |" in mask and f"{row['times_own_dense']:.2f}" not in mask


def test_every_variable_of_the_scripts_is_explained():
    table = lists.variables()
    script = (ROOT / "run_experiment.sh").read_text(encoding="utf-8")
    names = re.findall(r'^: "\$\{([A-Z_]+):=', script, re.MULTILINE)
    assert len(names) > 30
    assert [name for name in names if f"| `{name}` |" not in table] == []
    page = PAGES[ROOT / "docs/scripts.md"].replace(table, "")
    assert [name for name in names if not re.search(rf"\b{name}\b", page)] == []
    assert {name.lower() for name in names} <= set(RunSettings.model_fields)


def test_every_command_is_on_the_page_of_commands():
    page = PAGES[ROOT / "docs/cli.md"]
    for name in ("run", "compare", "bench quality", "prompts generate", "serve"):
        assert f"\n## dart-llm {name}\n" in page
    assert "| `--total-prune-percent`" in page and "\b" not in page


@pytest.mark.contract("no data set's text in the repository")
def test_results_hold_no_text_of_a_data_set():
    phrases = ("Homarus gammarus", "Prison Link Cymru", "Boarden", "type-Ia")
    for path in rendering.RESULTS.iterdir():
        text = path.read_text(encoding="utf-8")
        assert [phrase for phrase in phrases if phrase in text] == [], path.name
