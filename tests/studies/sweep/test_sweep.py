"""Grids in process: what is written, what is computed again, what a failure leaves, the plan."""

import math
import weakref
from dataclasses import replace

import pytest

import sweep_fakes
from dart_llm.errors import MissingExtra
from dart_llm.evaluation import tasks as measure
from dart_llm.evaluation.measurement import Measurement
from dart_llm.experiments.cell import Cell
from dart_llm.models import loading
from dart_llm.reporting.console import Ui
from dart_llm.session import run
from dart_llm.studies.sweep import study as sweep_study
from dart_llm.studies.sweep.grid import show_plan
from dart_llm.studies.sweep.study import MeasureStudy, not_finite
from sweep_fakes import config, failures, settings, sweep
from written import lines

TABLES = ("results.jsonl", "rows.jsonl", "samples.jsonl", "compare.csv")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with the model and the text."""
    return sweep_fakes.place(tmp_path_factory.mktemp("sweep"))


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch):
    monkeypatch.setattr("dart_llm.reporting.figures.save", lambda folder, wanted, style: [])
    monkeypatch.setattr(MeasureStudy, "write_page", lambda self: None)


def tables(folder):
    return {name: (folder / name).read_bytes() for name in TABLES}


def fake(monkeypatch, change):
    """Let ``change(candidate, measurement)`` replace what was measured; labels of all cells."""
    real, labels = measure.measure, []

    def measured(candidate, *rest):
        labels.append(candidate.label)
        return change(candidate, real(candidate, *rest))

    monkeypatch.setattr(measure, "measure", measured)
    return labels


def breaking(label, error):
    def change(candidate, measured):
        if candidate.label == label:
            raise error
        return measured

    return change


class Watched(MeasureStudy):
    """A study that calls ``look`` after every cell."""

    look = None

    def take(self, unit, value):
        super().take(unit, value)
        type(self).look(self)


def test_results_are_those_of_a_direct_measurement(base, tmp_path, monkeypatch):
    lengths = []

    def look(study):
        lengths.append(len(lines(study.path / "results.jsonl")))

    monkeypatch.setattr(Watched, "look", look)
    study = sweep(base, tmp_path, study=Watched)
    assert lengths == [1, 2, 3]  # the table grows with every cell
    rows = lines(study.path / "results.jsonl")
    assert (study.lines, study.computed, study.failed) == (rows, 3, {})
    assert [row["key"] for row in rows] == [cell.key for cell in study.cells]
    assert [row["label"] for row in rows] == ["dense", "griffin@0.25", "griffin@0.5"]
    values = [row["measurement"]["metrics"]["perplexity"] for row in rows]
    assert [row["value"] for row in lines(study.path / "rows.jsonl")] == values
    samples = [(each["key"], each["id"]) for each in lines(study.path / "samples.jsonl")]
    items = [(row["key"], item["id"]) for row in rows for item in row["measurement"]["items"]]
    assert samples == items  # test_evaluate has them beside a direct measurement


def test_a_model_is_loaded_once_and_does_not_outlive_its_sweep(base, tmp_path, monkeypatch):
    models, prepared, alive = [], [], []
    load, prepare = loading.load, run.prepare

    def watched_load(*args, **more):
        model, tokenizer = load(*args, **more)
        models.append(weakref.ref(model))
        return model, tokenizer

    def watched_prepare(*args, **more):
        prepared.append(args[2].sparsity)
        return prepare(*args, **more)

    def stop(study):
        raise KeyboardInterrupt

    monkeypatch.setattr(loading, "load", watched_load)
    monkeypatch.setattr(run, "prepare", watched_prepare)
    monkeypatch.setattr(Watched, "look", lambda study: alive.append(bool(models[0]())))
    tasks = [f"perplexity:{base / 'text.txt'}", "perplexity:embedded"]
    study = sweep(base, tmp_path, study=Watched, tasks=tasks)
    assert len(study.lines) == 6 and not study.failed
    assert alive == 6 * [True] and [model() for model in models] == [None]
    assert prepared == [0.0, 0.25, 0.5]
    monkeypatch.setattr(Watched, "look", stop)
    with pytest.raises(KeyboardInterrupt) as stopped:
        sweep(base, tmp_path / "stopped", study=Watched)
    assert stopped.tb is not None and [model() for model in models] == [None, None]


def planned(base, root, fresh=False, **changes):
    """Statuses of the cells in the plan."""
    plan = sweep_study.plan(settings(base, root, **changes), Ui(quiet=True), fresh)
    return [row["status"] for row in plan["rows"]]


@pytest.mark.contract("resume gives the same bytes")
def test_a_larger_grid_takes_over_what_is_finished(base, tmp_path, monkeypatch):
    first = sweep(base, tmp_path)
    larger = {"sparsities": [0.25, 0.5, 0.75]}
    assert planned(base, tmp_path, **larger) == [*3 * ["finished"], "to do"]
    second = sweep(base, tmp_path, **larger)
    assert second.path != first.path and (second.computed, len(second.lines)) == (1, 4)
    assert second.lines[:3] == first.lines
    same = sweep(base, tmp_path, **larger)
    assert same.computed == 0 and tables(same.path) == tables(second.path)
    assert {*planned(base, tmp_path, fresh=True, **larger)} == {"to do"}
    anew = sweep(base, tmp_path, fresh=True)
    assert anew.computed == 3 and tables(anew.path) == tables(first.path)
    other = {**sweep_study.versions(), "torch": "0"}
    monkeypatch.setattr(sweep_study, "versions", lambda: other)
    assert sweep(base, tmp_path, **larger).computed == 4


@pytest.mark.contract("resume gives the same bytes")
@pytest.mark.contract("a failed unit is recorded and the others go on")
def test_a_failed_cell_does_not_stop_the_others_and_is_tried_again(base, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        fake(patch, breaking("griffin@0.25", ZeroDivisionError("nothing\nthere")))
        first = sweep(base, tmp_path)
    assert [row["status"] for row in first.lines] == ["done", "failed", "done"]
    (failure,) = failures(first)
    assert failure["error"] == "ZeroDivisionError: nothing there"
    assert failure["measurement"] is None
    assert config(first.path)["status"] == "failed"
    with monkeypatch.context() as patch:
        computed = fake(patch, breaking("griffin@0.25", KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            sweep(base, tmp_path)
    assert config(first.path)["status"] == "interrupted" and computed == ["griffin@0.25"]
    again = sweep(base, tmp_path)
    assert (again.path, again.computed, again.failed) == (first.path, 1, {})
    assert tables(again.path) == tables(sweep(base, tmp_path / "other").path)


@pytest.mark.parametrize("value", [math.nan, None])
def test_a_number_that_is_not_finite_fails_the_cell(base, tmp_path, monkeypatch, value):
    def spoil(candidate, measured):
        return replace(measured, metrics={"perplexity": value, "n": None})

    fake(monkeypatch, spoil)
    study = sweep(base, tmp_path, methods="dense")
    (row,) = failures(study)
    text = f"perplexity:{base / 'text.txt'}"
    assert row["error"] == f"perplexity of {text} is not finite; try dtype float32"
    assert row["measurement"] is None
    # the headline metric alone must have a value
    measured = Measurement("t", "decode", "acc", True, {"acc": 0.5, "stderr": None}, ())
    assert not_finite(measured) is None
    assert not_finite(replace(measured, metric="f1")) == "f1 of t is not finite; try dtype float32"
    items = ({"id": "a", "loss": 0.1}, {"id": "b", "loss": math.inf})
    assert str(not_finite(replace(measured, items=items))).startswith("item b, loss of t is not")


def test_a_model_that_cannot_be_loaded_fails_its_cells_once(base, tmp_path, monkeypatch):
    tries, load = [], loading.load
    watched = lambda *args, **more: tries.append(more["model"]) or load(*args, **more)  # noqa: E731
    monkeypatch.setattr(loading, "load", watched)
    fake(monkeypatch, breaking("griffin@0.5", MissingExtra("lm_eval", "eval")))
    ui = Ui(quiet=True)
    study = sweep(base, tmp_path, ui=ui, models=["nobody/nothing", str(base / "model")])
    assert [row["status"] for row in study.lines] == [*3 * ["failed"], "done", "done", "failed"]
    assert tries == ["nobody/nothing", str(base / "model")]
    errors = [row["error"] for row in failures(study)]
    assert errors[0].startswith("nobody/nothing is not in the hub's cache")
    assert len({*errors[:3]}) == 1 and sum(errors[0] in line for line in ui.log) == 1
    assert errors[3].endswith("pip install 'dart-llm[eval]'")


def test_downloads_of_a_plan(monkeypatch):
    sizes = {"a/large": 4_000_000, "b/unknown": None, "c/there": 0}
    monkeypatch.setattr("dart_llm.experiments.cell.download_size", lambda cell: sizes[cell.model])
    cells = [Cell(model, "dense", "perplexity:embedded") for model in sizes]
    plan = show_plan(cells, {cells[1].key}, Ui(quiet=True))
    assert plan["downloads"] == {"a/large": 4_000_000, "c/there": 0}
    assert [row["status"] for row in plan["rows"]] == ["to do", "finished", "to do"]
