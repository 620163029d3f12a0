"""Published tables and lists: no page is stale, commands exist, nothing of a data set is shown."""

import hashlib
import re
import shlex

import keep
import lists
import pytest
import reproduce
import tables

from dart_llm.files import write_json
from shells import ROOT

PAGES = {path: path.read_text(encoding="utf-8") for path in tables.pages()}
NAMES = sorted(path.stem for path in tables.RESULTS.glob("*.md"))


def test_every_kept_table_names_its_commands_files_and_commit():
    assert len(NAMES) > 60
    for name in NAMES:
        commands, provenance, body = tables.sections(name)
        for command in commands.splitlines():
            assert shlex.split(command)[0] in ("dart-llm", "python"), name
        files = re.findall(r"\]\(([\w.-]+\.json)\)", provenance)
        assert files and all((tables.RESULTS / file).is_file() for file in files), name
        assert re.search(r"commit [0-9a-f]{7} \(\d{4}-\d\d-\d\d\)", provenance), name
        widths = {line.count("|") for line in body.splitlines() if line.startswith("| ")}
        assert len(widths) <= 12 and "None" not in body and "{" not in body, name


def test_stale_pages_are_named_and_written_again(capsys, tmp_path, monkeypatch):
    assert tables.main(["--check"]) == 0, capsys.readouterr().out
    page = tmp_path / "page.md"
    page.write_text("Before.\n\n<!-- table: kills -->\nold\n<!-- end of table -->\n\nAfter.\n")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "pages", lambda: [page])
    assert tables.main(["--check"]) == 1
    assert capsys.readouterr().out == "page.md is stale: run python benchmarks/tables.py\n"
    assert tables.main([]) == 0 == tables.main(["--check"])
    text = page.read_text()
    assert text.startswith("Before.\n\n<!-- table: kills -->\n\n| command | SIGKILLs |")
    assert "benchmarks/results/kills.json)" in text and "old" not in text
    assert text.endswith("\n\n<!-- end of table -->\n\nAfter.\n")


def test_a_page_of_prose_shows_two_tables_at_most_and_no_placeholder():
    for path, text in PAGES.items():
        assert len(re.findall("<!-- table: .* -->\n", text)) <= 2, path.name
        prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
        assert "{{" not in re.sub(r"`[^`]+`", "", prose), path


def test_a_finished_run_is_kept_in_the_layout_that_pages_read(tmp_path, monkeypatch, capsys):
    facts = {"name": "m", "file_quantisation": "Q4_1", "dtype": "float32", "path": "/x/m"}
    config = {"kind": "speed", "command": ["dart-llm", "bench", "speed", "--results-dir", "/x"]}
    config |= {"status": "complete", "checkpoint": facts, "finished": "2026-01-02T03:04:05"}
    config |= {"machine": {"threads": 2, "processor": "CPU"}, "git": {"commit": "abcdef0123"}}
    write_json(tmp_path / "config.json", config)
    write_json(tmp_path / "speed.json", {"rows": [1]})
    (tmp_path / "speed.md").write_text("| a |\n| --- |\n")
    monkeypatch.setattr(keep, "RESULTS", tmp_path / "kept")
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "kept")
    (tmp_path / "kept").mkdir()
    monkeypatch.setattr("sys.argv", ["keep.py", "mine", str(tmp_path)])
    keep.main()
    commands, provenance, body = tables.sections("mine")
    assert (commands, body) == ("dart-llm bench speed", "| a |\n| --- |")
    assert provenance == (
        "m (file quantisation Q4_1, float32), 2 threads of CPU; commit abcdef0 (2026-01-02). "
        "File: [mine.json](mine.json)."
    )
    assert "/x" not in (tmp_path / "kept/mine.json").read_text()
    write_json(tmp_path / "config.json", config | {"status": "failed"})
    with pytest.raises(SystemExit, match="is failed: finish the run first"):
        keep.main()


def test_inputs_are_recognised_by_their_checksum(tmp_path, monkeypatch, capsys):
    sums = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("one", "two")}
    monkeypatch.setattr(reproduce, "INPUTS", {"a.txt": {"sha256": sums["one"], "get": "the hub"}})
    wanted = f"Expected: sha256 {sums['one']}. Where to get it: the hub."
    assert reproduce.problem("a.txt", None).startswith(f"a.txt is missing. {wanted}")
    file = tmp_path / "a.txt"
    file.write_text("two")
    assert reproduce.problem("a.txt", file) == f"{file} has sha256 {sums['two']}. {wanted}"
    file.write_text("one")
    assert reproduce.problem("a.txt", file) is None
    listing = "".join(f"{hashlib.sha256(n.encode()).hexdigest()}  {n}\n" for n in ("a.txt",))
    file.write_text("a.txt")
    assert reproduce.sha256(tmp_path) == hashlib.sha256(listing.encode()).hexdigest()


def test_a_table_is_shown_before_it_is_made(capsys, tmp_path):
    dry = ["evaluation-smollm2", "--dry-run", "--texts", str(tmp_path)]
    assert reproduce.main(dry) == 0
    shown = capsys.readouterr()
    assert shown.out == "$ dart-llm sweep benchmarks/evaluation_smollm2.yaml\n"
    assert "xsum.jsonl is missing. Expected: sha256 e1f145" in shown.err
    assert reproduce.main(["quality-tokn"]) == 2
    assert "did you mean quality-token?" in capsys.readouterr().err
    assert reproduce.main([]) == 0 and capsys.readouterr().out.split() == NAMES


def test_every_variable_of_the_scripts_is_explained():
    table = lists.variables()
    script = (ROOT / "run_experiment.sh").read_text(encoding="utf-8")
    names = re.findall(r'^: "\$\{([A-Z_]+):=', script, re.MULTILINE)
    assert len(names) > 30
    assert [name for name in names if f"| `{name}` |" not in table] == []


@pytest.mark.contract("no data set's text in the repository")
def test_results_hold_no_text_of_a_data_set():
    phrases = ("Homarus gammarus", "Prison Link Cymru", "Boarden", "type-Ia")
    for path in tables.RESULTS.iterdir():
        text = path.read_text(encoding="utf-8")
        assert [phrase for phrase in phrases if phrase in text] == [], path.name
