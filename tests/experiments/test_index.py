"""The list of runs: what is found, chosen and shown, also where files are old or damaged."""

from __future__ import annotations

import csv
import datetime
import io
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dart_llm.errors import ConfigError, UnknownName
from dart_llm.experiments import index
from dart_llm.experiments.folder_lock import take
from dart_llm.experiments.index import (
    records,
    results,
    show,
    table,
    to_csv,
    to_json,
    to_markdown,
)
from dart_llm.files import write_json, write_lines
from dart_llm.reporting.console import Ui
from dart_llm.studies.generate.settings import RunSettings
from dart_llm.studies.generate.study import run_job
from fake_lists import cell, made, write_root, write_sweep
from tiny_gpt2 import write_gpt2


@pytest.fixture
def root(tmp_path) -> Path:
    return write_root(tmp_path / "results")


def test_runs_of_every_kind_are_found_in_order(root):
    runs = index.find(root)
    assert [(run.experiment, run.time, run.kind, run.status) for run in runs] == [
        ("main", "20260304-050607", "run", "complete"),
        ("eval-qwen-griffin-0.5", "20260401-120000", "eval", "complete"),
        ("grids/first", "20260501-100000", "sweep", "interrupted"),
    ]
    assert [run.problems for run in runs] == [(), (), ()]
    assert index.find(root / "grids" / "first")[0].experiment == "first"
    one = index.find(root / "main" / "20260304-050607")
    assert [(run.experiment, run.time) for run in one] == [("main", "20260304-050607")]


def test_a_run_has_its_text_and_its_perplexities(root):
    run = index.find(root)[0]
    assert (run.models, run.quantisations, run.dtypes) == (
        ("SmolLM2-135M-Instruct",),
        ("Q4_K_M",),
        ("bfloat16",),
    )
    assert (run.methods, run.sparsities) == (("dart",), (0.2, 0.5))
    assert run.seconds == 132.0
    assert run.started == datetime.datetime(2026, 3, 4, 5, 6, 7, tzinfo=datetime.UTC)
    found = [(row.task, row.label, row.achieved, row.dense_share, row.remasks) for row in run.rows]
    assert found == [
        ("generate", "dense", 0.0, 1.0, 0),
        ("generate", "dart@0.5", 0.4375, 0.125, 2),
        ("perplexity:embedded", "dense", 0.0, 1.0, 0),
        ("perplexity:embedded", "dart@0.2", 0.2, 0.0, 0),
        ("perplexity:embedded", "dart@0.5", 0.5, 0.0, 0),
        ("perplexity:embedded", "griffin@0.5", 0.5, 0.0, 0),
    ]
    assert run.rows[1].value == pytest.approx(1 / 0.0445)
    assert [row.value for row in run.rows[2:4]] == [17.62, pytest.approx(17.62 * 1.08)]
    assert results(run) == [
        "dart@0.5 generate 22.47 tokens/s",
        "dart@0.2 perplexity:embedded 19.03",
        "dart@0.5 perplexity:embedded 37",
        "griffin@0.5 perplexity:embedded 44.4",
    ]


def test_an_evaluation_has_its_measurements(root):
    run = index.find(root)[1]
    assert (run.models, run.dtypes, run.tasks) == (("Qwen2.5-0.5B",), ("float32",), ("arc_easy",))
    (row,) = run.rows
    assert (row.metric, row.value, row.items, row.protocol) == ("acc", 0.5, 2, "decode")
    assert (row.asked, row.achieved, row.dense_share, row.remasks) == (0.5, 0.48, 0.125, 2)
    assert results(run) == ["arc_easy acc 0.5"]


def test_a_sweep_has_its_cells_and_says_what_is_missing(root):
    run = index.find(root)[2]
    assert (run.methods, run.sparsities) == (("dense", "dart", "griffin"), (0.3, 0.5, 0.7))
    assert run.tasks == ("arc_easy", "mmlu")
    assert run.seconds == 90.0
    assert [(row.label, row.status, row.value) for row in run.rows] == [
        ("dense", "done", 0.6),
        ("dart@0.3", "done", 0.55),
        ("dart@0.5", "done", 0.45),
        ("griffin@0.5", "done", 0.25),
        ("griffin@0.7", "failed", None),
    ]
    assert results(run) == [
        "dart@0.3 arc_easy acc 0.55",
        "dart@0.5 arc_easy acc 0.45",
        "griffin@0.5 arc_easy acc 0.25",
        "griffin@0.7 mmlu failed: the loss is NaN at item 3",
        "5 of 6 cells",
        "1 failed",
    ]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"main": 6, "eval-qwen-griffin-0.5": 1, "grids/first": 5}),
        ({"model": "qwen"}, {"eval-qwen-griffin-0.5": 1, "grids/first": 5}),
        ({"method": "GRIFFIN"}, {"main": 1, "eval-qwen-griffin-0.5": 1, "grids/first": 2}),
        ({"method": "dart", "task": "arc"}, {"grids/first": 2}),
        ({"task": "mmlu", "status": "complete"}, {}),
        ({"task": "perplexity"}, {"main": 4}),
        ({"status": "Interrupted"}, {"grids/first": 5}),
        ({"experiment": "FIRST"}, {"grids/first": 5}),
        ({"since": "2026-04-01"}, {"eval-qwen-griffin-0.5": 1, "grids/first": 5}),
        ({"since": "2026-05-01T10:00:01+00:00"}, {}),
        ({"model": "nothing"}, {}),
    ],
)
def test_runs_and_their_rows_are_chosen(root, given, expected):
    found = index.filter(index.find(root), **given)
    assert {run.experiment: len(run.rows) for run in found} == expected


def test_an_unfinished_run_is_found_by_what_it_was_asked(tmp_path):
    folder = made(tmp_path / "x" / "20260101-000000")
    settings = {"model": "org/Llama", "method": "dart", "tasks": "boolq, rte"}
    write_json(folder / "config.json", {"status": "failed", "settings": settings})
    runs = index.find(tmp_path)
    assert (runs[0].models, runs[0].methods, runs[0].tasks) == (
        ("Llama",),
        ("dart",),
        ("boolq", "rte"),
    )
    assert len(index.filter(runs, model="llama", method="dart", task="rte")) == 1
    assert index.filter(runs, method="griffin") == []


def test_what_cannot_be_chosen(root):
    runs = index.find(root)
    with pytest.raises(UnknownName, match=r"unknown status 'compleet'; did you mean complete\?"):
        index.filter(runs, status="compleet")
    with pytest.raises(ConfigError, match='--since "yesterday" is not a date: write 2026-03-04'):
        index.filter(runs, since="yesterday")


def test_no_folder_and_no_runs(tmp_path):
    with pytest.raises(ConfigError, match=r"there is no results folder .*: give the folder"):
        index.find(tmp_path / "none")
    with pytest.raises(ConfigError, match="holds no runs"):
        index.find(tmp_path)


def test_a_run_that_was_killed_is_not_running(tmp_path):
    for name, process in (("a", None), ("b", os.getpid()), ("c", 2**22 + 7)):
        folder = made(tmp_path / name / "20260101-000000")
        write_json(folder / "config.json", {"status": "running", "process": process})
    lock = take(tmp_path / "a" / "20260101-000000")
    assert lock is not None
    found = {run.experiment: run.status for run in index.find(tmp_path)}
    assert found == {"a": "running", "b": "stopped", "c": "stopped"}
    lock.release()


def test_old_and_damaged_folders_are_listed_with_what_is_known(tmp_path):
    old = made(tmp_path / "old" / "20250101-000000")
    write_json(old / "config.json", {"status": "complete", "settings": {"model": "gpt2"}})
    made(tmp_path / "empty" / "20250102-000000-1")
    half = made(tmp_path / "half" / "20250103-000000")
    (half / "config.json").write_text('{"status": "compl', encoding="utf-8")
    (half / "perplexity.json").write_bytes(b"\xff\xfe\xff")
    table_ = write_sweep(tmp_path / "table" / "20250104-000000", started=None)
    with (table_ / "results.jsonl").open("a") as file:
        file.write('{"key": "half')
    found = {run.experiment: run for run in index.find(tmp_path)}
    assert [*found] == ["old", "empty", "half", "table"]
    assert {name: (run.status, run.problems) for name, run in found.items()} == {
        "old": ("complete", ()),
        "empty": ("unknown", ("config.json is missing or empty",)),
        "half": ("unknown", ("config.json is damaged", "perplexity.json cannot be read")),
        "table": ("interrupted", ("results.jsonl is damaged",)),
    }
    assert (found["old"].kind, found["old"].models) == ("run", ("gpt2",))
    assert found["empty"].started == datetime.datetime(2025, 1, 2)
    assert len(found["table"].rows) == 5


def test_one_folder_that_breaks_the_reader_does_not_hide_the_others(root):
    (root / "main" / "20260304-050607" / "timing.json").write_text(f'{{"total_s": {10**400}}}')
    runs = {run.experiment: run for run in index.find(root)}
    assert len(runs) == 3
    assert runs["main"].status == "unknown"
    assert runs["main"].problems[0].startswith("cannot be read (OverflowError: ")


def test_a_folder_that_a_real_job_wrote(tmp_path):
    model = tmp_path / "gpt2"
    model.mkdir()
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 4, encoding="utf-8")
    settings = RunSettings(
        model=str(write_gpt2(model)),
        prompt="hello",
        generation=4,
        sparsity=0.5,
        method="griffin",
        eval_perplexity=True,
        ppl_datasets=str(text),
        ppl_prompt_tokens=32,
        ppl_scored_tokens=16,
        results_dir=str(tmp_path / "results"),
    )
    job = run_job(settings, Ui(quiet=True))
    (run,) = index.find(tmp_path / "results")
    assert (run.path, run.status, run.kind, run.problems) == (job.path, "complete", "run", ())
    assert (run.models, run.methods, run.sparsities) == (("gpt2",), ("griffin",), (0.5,))
    rows = {(row.task, row.method): row for row in run.rows}
    written = job.perplexity[0]["rows"][1]
    found = rows[f"perplexity:{text}", "griffin"]
    assert (found.value, found.achieved) == (written["perplexity"], 0.5)
    accounting = job.generations["pruned"]["accounting"]
    assert rows["generate", "griffin"].achieved == accounting["achieved_sparsity"]
    assert rows["generate", "griffin"].value == job.timing["tokens_per_second"]["pruned"]
    assert results(run)[1] == f"perplexity:text.txt {written['perplexity']:.4g}"


# what is shown


def test_no_content_of_a_folder_is_an_exception(root):
    """Any value of any file replaced by something of another kind."""
    noise = random.Random(0)
    odd = [None, True, -1, 1e400, "text", "", [], [1], {}, {"a": 1}, [[]], "2026-13-40"]
    files = [*root.rglob("config.json"), *root.rglob("*.jsonl"), *root.rglob("measurements.json")]
    files += [*root.rglob("perplexity.json"), *root.rglob("timing.json")]
    for _ in range(100):
        path = noise.choice(files)
        before = path.read_text()
        lines = before.splitlines() if path.suffix == ".jsonl" else [before]
        data = [json.loads(line) for line in lines]
        _spoil(data, noise, noise.choice(odd))
        path.write_text("\n".join(json.dumps(line) for line in data))
        runs = index.find(root)
        assert len(runs) == 3
        assert not [p for run in runs for p in run.problems if p.startswith("cannot be read (")]
        json.loads(to_json(runs), parse_constant=pytest.fail)
        for long in (False, True):
            assert to_csv(runs, long) and to_markdown(runs, long) and _text(table(runs, long))
        assert all(_text(show(run)) for run in runs)
        path.write_text(before)


def _spoil(data: Any, noise: random.Random, value: Any) -> None:
    """Replace one value somewhere in nested data."""
    keys = list(data) if isinstance(data, dict) else range(len(data))
    key = noise.choice(list(keys))
    inside = data[key]
    if isinstance(inside, dict | list) and inside and noise.random() < 0.85:
        _spoil(inside, noise, value)
    else:
        data[key] = value


def _text(shown: Any, width: int = 120) -> str:
    console = Console(width=width, no_color=True)
    with console.capture() as capture:
        console.print(shown)
    return capture.get()


def test_the_table_has_every_number_beside_its_run(root):
    runs = index.find(root)
    lines = [" ".join(line.split()) for line in _text(table(runs)).splitlines()]
    assert "eval-qwen-griffin-0.5 griffin 50% 48.0% 12.5% 2 arc_easy acc 0.5" in lines
    assert "main dart 50% 43.8% 12.5% 2 generate 22.47 tokens/s" in lines
    assert "20260304-050607 run, complete dart 20% 20.0% 0.0% 0 perplexity:embedded 19.03" in lines
    assert not any("dense 0%" in line for line in lines)
    whole = _text(table(runs, long=True))
    assert "dense" in whole and "perplexity:embedded 17.62" in whole
    for width in (80, 110):  # nothing is cut off
        text = _text(table(runs), width)
        assert max(map(len, text.splitlines())) <= width and "…" not in text
        assert "Q4_K_M, bfloat16" in text and "griffin" in text


def test_many_rows_are_counted_and_leaks_are_named(tmp_path):
    folder = write_sweep(tmp_path / "[bold]" / "20260501-100000")
    rows = [cell("dart", 0.1 * i, "arc_easy", 0.5) for i in range(1, 8)]
    write_lines(folder / "results.jsonl", rows)
    run = index.find(tmp_path)[0]
    assert results(run) == ["7 results", "7 of 6 cells"]
    text = _text(table([run]))
    assert "[bold]" in text and "7 results" in text
    leaking = cell("published", 0.5, "arc_easy", 0.75)
    leaking["measurement"]["protocol"] = "published"
    write_lines(folder / "results.jsonl", [leaking])
    assert results(index.find(tmp_path)[0])[0] == "arc_easy (published) acc 0.75"


def test_json_csv_and_markdown_hold_the_same_numbers(root):
    runs = index.find(root)
    document = json.loads(to_json(runs))
    assert [run["experiment"] for run in document] == [run.experiment for run in runs]
    assert document[2]["cells"] == 6
    assert document[2]["rows"][2]["achieved_sparsity"] == 0.5
    assert document[2]["rows"][4]["error"] == "the loss is NaN at item 3"
    rows = list(csv.DictReader(io.StringIO(to_csv(runs, long=True))))
    assert len(rows) == 12
    assert rows[8]["label"] == "dart@0.3" and rows[8]["value"] == "0.55"
    assert rows[11]["value"] == "" and rows[11]["result"] == "failed"
    short = list(csv.DictReader(io.StringIO(to_csv(runs))))
    assert short[1]["achieved_sparsity"] == "0.48" and short[1]["quantisation"] == "none"
    assert short[2]["method"] == "dense dart griffin" and short[2]["sparsity"] == "0.3 0.5 0.7"
    lines = to_markdown(runs).splitlines()
    assert len(lines) == 5 and len({line.count("|") for line in lines}) == 1
    assert "| griffin | 50.0% | arc_easy | 48.0% | 12.5% | 2 | arc_easy acc 0.5 |" in lines[3]


def test_nothing_left_to_show_is_still_valid():
    assert json.loads(to_json([])) == []
    assert records([]) == []
    assert to_csv([]) == "\n" and to_markdown([]) == "|  |\n|  |\n"


def test_what_one_run_holds(root):
    run = index.find(root / "main")[0]
    text = " ".join(_text(show(run)).split())
    for part in ("complete", "132 s", "Q4_K_M, bfloat16", "torch 2.13.0", "with changes"):
        assert part in text
    assert "'Why is the sky blue? <script>'" in text and "perplexity.json (" in text
