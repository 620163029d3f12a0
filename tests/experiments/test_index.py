"""The list of runs: what is found, filtered and shown."""

import csv
import json

import pytest
from rich.console import Console

from dart_llm.errors import ConfigError, UnknownName
from dart_llm.experiments import index
from dart_llm.experiments.index import table, to_csv, to_json
from dart_llm.experiments.store import ResultLine, release, take
from dart_llm.files import write_json, write_lines


def line(method, requested, value, **more):
    label = method if method == "dense" else f"{method}@{requested:g}"
    given = {"label": label, "method": method, "requested": requested, "achieved": requested}
    given |= {"model": "Qwen2.5-0.5B", "task": "arc_easy", "metric": "acc", "value": value}
    return ResultLine(**{**given, **more})


def write_run(folder, lines, **config):
    folder.mkdir(parents=True)
    usual = {"status": "complete", "kind": "sweep", "settings": {}}
    usual |= {"started": "2026-05-01T10:00:00+00:00", "finished": "2026-05-01T10:01:30+00:00"}
    write_json(folder / "config.json", {**usual, **config})
    write_lines(folder / "rows.jsonl", [line.model_dump() for line in lines])


@pytest.fixture
def root(tmp_path):
    """A run, an eval, a sweep, an unfinished run, and a folder that is not a run."""
    root = tmp_path / "results"
    text = {"task": "perplexity:embedded", "metric": "perplexity"}
    texts = [line("dense", 0.0, 20.0, **text), line("dart", 0.5, 22.5, **text, remasks=2)]
    write_run(root / "main" / "20260304-050607", texts, started="2026-03-04T05:06:07+00:00")
    evaluated = {"kind": "eval", "started": "2026-04-01T12:00:00+00:00", "finished": None}
    griffin = line("griffin", 0.5, 0.5, low=0.4, high=0.6, dense_share=0.04)
    write_run(root / "eval" / "20260401-120000", [griffin], **evaluated)
    lines = [line("dense", 0.0, 0.6), line("dart", 0.3, 0.55), line("dart", 0.5, 0.45)]
    lines += [line("griffin", 0.5, 0.25), line("griffin", 0.7, None, error="the loss is NaN")]
    write_run(root / "grids" / "first" / "20260501-100000", lines, status="interrupted")
    settings = {"model": "org/Llama", "methods": ["dart"], "tasks": ["boolq", "rte"]}
    started = {"started": "2026-05-02T10:00:00+00:00", "status": "failed"}
    write_run(root / "begun" / "20260502-100000", [], settings=settings, **started)
    (root / "a-model").mkdir()
    write_json(root / "a-model" / "config.json", {"model_type": "gpt2"})
    return root


def test_runs_of_every_kind_are_found_in_order_with_their_lines(root):
    main, evaluation, sweep, begun = runs = index.find(root)
    assert [run.experiment for run in runs] == ["main", "eval", "grids/first", "begun"]
    assert index.find(root / "grids" / "first")[0].experiment == "first"
    (alone,) = index.find(root / "main" / "20260304-050607")
    assert (alone.experiment, alone.time) == ("main", "20260304-050607")
    assert [row.value for row in main.lines] == [20.0, 22.5]
    assert (evaluation.lines[0].low, evaluation.seconds) == (0.4, None)
    assert (sweep.methods, sweep.sparsities) == (("dart", "griffin"), (0.3, 0.5, 0.7))
    assert (sweep.seconds, begun.models, begun.tasks) == (90, ("Llama",), ("boolq", "rte"))
    assert [len(run["rows"]) for run in json.loads(to_json(runs))] == [2, 1, 5, 0]


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({}, {"main": 2, "eval": 1, "grids/first": 5, "begun": 0}),
        ({"method": "GRIFFIN"}, {"eval": 1, "grids/first": 2}),
        ({"method": "dart", "task": "arc"}, {"grids/first": 2}),
        ({"model": "llama", "method": "dart"}, {"begun": 0}),
        ({"status": "Interrupted"}, {"grids/first": 5}),
        ({"experiment": "eval"}, {"eval": 1}),
        ({"since": "2026-05-01T10:00:00+00:00"}, {"grids/first": 5, "begun": 0}),
    ],
)
def test_runs_and_their_lines_are_chosen(root, filters, expected):
    runs = index.filter(index.find(root), **filters)
    assert {run.experiment: len(run.lines) for run in runs} == expected


def test_what_cannot_be_chosen_or_found(root, tmp_path):
    with pytest.raises(UnknownName, match=r"unknown status 'compleet'; did you mean complete\?"):
        index.filter([], status="compleet")
    with pytest.raises(ConfigError, match='--since "yesterday" is not a date: write 2026-03-04'):
        index.filter([], since="yesterday")
    with pytest.raises(ConfigError, match=r"there is no results folder .*: give the folder"):
        index.find(tmp_path / "none")
    with pytest.raises(ConfigError, match="has no runs"):
        index.find(root / "a-model")


def test_a_run_that_was_killed_is_not_running(tmp_path):
    for name in "ab":
        write_run(tmp_path / name / "20260101-000000", [], status="running")
    lock = take(tmp_path / "a" / "20260101-000000")
    statuses = {run.experiment: run.status for run in index.find(tmp_path)}
    assert statuses == {"a": "running", "b": "stopped"}
    release(lock)


def test_every_form_of_the_list_has_the_same_numbers(root, snapshot):
    runs = index.find(root)
    for long in (False, True):
        console = Console(width=100, no_color=True)
        with console.capture() as capture:
            console.print(table(runs, long))
        assert capture.get() == snapshot(name="long" if long else "short")
    rows = list(csv.DictReader(to_csv(runs).splitlines()))
    assert [row["value"] for row in rows][:3] == ["20.0", "22.5", "0.5"] and len(rows) == 8
    assert json.loads(to_json([])) == [] and to_csv([]).count("\n") == 1
