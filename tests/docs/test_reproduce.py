"""scripts/reproduce.py: inputs by checksum, what would run, where it runs, which numbers agree."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from published import ROOT, scripts

with scripts():
    import reproduce
    from reproduce_compare import TOLERANCE, compare, numbers
    from reproduce_inputs import look, sha256
    from reproduce_items import shared, values
    from reproduce_list import listing, minutes
    from reproduce_run import Job, program
    from table_registry import Input, Table, registry

    KNOWN = registry(ROOT)
    LIST = listing(ROOT, KNOWN, lambda table: reproduce.inputs(table, ROOT / "none"))


def of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "shared/data"
    folder.mkdir(parents=True)
    return folder


def test_an_input_that_is_the_same_file_has_no_problem(texts: Path) -> None:
    (texts / "a.txt").write_text("one")
    found = look(Input("a.txt", of("one"), "anywhere"), texts)
    assert (found.path, found.problem) == (texts / "a.txt", None)


def test_a_missing_input_is_told_with_checksum_and_source(texts: Path) -> None:
    found = look(Input("a.txt", of("one"), "hub data set x/y"), texts)
    assert found.path is None
    assert found.problem == (
        f"a.txt is missing in {texts}. Expected: sha256 {of('one')}. Where to get it: hub data set "
        "x/y. Put it into a folder and give that: TEXTS=folder"
    )


def test_another_file_is_told_with_both_checksums(texts: Path) -> None:
    (texts / "a.txt").write_text("two")
    found = look(Input("a.txt", of("one"), "anywhere"), texts)
    assert found.problem is not None and found.path == texts / "a.txt"
    assert f"its sha256 is {of('two')}. Expected: sha256 {of('one')}." in found.problem


def test_a_folder_beside_the_texts_is_checked_by_the_files_that_matter(texts: Path) -> None:
    folder = texts.parent / "tasks"
    folder.mkdir()
    for name in ("b.yaml", "a.yaml", "other.txt"):
        (folder / name).write_text(name)
    expected = of(f"{of('a.yaml')}  a.yaml\n{of('b.yaml')}  b.yaml\n")
    assert sha256(folder, ("*.yaml",)) == expected
    assert look(Input("tasks", expected, "x", ("*.yaml",)), texts).problem is None
    (folder / "a.yaml").write_text("changed")
    assert look(Input("tasks", expected, "x", ("*.yaml",)), texts).problem is not None


def row(value: float, **own: Any) -> dict[str, Any]:
    interval = {"low": 0.4, "high": 0.6}
    return {"label": "dart@0.5", "task": "arc", "value": value, "interval": interval, **own}


@pytest.mark.parametrize(("again", "agrees"), [(0.4, True), (0.6, True), (0.61, False)])
def test_a_number_agrees_within_its_published_interval(again: float, agrees: bool) -> None:
    published = {"rows": [row(0.5)], "renamed": {"dart": "dart-prompt"}}
    (pair,) = compare(published, {"rows": [row(again, label="dart-prompt@0.5")]})
    assert (pair.name, pair.again, pair.agrees) == ("arc dart-prompt@0.5 value", again, agrees)


@pytest.mark.parametrize(("off", "agrees"), [(0.9, True), (1.1, False)])
def test_a_number_without_interval_may_be_off_by_two_percent(off: float, agrees: bool) -> None:
    published = {"cells": [{"variant": "dart", "perplexity": 20.0}]}
    again = {"cells": [{"variant": "dart", "perplexity": 20 * (1 + off * TOLERANCE)}]}
    (pair,) = compare(published, again)
    assert pair.agrees is agrees


def test_a_row_that_is_missing_does_not_agree() -> None:
    (pair,) = compare({"rows": [row(0.5)]}, {"rows": []})
    assert (pair.again, pair.agrees) == (None, False)


@pytest.mark.parametrize(
    "name",
    [
        n
        for n, t in KNOWN.tables.items()
        if not n.startswith(("serve-", "interrupts", "kills", "sanitized", "agreement"))
        and t.file(ROOT).is_file()
    ],
)
def test_every_published_file_has_numbers_and_agrees_with_itself(name: str) -> None:
    data = json.loads(KNOWN.tables[name].file(ROOT).read_text("utf-8"))
    pairs = compare(data, data)
    assert len(pairs) >= 3 and all(pair.agrees for pair in pairs)
    assert all("  " not in pair.name for pair in pairs)


def test_names_in_the_numbers_are_those_of_today() -> None:
    data = {"rows": [{"rule": "dart", "signal": "hidden", "rate": 1, "rate_interval": [1, 1]}]}
    assert list(numbers({**data, "renamed": {"dart": "dart-prompt"}})) == [
        "dart-prompt hidden rate"
    ]


def cell(*items: dict[str, Any]) -> dict[str, Any]:
    return {"label": "dart@0.5", "measurement": {"task": "t", "protocol": "decode", "items": items}}


def test_items_that_both_files_hold_are_compared(tmp_path: Path) -> None:
    files = {
        "old.jsonl": cell({"id": 0, "acc": 1.0, "tokens": 9}, {"id": 1, "acc": 0.0}),
        "new.jsonl": cell({"id": 1, "acc": 0.25}, {"id": 0, "acc": 1.0}, {"id": 5, "acc": 1.0}),
    }
    for name, row in files.items():
        (tmp_path / name).write_text(json.dumps(row) + "\n")
    assert str(shared(*(tmp_path / name for name in files))) == (
        "items: 1 of 2 values that both files hold are the same, the largest difference is 0.25"
    )
    assert str(shared(tmp_path / "old.jsonl", tmp_path / "none.jsonl")) == (
        "items: none that both files hold"
    )


def test_losses_of_passages_are_items(tmp_path: Path) -> None:
    topics = [{"topic": 0, "mean_loss": 3.5}, {"topic": 1, "mean_loss": None}]
    row = {"label": "never@0.5", "source": "p", "seed": 0, "loss": {"topics": topics}}
    text = {"label": "never@0.5", "source": "q", "seed": 0, "loss": None, "metrics": {"bleu": 0.5}}
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(row)}\n{json.dumps(text)}\n")
    assert values(tmp_path / "a.jsonl") == {
        ("never@0.5", "p", "0", "0"): 3.5,
        ("never@0.5", "q", "0", "bleu"): 0.5,
    }


def a_job(tmp_path: Path, short: bool = False) -> Job:
    return Job(ROOT, KNOWN.tables["quality-token"], tmp_path / "job", short)


def test_results_and_kept_files_go_to_a_folder_of_their_own(tmp_path: Path, texts: Path) -> None:
    job = a_job(tmp_path)
    first, second = job.commands()
    assert first[-4:] == ["--experiment-name", "1", "--results-dir", "../runs"]
    assert second[second.index("--model") + 1] == "qwen2.5-coder-0.5b-instruct.gguf"
    assert job.keeping()[:2] == ["python", "benchmarks/quality.py"]
    (texts / "w.txt").write_text("w")
    job.lay_out({"w.txt": texts / "w.txt", "m.gguf": texts / "w.txt", "tasks": texts})
    assert (job.clone / "../shared/data/w.txt").read_text() == "w"
    assert (job.clone / "m.gguf").is_file() and (job.clone / "../shared/tasks/w.txt").is_file()
    assert (job.clone / "benchmarks/quality.py").is_file()


def test_what_is_finished_is_kept_and_not_run_again(tmp_path: Path) -> None:
    job = a_job(tmp_path)
    for time, status in (("t1", "complete"), ("t2", "interrupted")):
        folder = job.folder / "runs/1" / time
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"status": status}))
        assert job.is_finished(1) is (status == "complete")
    assert not job.is_finished(2)
    assert str(job.folder / "runs/1/t2") in job.keeping()


def test_the_short_form_of_a_sweep_is_a_smaller_grid(tmp_path: Path) -> None:
    job = Job(ROOT, KNOWN.tables["evaluation-smollm2"], tmp_path / "job", True)
    job.lay_out({})
    assert job.commands()[0][:3] == ["dart-llm", "sweep", "short.yaml"]
    grid = yaml.safe_load((job.clone / "short.yaml").read_text())
    assert grid["methods"] == ["dense", "griffin"] and grid["sparsities"] == [0.5]
    assert {facts["limit"] for facts in grid["task_options"].values()} == {2}


def test_only_keep_replaces_the_committed_file(tmp_path: Path) -> None:
    results = tmp_path / "benchmarks/results"
    results.mkdir(parents=True)
    job = Job(tmp_path, Table("x", ("python x",)), tmp_path / "job", False)
    job.new.parent.mkdir(parents=True)
    for name in ("x.json", "x.jsonl", "other.json"):
        (job.new.parent / name).write_text(name)
    assert job.publish() == [results / "x.json", results / "x.jsonl"]
    assert sorted(path.name for path in results.iterdir()) == ["x.json", "x.jsonl"]


def test_commands_run_in_this_environment() -> None:
    assert program("python") == [sys.executable]
    assert Path(program("dart-llm")[0]).parent == Path(sys.executable).parent


def test_the_list_has_a_paragraph_per_table() -> None:
    parts = {part.splitlines()[0]: part for part in LIST.split("\n\n")}
    assert set(KNOWN.tables) <= set(parts)
    own = parts["drift-forced-qwen"]
    assert "pages: docs/measurements.md\n" in own and "took: 25 min on 2 cores of AMD EPYC" in own
    assert "\n  $ dart-llm drift --passages shipped " in own
    assert minutes(ROOT / "none.json") == "not measured yet"


def test_every_name_can_be_shown_and_all_commands_exist(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The dry run of all names, as CI does it: without any texts."""
    assert reproduce.main([*KNOWN.names(), "--dry-run", "--texts", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    for table in KNOWN.tables.values():
        assert f"{table.name}: " in shown.out
        for run in table.run:
            assert f"$ {run.split()[0]} {run.split()[1]}" in shown.out
            script = run.split()[1]
            assert not script.endswith(".py") or (ROOT / script).is_file()
    for name in KNOWN.inputs:
        assert (f"{name} is missing in {tmp_path}" in shown.err) is (name != "tasks")


def test_missing_texts_stop_with_exit_code_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert reproduce.main(["budgets-smollm2", "--texts", str(tmp_path)]) == 2
    assert "wikitext2_valid.txt is missing" in capsys.readouterr().err


def test_a_name_that_is_not_known_is_told_with_the_near_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert reproduce.main(["quality-tokn"]) == 2
    assert capsys.readouterr().err == (
        "no table is named quality-tokn: did you mean quality-token? make reproduce lists all\n"
    )


def test_make_passes_its_variables() -> None:
    variables = ("TABLE=quality-token", "TEXTS=hub", "SHORT=1", "KEEP=1")
    command = ["make", "--no-print-directory", "-n", "reproduce", *variables]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    call = shlex.split(done.stdout.partition("scripts/reproduce.py")[2].replace("\\\n", ""))
    assert call == ["quality-token", "--texts", "hub", "--short", "--keep"]


@pytest.mark.smollm2
def test_the_short_form_makes_a_table_of_quality(tmp_path: Path) -> None:
    """From a copy, so that this clone's results stay as they are."""
    for name in ("benchmarks", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    code = (
        "import sys, pathlib; sys.path.insert(0, 'scripts'); import reproduce; "
        "reproduce.ROOT = pathlib.Path.cwd(); raise SystemExit(reproduce.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "drift-forced-smollm2", "--short"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "numbers agree with drift-forced-smollm2.json" in done.stdout
    folder = tmp_path / "results/reproduce/drift-forced-smollm2-short/new"
    rows = json.loads((folder / "drift-forced-smollm2.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["dense", "never", "griffin"]
    lines = (folder / "drift-forced-smollm2.jsonl").read_text().splitlines()
    assert [json.loads(line)["source"] for line in lines] == ["01-bees-to-mortgages"] * 3
