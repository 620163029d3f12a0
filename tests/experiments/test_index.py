"""The list of runs: what is found, filtered and shown, also where files are damaged."""

import csv
import json
import os

import pytest
from rich.console import Console

from dart_llm.errors import ConfigError, UnknownName
from dart_llm.experiments import index
from dart_llm.experiments.index import records, show, table, to_csv, to_json, to_markdown
from dart_llm.experiments.result_line import ResultLine
from dart_llm.experiments.store import release, take
from dart_llm.files import write_json, write_lines

CHECKPOINT = {"name": "Qwen2.5-0.5B", "file_quantisation": "none", "dtype": "float32"}


def line(method, requested, value, task="arc_easy", **more):
    label = method if method == "dense" else f"{method}@{requested:g}"
    given = {"metric": "acc", "model": "Qwen2.5-0.5B", "achieved": requested, **more}
    return ResultLine(
        label=label, method=method, task=task, value=value, requested=requested, **given
    )


def write_run(folder, lines, **config):
    folder.mkdir(parents=True)
    usual = {"status": "complete", "kind": "sweep", "checkpoint": CHECKPOINT}
    usual |= {"started": "2026-05-01T10:00:00+00:00", "finished": "2026-05-01T10:01:30+00:00"}
    write_json(folder / "config.json", {**usual, **config})
    write_lines(folder / "rows.jsonl", [one.model_dump() for one in lines])
    return folder


def write_sweep(folder, **changes):
    """Six cells planned, five computed, one of them failed."""
    lines = [line("dense", 0.0, 0.6), line("dart", 0.3, 0.55), line("dart", 0.5, 0.45)]
    lines += [line("griffin", 0.5, 0.25), line("griffin", 0.7, None, error="the loss is NaN")]
    cells = [{"method": one.method, "task": one.task} for one in lines]
    cells += [{"task": "mmlu", "method": "dart"}]
    return write_run(folder, lines, **{"status": "interrupted", "cells": cells, **changes})


@pytest.fixture
def root(tmp_path):
    """A run, an eval, a sweep, and folders that are not runs."""
    root = tmp_path / "results"
    texts = [line("dense", 0.0, 20.0, "perplexity:embedded", metric="perplexity")]
    texts += [line("dart", 0.5, 22.5, "perplexity:embedded", metric="perplexity", remasks=2)]
    main = {"kind": "run", "started": "2026-03-04T05:06:07+00:00"}
    write_run(root / "main" / "20260304-050607", texts, **main)
    evaluated = {"kind": "eval", "started": "2026-04-01T12:00:00+00:00", "finished": None}
    (one,) = [line("griffin", 0.5, 0.5, low=0.4, high=0.6, dense_share=0.04)]
    write_run(root / "eval-qwen-griffin-0.5" / "20260401-120000", [one], **evaluated)
    write_sweep(root / "grids" / "first" / "20260501-100000")
    (root / "a-model").mkdir()
    write_json(root / "a-model" / "config.json", {"model_type": "gpt2"})
    (root / "tensorboard" / "main" / "20260304-050607").mkdir(parents=True)
    (root / ".cache" / "20260304-050607").mkdir(parents=True)
    return root


def test_runs_of_every_kind_are_found_in_order_with_their_lines(root):
    runs = index.find(root)
    assert [run.experiment for run in runs] == ["main", "eval-qwen-griffin-0.5", "grids/first"]
    assert index.find(root / "grids" / "first")[0].experiment == "first"
    (alone,) = index.find(root / "main" / "20260304-050607")
    assert (alone.experiment, alone.time) == ("main", "20260304-050607")
    main, evaluation, sweep = runs
    assert [one.value for one in main.lines] == [20.0, 22.5]
    assert (evaluation.lines[0].low, evaluation.seconds) == (0.4, None)
    assert (sweep.methods, sweep.sparsities, sweep.seconds) == (
        ("dart", "griffin"),
        (0.3, 0.5, 0.7),
        90,
    )
    data = json.loads(to_json(runs))
    assert [len(run["rows"]) for run in data] == [2, 1, 5] and data[2]["cells"] == 6
    assert data[2]["results"][-2:] == ["5 of 6 cells", "1 failed"]
    assert data[0]["results"] == ["perplexity:embedded 22.5"]


FILTERS = [
    ({}, {"main": 2, "eval-qwen-griffin-0.5": 1, "grids/first": 5}),
    ({"method": "GRIFFIN"}, {"eval-qwen-griffin-0.5": 1, "grids/first": 2}),
    ({"method": "dart", "task": "arc"}, {"grids/first": 2}),
    ({"method": "dart", "task": "perplexity"}, {"main": 1}),
    ({"model": "gpt2"}, {}),
    ({"status": "Interrupted"}, {"grids/first": 5}),
    ({"experiment": "eval"}, {"eval-qwen-griffin-0.5": 1}),
    ({"since": "2026-04-01"}, {"eval-qwen-griffin-0.5": 1, "grids/first": 5}),
    ({"since": "2026-05-01T10:00:00+00:00"}, {"grids/first": 5}),
    ({"since": "2026-05-01T10:00:01+00:00"}, {}),
]


@pytest.mark.parametrize(("given", "expected"), FILTERS)
def test_runs_and_their_lines_are_chosen(root, given, expected):
    found = index.filter(index.find(root), **given)
    assert {run.experiment: len(run.lines) for run in found} == expected


def test_an_unfinished_run_may_still_get_what_it_plans(tmp_path):
    settings = {"model": "org/Llama", "method": "dart", "tasks": ["boolq", "rte"]}
    write_run(tmp_path / "a" / "20260101-000000", [], status="failed", settings=settings)
    (run,) = runs = index.find(tmp_path)
    assert (run.models, run.methods) == (("Llama",), ("dart",))
    assert index.filter(runs, model="llama", method="dart") == runs
    assert index.filter(runs, method="griffin") == []


def test_what_cannot_be_chosen_or_found(root, tmp_path):
    runs = index.find(root)
    with pytest.raises(UnknownName, match=r"unknown status 'compleet'; did you mean complete\?"):
        index.filter(runs, status="compleet")
    with pytest.raises(ConfigError, match='--since "yesterday" is not a date: write 2026-03-04'):
        index.filter(runs, since="yesterday")
    with pytest.raises(ConfigError, match=r"there is no results folder .*: give the folder"):
        index.find(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="has no runs"):
        index.find(tmp_path / "empty")


def test_a_run_that_was_killed_is_not_running(tmp_path):
    for name, process in (("a", None), ("b", os.getpid())):
        folder = tmp_path / name / "20260101-000000"
        write_run(folder, [], status="running", process=process)
    lock = take(tmp_path / "a" / "20260101-000000")
    found = {run.experiment: run.status for run in index.find(tmp_path)}
    assert found == {"a": "running", "b": "stopped"}
    release(lock)


def test_damaged_folders_are_listed_with_what_is_known(tmp_path):
    half = tmp_path / "half" / "20250103-000000"
    half.mkdir(parents=True)
    (half / "config.json").write_text('{"status": "compl', encoding="utf-8")
    broken = write_sweep(tmp_path / "torn" / "20250104-000000")
    with (broken / "rows.jsonl").open("a") as file:
        file.write('{"label": 3}\n{"label": "half')
    first, torn = index.find(tmp_path)
    assert (first.status, index.results(first)) == (
        "unknown",
        ["config.json is missing or damaged"],
    )
    assert len(torn.lines) == 5
    assert _text(table([first, torn])) and _text(show(first)) and _text(show(torn))


def _text(shown, width=120):
    console = Console(width=width, no_color=True)
    with console.capture() as capture:
        console.print(shown)
    return capture.get()


def test_every_form_of_the_list_has_the_same_numbers(root, snapshot):
    runs = index.find(root)
    for width in (80, 110):  # nothing is cut off
        text = _text(table(runs), width)
        assert max(map(len, text.splitlines())) <= width and "…" not in text
    assert _text(table(runs)) == snapshot(name="short")
    assert _text(table(runs, long=True)) == snapshot(name="long")
    rows = list(csv.DictReader(to_csv(runs, long=True).splitlines()))
    assert [row["value"] for row in rows][:3] == ["20.0", "22.5", "0.5"] and len(rows) == 8
    assert to_markdown(runs, long=True).count("\n") == 10
    assert "| 50.0% |" in to_markdown(runs)
    assert json.loads(to_json([])) == [] and records([]) == []
    assert to_csv([]) == "\n" and to_markdown([]) == "|  |\n|  |\n"
