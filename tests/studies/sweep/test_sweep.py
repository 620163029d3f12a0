"""Grids in process: what is written, what is computed again, what a failure leaves, the plan."""

import json
import math
import weakref
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import sweep_fakes
from dart_llm.errors import MissingExtra
from dart_llm.evaluation import tasks as measure
from dart_llm.evaluation.measurement import Measurement
from dart_llm.experiments.cell import Cell
from dart_llm.models import loading
from dart_llm.reporting.console import Ui
from dart_llm.session import prepare
from dart_llm.session.prepare import MemoryStore
from dart_llm.studies.sweep import dry_run
from dart_llm.studies.sweep import study as sweep_study
from dart_llm.studies.sweep.compute import not_finite
from dart_llm.studies.sweep.study import MeasureStudy
from sweep_fakes import config, failures, settings, sweep
from tiny import LAYERS, WIDTH
from written import lines

TABLES = ("results.jsonl", "rows.jsonl", "samples.jsonl", "masks.safetensors", "cells.csv")


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
    real, seen = measure.measure, []

    def measured(candidate, *rest):
        seen.append(candidate.label)
        return change(candidate, real(candidate, *rest))

    monkeypatch.setattr(measure, "measure", measured)
    return seen


def breaking(label, error):
    def change(candidate, measured):
        if candidate.label == label:
            raise error
        return measured

    return change


class Watched(MeasureStudy):
    """A study that calls ``look(study)`` after every cell."""

    look = staticmethod(lambda study: None)

    def take(self, unit, value):
        super().take(unit, value)
        type(self).look(self)


def test_results_are_those_of_a_direct_measurement(base, tmp_path, monkeypatch):
    grown = []

    def look(study):
        grown.append(len(lines(study.path / "results.jsonl")))

    monkeypatch.setattr(Watched, "look", staticmethod(look))
    study = sweep(base, tmp_path, study=Watched)
    assert grown == [1, 2, 3]  # the table grows with every cell
    rows = lines(study.path / "results.jsonl")
    assert (study.lines, study.computed, study.failed) == (rows, 3, {})
    assert [row["key"] for row in rows] == [cell.key for cell in study.cells]
    assert [row["label"] for row in rows] == ["dense", "griffin@0.25", "griffin@0.5"]
    short = lines(study.path / "rows.jsonl")
    assert [row["value"] for row in short] == [
        row["measurement"]["metrics"]["perplexity"] for row in rows
    ]
    model, tokenizer = loading.load(base / "model", device="cpu")
    cell = study.cells[2]
    candidate = prepare.prepare(model, tokenizer, cell.config())
    direct = measure.measure(candidate, cell.task, cell.options, MemoryStore(), lambda items: None)
    assert rows[2]["measurement"] == json.loads(json.dumps(direct.to_dict()))
    samples = [one for one in lines(study.path / "samples.jsonl") if one["key"] == cell.key]
    assert [one["id"] for one in samples] == [sample["id"] for sample in direct.samples]
    masks = load_file(study.path / "masks.safetensors")
    kept = [f"{c.key}.layer{layer}.kept" for c in study.cells[1:] for layer in range(LAYERS)]
    assert sorted(masks) == sorted(kept)
    for layer, counts in enumerate(direct.counts):
        assert torch.equal(masks[f"{cell.key}.layer{layer}.kept"], counts)
        assert int(counts.sum()) == direct.masks * WIDTH // 2


def test_a_model_is_loaded_once_and_does_not_outlive_its_sweep(base, tmp_path, monkeypatch):
    models, prepared, alive = [], [], []
    load, ready = loading.load, prepare.prepare

    def watched(*args, **more):
        model, tokenizer = load(*args, **more)
        models.append(weakref.ref(model))
        return model, tokenizer

    monkeypatch.setattr(loading, "load", watched)
    monkeypatch.setattr(
        prepare, "prepare", lambda *args, **more: prepared.append(args[2]) or ready(*args, **more)
    )
    monkeypatch.setattr(
        Watched, "look", staticmethod(lambda study: alive.append(bool(models[0]())))
    )
    tasks = [f"perplexity:{base / 'text.txt'}", "perplexity:embedded"]
    study = sweep(base, tmp_path, study=Watched, tasks=tasks)
    assert len(study.lines) == 6 and not study.failed
    assert alive == 6 * [True] and [model() for model in models] == [None]
    assert [one.sparsity for one in prepared] == [0.0, 0.25, 0.5]

    def stop(study):
        raise KeyboardInterrupt

    monkeypatch.setattr(Watched, "look", staticmethod(stop))
    with pytest.raises(KeyboardInterrupt) as stopped:
        sweep(base, tmp_path / "stopped", study=Watched)
    assert stopped.tb is not None and [model() for model in models] == [None, None]


def planned(base, root, fresh=False, **changes):
    """Statuses of the cells in the plan."""
    plan = dry_run.dry_run(settings(base, root, **changes), Ui(quiet=True), fresh)
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
        items = tuple({**item, "mean_loss": value} for item in measured.items)
        return replace(measured, metrics={"perplexity": value, "n": None}, items=items)

    fake(monkeypatch, spoil)
    study = sweep(base, tmp_path, methods="dense")
    (row,) = failures(study)
    where = "" if value is None else " (first in item 0, mean_loss)"
    assert row["error"] == (
        f"perplexity of perplexity:{base / 'text.txt'} is not finite{where}; try dtype float32"
    )
    assert row["measurement"]["metrics"] == {"perplexity": None, "n": None}
    assert "NaN" not in (study.path / "results.jsonl").read_text(encoding="utf-8")
    # the headline metric alone must have a value
    measured = Measurement("t", "decode", "acc", True, {"acc": 0.5, "stderr": None}, ())
    assert not_finite(measured) is None
    assert not_finite(replace(measured, metric="f1")) == "t gave no f1"
    items = ({"id": "a", "losses": [0.1]}, {"id": "b", "losses": [0.1, math.inf]})
    assert "first in item b, losses" in str(not_finite(replace(measured, items=items)))


def test_a_model_that_cannot_be_loaded_fails_its_cells_once(base, tmp_path, monkeypatch):
    tries, load = [], loading.load
    monkeypatch.setattr(
        loading, "load", lambda *args, **more: tries.append(more["model"]) or load(*args, **more)
    )
    fake(monkeypatch, breaking("griffin@0.5", MissingExtra("lm_eval", "eval")))
    ui = Ui(quiet=True)
    study = sweep(base, tmp_path, ui=ui, models=["nobody/nothing", str(base / "model")])
    assert [row["status"] for row in study.lines] == [*3 * ["failed"], "done", "done", "failed"]
    assert tries == ["nobody/nothing", str(base / "model")]
    errors = [row["error"] for row in failures(study)]
    assert errors[0].startswith("nobody/nothing is not in the hub's cache")
    assert len({*errors[:3]}) == 1 and sum(errors[0] in line for line in ui.log) == 1
    assert errors[3].endswith("pip install 'dart-llm[eval]'")


def test_downloads_of_a_plan(tmp_path, monkeypatch):
    sizes = {"a/large": 4_000_000, "b/unknown": None, "c/there": 0}
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(dry_run, "download_size", lambda cell: sizes[cell.model])
    tasks = ("perplexity:c4", "arc_easy", "summarize:xsum", "perplexity:embedded", "mine")
    wanted = [Cell(model, "dense", task) for model in sizes for task in tasks]
    monkeypatch.setattr(dry_run, "cells_of", lambda settings: wanted)

    def downloads():
        plan = dry_run.dry_run(settings(tmp_path, tmp_path), Ui(quiet=True))
        return [(one["name"], one["size"]) for one in plan["downloads"]]

    assert downloads() == [
        ("a/large", 4_000_000),
        ("b/unknown", None),
        ("data set allenai/c4 (en, validation)", 41_000_000),
        ("data set allenai/ai2_arc (ARC-Easy, test)", 1_000_000),
        ("data set EdinburghNLP/xsum (test)", 338_000_000),
    ]
    (tmp_path / "hub" / "datasets--allenai--c4").mkdir(parents=True)
    assert all("c4" not in name for name, _ in downloads())
