"""The list of runs: what is found, chosen and shown, also where files are old or damaged."""

import json
import os
import random

import pytest
from rich.console import Console

from dart_llm.errors import ConfigError, UnknownName
from dart_llm.experiments import index
from dart_llm.experiments.folder_lock import take
from dart_llm.experiments.index import records, show, table, to_csv, to_json, to_markdown
from dart_llm.files import write_json, write_lines
from fake_cells import failed, one
from fake_results import write_results

CHECKPOINT = {"name": "Qwen2.5-0.5B", "file_quantisation": "none", "dtype": "float32"}


def made(folder):
    folder.mkdir(parents=True)
    return folder


def cell(method, sparsity, good, *achieved, **more):
    found = one(method, sparsity, good, *achieved, task="arc_easy", **more)
    return {**found, "checkpoint": CHECKPOINT}


def write_sweep(folder, **changes):
    """Six cells planned, five computed, one of them failed."""
    cells = [cell("dense", 0.0, 24), cell("dart", 0.3, 22), cell("dart", 0.5, 18)]
    lost = failed("griffin", 0.7, "mmlu", "the loss is NaN at item 3")
    cells += [cell("griffin", 0.5, 10), {**lost, "checkpoint": CHECKPOINT}]
    planned = [*(made["cell"] for made in cells), {"task": "mmlu", "method": "dart"}]
    config = {"status": "interrupted", "kind": "sweep", "cells": planned}
    times = {"started": "2026-05-01T10:00:00+00:00", "finished": "2026-05-01T10:01:30+00:00"}
    write_json(made(folder) / "config.json", {**config, **times, **changes})
    write_lines(folder / "results.jsonl", cells)
    return folder


@pytest.fixture
def root(tmp_path):
    """A run, an eval, a sweep, and folders that are no runs."""
    root = tmp_path / "results"
    write_results(root / "main" / "20260304-050607", {"kind": "run"})
    folder = made(root / "eval-qwen-griffin-0.5" / "20260401-120000")
    config = {
        "status": "complete",
        "kind": "eval",
        "settings": {"model": "x/Qwen", "method": "griffin", "tasks": "arc_easy"},
        "prune": {"method": "griffin", "sparsity": 0.5},
        "checkpoint": CHECKPOINT,
        "started": "2026-04-01T12:00:00+00:00",
    }
    write_json(folder / "config.json", config)
    entry = {**cell("griffin", 0.5, 20, 0.48)["measurement"], "method": "griffin", "sparsity": 0.5}
    write_json(folder / "measurements.json", {"measurements": [{**entry, "label": "griffin@0.5"}]})
    write_sweep(root / "grids" / "first" / "20260501-100000")
    write_json(made(root / "a-model") / "config.json", {"model_type": "gpt2"})
    made(root / "tensorboard" / "main" / "20260304-050607")
    made(root / ".cache" / "20260304-050607")
    return root


def test_runs_of_every_kind_are_found_in_order_with_their_rows(root, snapshot):
    runs = index.find(root)
    assert [run.problems for run in runs] == [(), (), ()]
    assert index.find(root / "grids" / "first")[0].experiment == "first"
    alone = index.find(root / "main" / "20260304-050607")
    assert [(run.experiment, run.time) for run in alone] == [("main", "20260304-050607")]
    assert to_json(runs).replace(str(root), "ROOT") == snapshot
    run, evaluation, sweep = runs
    assert [row.value for row in run.rows[1:4]] == pytest.approx([1 / 0.0445, 17.62, 17.62 * 1.08])
    (row,) = evaluation.rows
    assert (row.value, row.items, row.asked, row.achieved) == (0.5, 40, 0.5, 0.48)
    assert [row.value for row in sweep.rows] == [0.6, 0.55, 0.45, 0.25, None]


FILTERS = [
    ({}, {"main": 6, "eval-qwen-griffin-0.5": 1, "grids/first": 5}),
    ({"model": "qwen"}, {"eval-qwen-griffin-0.5": 1, "grids/first": 5}),
    ({"method": "GRIFFIN"}, {"main": 1, "eval-qwen-griffin-0.5": 1, "grids/first": 2}),
    ({"method": "dart", "task": "arc"}, {"grids/first": 2}),
    ({"method": "dart", "task": "mmlu"}, {"grids/first": 0}),  # unfinished: it may come
    ({"model": "smol", "method": "dart", "task": "perplexity"}, {"main": 2}),
    ({"task": "mmlu", "status": "complete"}, {}),
    ({"status": "Interrupted"}, {"grids/first": 5}),
    ({"since": "2026-04-01"}, {"eval-qwen-griffin-0.5": 1, "grids/first": 5}),
    ({"since": "2026-05-01T10:00:00+00:00"}, {"grids/first": 5}),
    ({"since": "2026-05-01T10:00:01+00:00"}, {}),
]


def test_runs_and_their_rows_are_chosen(root, tmp_path):
    runs = index.find(root)
    for given, expected in FILTERS:
        found = index.filter(runs, **given)
        assert {run.experiment: len(run.rows) for run in found} == expected, given
    # a complete run must have a row of everything that was asked, an unfinished one may get it
    done = index.find(write_sweep(tmp_path / "done" / "20260101-000000", status="complete"))
    assert index.filter(done, method="dart", task="mmlu") == []
    folder = made(tmp_path / "failed" / "20260101-000000")
    settings = {"model": "org/Llama", "method": "dart", "tasks": "boolq, rte"}
    write_json(folder / "config.json", {"status": "failed", "settings": settings})
    (run,) = runs = index.find(tmp_path / "failed")
    assert (run.models, run.methods, run.tasks) == (("Llama",), ("dart",), ("boolq", "rte"))
    assert index.filter(runs, model="llama", method="dart", task="rte") == runs
    assert index.filter(runs, method="griffin") == []


def test_what_cannot_be_chosen_or_found(root, tmp_path):
    runs = index.find(root)
    with pytest.raises(UnknownName, match=r"unknown status 'compleet'; did you mean complete\?"):
        index.filter(runs, status="compleet")
    with pytest.raises(ConfigError, match='--since "yesterday" is not a date: write 2026-03-04'):
        index.filter(runs, since="yesterday")
    with pytest.raises(ConfigError, match=r"there is no results folder .*: give the folder"):
        index.find(tmp_path / "none")
    with pytest.raises(ConfigError, match="holds no runs"):
        index.find(made(tmp_path / "empty"))


def test_a_run_that_was_killed_is_not_running(tmp_path):
    for name, process in (("a", None), ("b", os.getpid()), ("c", 2**22 + 7)):
        folder = made(tmp_path / name / "20260101-000000")
        write_json(folder / "config.json", {"status": "running", "process": process})
    lock = take(tmp_path / "a" / "20260101-000000")
    found = {run.experiment: run.status for run in index.find(tmp_path)}
    assert found == {"a": "running", "b": "stopped", "c": "stopped"}
    lock.release()


def test_old_and_damaged_folders_are_listed_with_what_is_known(tmp_path):
    old, _, half = (
        made(tmp_path / name)
        for name in ("old/20250101-000000", "empty/20250102-000000-1", "half/20250103-000000")
    )
    write_json(old / "config.json", {"status": "complete", "settings": {"model": "gpt2"}})
    (half / "config.json").write_text('{"status": "compl', encoding="utf-8")
    (half / "perplexity.json").write_bytes(b"\xff\xfe\xff")
    broken = write_sweep(tmp_path / "broken" / "20250104-000000", started=None)
    with (broken / "results.jsonl").open("a") as file:
        file.write('{"key": "half')
    odd = write_sweep(tmp_path / "odd" / "20260101-000000")
    (odd / "timing.json").write_text(f'{{"total_s": {10**400}}}')
    found = {run.experiment: run for run in index.find(tmp_path)}
    overflow = found["odd"].problems[0]
    assert overflow.startswith("cannot be read (OverflowError: ")
    assert [(name, run.status, run.problems) for name, run in found.items()] == [
        ("old", "complete", ()),
        ("empty", "unknown", ("config.json is missing or empty",)),
        ("half", "unknown", ("config.json is damaged", "perplexity.json cannot be read")),
        ("broken", "interrupted", ("results.jsonl is damaged",)),
        ("odd", found["odd"].status, (overflow,)),
    ]


def test_no_content_of_a_folder_is_an_exception(root):
    """Any value of any file replaced by something of another kind."""
    noise = random.Random(0)
    odd = [None, True, -1, 1e400, "text", "", [], [1], {}, {"a": 1}, [[]], "2026-13-40"]
    files = [*root.rglob("config.json"), *root.rglob("*.jsonl"), *root.rglob("measurements.json")]
    files += [*root.rglob("perplexity.json"), *root.rglob("timing.json")]
    for _ in range(60):
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


def _spoil(data, noise, value):
    """Replace one value somewhere in nested data."""
    keys = list(data) if isinstance(data, dict) else range(len(data))
    key = noise.choice(list(keys))
    inside = data[key]
    if isinstance(inside, dict | list) and inside and noise.random() < 0.85:
        _spoil(inside, noise, value)
    else:
        data[key] = value


def _text(shown, width=120):
    console = Console(width=width, no_color=True)
    with console.capture() as capture:
        console.print(shown)
    return capture.get()


def test_every_form_of_the_list_holds_the_same_numbers(root, snapshot):
    runs = index.find(root)
    for width in (80, 110):  # nothing is cut off
        text = _text(table(runs), width)
        assert max(map(len, text.splitlines())) <= width and "…" not in text
    assert _text(table(runs)) == snapshot(name="short")
    assert _text(table(runs, long=True)) == snapshot(name="long")
    for write in (to_csv, to_markdown):
        for long in (False, True):
            text = write(runs, long).replace(str(root), "ROOT")
            assert text == snapshot(name=f"{write.__name__} {long}")
    assert json.loads(to_json([])) == [] and records([]) == []
    assert to_csv([]) == "\n" and to_markdown([]) == "|  |\n|  |\n"
