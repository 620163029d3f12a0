"""The list of runs as shown: tables, JSON, CSV and Markdown."""

from __future__ import annotations

import csv
import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dart_llm.experiments import index as results_list
from dart_llm.experiments.index import ResultsSummary as RunInfo
from dart_llm.experiments.index import records, results, show, table, to_csv, to_json, to_markdown
from dart_llm.files import write_lines
from fake_lists import cell, write_root, write_sweep


@pytest.fixture
def root(tmp_path) -> Path:
    return write_root(tmp_path / "results")


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
        runs = results_list.find(root)
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
    runs = results_list.find(root)
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
    run = results_list.find(tmp_path)[0]
    assert results(run) == ["7 results", "7 of 6 cells"]
    text = _text(table([run]))
    assert "[bold]" in text and "7 results" in text
    leaking = cell("published", 0.5, "arc_easy", 0.75)
    leaking["measurement"]["protocol"] = "published"
    write_lines(folder / "results.jsonl", [leaking])
    assert results(results_list.find(tmp_path)[0])[0] == "arc_easy (published) acc 0.75"


def test_json_csv_and_markdown_hold_the_same_numbers(root):
    runs = results_list.find(root)
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
    run: RunInfo = results_list.find(root / "main")[0]
    text = " ".join(_text(show(run)).split())
    for part in ("complete", "132 s", "Q4_K_M, bfloat16", "torch 2.13.0", "with changes"):
        assert part in text
    assert "'Why is the sky blue? <script>'" in text and "perplexity.json (" in text
