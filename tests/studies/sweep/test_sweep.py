"""Sweeps in process: what is written, what is computed again, what a failure leaves, the plan."""

import json
import math
import shutil
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
from dart_llm.files import write_json
from dart_llm.models import loading
from dart_llm.reporting.console import Ui
from dart_llm.session import prepare
from dart_llm.session.prepare import MemoryStore
from dart_llm.studies.sweep import cells as sweep_cells
from dart_llm.studies.sweep import study as sweep_plan
from dart_llm.studies.sweep.cells import SweepPlace, read_results, read_timing
from dart_llm.studies.sweep.compute import not_finite
from dart_llm.studies.sweep.study import plan, run_sweep
from sweep_fakes import cells, config, quiet_sweep
from tiny import LAYERS, WIDTH

TABLES = ("results.jsonl", "masks.safetensors", "cells.csv")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with the model and the text."""
    return sweep_fakes.place(tmp_path_factory.mktemp("sweep"))


def tables(folder):
    return {name: (folder / name).read_bytes() for name in TABLES}


def fake(monkeypatch, change):
    """Let ``change(candidate, measurement)`` stand for what was measured; labels of all cells."""
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


def test_results_are_those_of_a_direct_measurement(base, tmp_path):
    wanted, grown, ui = cells(base), [], Ui(quiet=True)

    def look(document):
        grown.append(len(read_results(next((tmp_path / "sweep").iterdir()))))

    result = run_sweep(wanted, SweepPlace(tmp_path, "sweep"), ui, on_cell=look)
    assert grown == [1, 2, 3]  # the tables grow with every cell
    rows = read_results(result.path)
    assert list(result.results) == rows and (result.computed, result.failed) == (3, ())
    assert [row["key"] for row in rows] == [cell.key for cell in wanted]
    assert [row["label"] for row in rows] == ["dense", "griffin@0.25", "griffin@0.5"]
    model, tokenizer = loading.load(base / "model", device="cpu")
    cell = wanted[2]
    candidate = prepare.prepare(model, tokenizer, cell.config())
    direct = measure.measure(candidate, cell.task, cell.options, MemoryStore(), lambda items: None)
    assert rows[2]["measurement"] == json.loads(json.dumps(direct.to_dict()))
    samples = (result.path / "cells" / cell.key / "samples.jsonl").read_text(encoding="utf-8")
    ids = [json.loads(line)["id"] for line in samples.splitlines()]
    assert ids == [sample["id"] for sample in direct.samples]
    masks = load_file(result.path / "masks.safetensors")
    kept = [f"{c.key}.layer{layer}.kept" for c in wanted[1:] for layer in range(LAYERS)]
    assert sorted(masks) == sorted(kept)
    for layer, counts in enumerate(direct.counts):
        assert torch.equal(masks[f"{cell.key}.layer{layer}.kept"], counts)
        assert int(counts.sum()) == direct.masks * WIDTH // 2


def test_a_model_is_loaded_once_and_does_not_outlive_its_sweep(base, tmp_path, monkeypatch):
    models, prepared = [], []
    load, ready = loading.load, prepare.prepare

    def watched(*args, **more):
        model, tokenizer = load(*args, **more)
        models.append(weakref.ref(model))
        return model, tokenizer

    monkeypatch.setattr(loading, "load", watched)
    monkeypatch.setattr(
        prepare, "prepare", lambda *args, **more: prepared.append(args[2]) or ready(*args, **more)
    )
    wanted = cells(base, tasks=[f"perplexity:{base / 'text.txt'}", "perplexity:embedded"])
    alive = []
    result = quiet_sweep(wanted, tmp_path, on_cell=lambda row: alive.append(bool(models[0]())))
    assert len(result.results) == 6 and not result.failed
    assert alive == 6 * [True] and [model() for model in models] == [None]
    assert [one.sparsity for one in prepared] == [0.0, 0.25, 0.5]
    times = [read_timing(result.path / "cells" / c.key)["load_s"] for c in wanted]
    assert [seconds > 0 for seconds in times] == [True] + 5 * [False]

    def stop(document):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as stopped:
        quiet_sweep(cells(base), tmp_path / "stopped", on_cell=stop)
    assert stopped.tb is not None and [model() for model in models] == [None, None]


def test_a_larger_grid_takes_over_what_is_finished(base, tmp_path, monkeypatch):
    first = quiet_sweep(cells(base), tmp_path)
    larger = cells(base, sparsities=[0.25, 0.5, 0.75])
    place = SweepPlace(tmp_path, "sweep")
    assert [row.status for row in plan(larger, place).rows] == [*3 * ["finished"], "to do"]
    second = quiet_sweep(larger, tmp_path)
    assert second.path != first.path and (second.computed, len(second.results)) == (1, 4)
    assert second.results[:3] == first.results
    same = quiet_sweep(larger, tmp_path)
    assert same.computed == 0 and same.results == second.results
    assert {row.status for row in plan(larger, replace(place, fresh=True)).rows} == {"to do"}
    assert run_sweep(cells(base), replace(place, fresh=True), Ui(quiet=True)).computed == 3
    other = {**sweep_cells.versions(), "torch": "0"}
    monkeypatch.setattr(sweep_cells, "versions", lambda: other)
    assert quiet_sweep(larger, tmp_path).computed == 4


@pytest.mark.contract("resume gives the same bytes")
def test_what_was_half_written_is_computed_again(base, tmp_path):
    result = quiet_sweep(cells(base), tmp_path)
    whole, folder = tables(result.path), result.path / "cells"
    cell, other, _ = (folder / row["key"] for row in result.results)
    (cell / "result.json").write_bytes((cell / "result.json").read_bytes()[:-9])
    shutil.move(other, folder / f".partial-1-{other.name}")
    write_json(result.path / "config.json", {**config(result.path), "status": "running"})
    again = quiet_sweep(cells(base), tmp_path)
    assert (again.path, again.computed) == (result.path, 2)
    assert not list(folder.glob(".partial*")) and tables(again.path) == whole


@pytest.mark.contract("resume gives the same bytes")
@pytest.mark.contract("a failed unit is recorded and the others go on")
def test_a_failed_cell_does_not_stop_the_others_and_is_tried_again(base, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        fake(patch, breaking("griffin@0.25", ZeroDivisionError("nothing\nthere")))
        first = quiet_sweep(cells(base), tmp_path)
    assert [row["status"] for row in first.results] == ["done", "failed", "done"]
    assert first.failed[0]["error"] == "ZeroDivisionError: nothing there"
    assert first.failed[0]["measurement"] is None
    assert config(first.path)["status"] == "failed"
    with monkeypatch.context() as patch:
        computed = fake(patch, breaking("griffin@0.25", KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            quiet_sweep(cells(base), tmp_path)
    assert config(first.path)["status"] == "interrupted" and computed == ["griffin@0.25"]
    assert len(load_file(first.path / "masks.safetensors")) == LAYERS
    again = quiet_sweep(cells(base), tmp_path)
    assert (again.path, again.computed, again.failed) == (first.path, 1, ())
    assert tables(again.path) == tables(quiet_sweep(cells(base), tmp_path / "other").path)


@pytest.mark.parametrize("value", [math.nan, None])
def test_a_number_that_is_not_finite_fails_the_cell(base, tmp_path, monkeypatch, value):
    def spoil(candidate, measured):
        items = tuple({**item, "mean_loss": value} for item in measured.items)
        return replace(measured, metrics={"perplexity": value, "n": None}, items=items)

    fake(monkeypatch, spoil)
    result = quiet_sweep(cells(base, methods="dense"), tmp_path)
    (row,) = result.failed
    where = "" if value is None else " (first in item 0, mean_loss)"
    assert row["error"] == (
        f"perplexity of perplexity:{base / 'text.txt'} is not finite{where}; try dtype float32"
    )
    assert row["measurement"]["metrics"] == {"perplexity": None, "n": None}
    assert "NaN" not in (result.path / "results.jsonl").read_text(encoding="utf-8")
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
    wanted = cells(base, models=["nobody/nothing", str(base / "model")])
    result = run_sweep(wanted, SweepPlace(tmp_path, "sweep"), ui)
    assert [row["status"] for row in result.results] == [*3 * ["failed"], "done", "done", "failed"]
    assert tries == ["nobody/nothing", str(base / "model")]
    sentence = result.failed[0]["error"]
    assert sentence.startswith("nobody/nothing is not in the hub's cache")
    assert {row["error"] for row in result.failed[:3]} == {sentence}
    assert sum(sentence in line for line in ui.log) == 1
    assert any(line.startswith("4 of 6 cells failed") for line in ui.log)
    assert result.failed[3]["error"].endswith("pip install 'dart-llm[eval]'")


def test_downloads_of_a_plan(tmp_path, monkeypatch):
    sizes = {"a/large": 4_000_000, "b/unknown": None, "c/there": 0}
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(sweep_plan, "download_size", lambda cell: sizes[cell.model])
    tasks = ("perplexity:c4", "arc_easy", "summarize:xsum", "perplexity:embedded", "mine")
    wanted = [Cell(model, "dense", task) for model in sizes for task in tasks]
    place = SweepPlace(tmp_path, "sweep")
    assert [(d.name, d.size) for d in plan(wanted, place).downloads] == [
        ("a/large", 4_000_000),
        ("b/unknown", None),
        ("data set allenai/c4 (en, validation)", 41_000_000),
        ("data set allenai/ai2_arc (ARC-Easy, test)", 1_000_000),
        ("data set EdinburghNLP/xsum (test)", 338_000_000),
    ]
    (tmp_path / "hub" / "datasets--allenai--c4").mkdir(parents=True)
    assert all("c4" not in d.name for d in plan(wanted, place).downloads)
