"""Sweeps in process: what is written, what is computed again, what a failure leaves, the plan."""

from __future__ import annotations

import csv
import json
import math
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import sweep_fakes
from dart_llm.errors import ConfigError, LoadError, MissingExtra, ResultsError, UnknownName
from dart_llm.evaluation import tasks as measure
from dart_llm.evaluation.measurement import Measurement
from dart_llm.experiments.cell import Cell
from dart_llm.experiments.model_facts import download_size
from dart_llm.models import loading
from dart_llm.reporting.console import Ui
from dart_llm.session import prepare
from dart_llm.session.prepare import MemoryStore
from dart_llm.studies.sweep import cells as sweep_cells
from dart_llm.studies.sweep import plan as sweep_plan
from dart_llm.studies.sweep.cells import SweepPlace, read_results, write_cell
from dart_llm.studies.sweep.compute import not_finite
from dart_llm.studies.sweep.plan import plan
from dart_llm.studies.sweep.study import duration, run_sweep
from sweep_fakes import cells, config, quiet_sweep
from tiny import LAYERS, WIDTH

TABLES = ("results.jsonl", "masks.safetensors", "cells.csv")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model and the text."""
    return sweep_fakes.place(tmp_path_factory.mktemp("sweep"))


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Labels of the cells that were measured."""
    return sweep_fakes.watch(monkeypatch)


def fake(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Let ``change(candidate, measurement)`` stand for what was measured."""
    real = measure.measure
    monkeypatch.setattr(
        measure, "measure", lambda candidate, *rest: change(candidate, real(candidate, *rest))
    )


def test_results_are_those_of_a_direct_measurement(base: Path, tmp_path: Path) -> None:
    wanted = cells(base)
    result = quiet_sweep(wanted, tmp_path)
    rows = read_results(result.path)
    assert list(result.results) == rows
    assert [row["key"] for row in rows] == [cell.key for cell in wanted]
    assert [row["label"] for row in rows] == ["dense", "griffin@0.25", "griffin@0.5"]
    assert (result.computed, result.failed) == (3, ())
    model, tokenizer = loading.load(base / "model", device="cpu")
    cell = wanted[2]
    candidate = prepare.prepare(model, tokenizer, cell.config())
    direct = measure.measure(candidate, cell.task, cell.options, MemoryStore(), lambda items: None)
    assert rows[2]["measurement"] == json.loads(json.dumps(direct.to_dict()))
    samples = (result.path / "cells" / cell.key / "samples.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line)["id"] for line in samples.splitlines()] == [
        sample["id"] for sample in direct.samples
    ]
    masks = load_file(result.path / "masks.safetensors")
    assert sorted(masks) == sorted(
        f"{c.key}.layer{layer}.kept" for c in wanted[1:] for layer in range(LAYERS)
    )
    for layer, counts in enumerate(direct.counts):
        assert torch.equal(masks[f"{cell.key}.layer{layer}.kept"], counts)
        assert int(counts.sum()) == direct.masks * WIDTH // 2
    about = config(result.path)
    assert (about["status"], about["kind"], about["machine"]["device"]) == (
        *("complete", "sweep"),
        "cpu",
    )
    timing = json.loads((result.path / "timing.json").read_text(encoding="utf-8"))
    assert sorted(timing["cells"]) == sorted(row["key"] for row in rows)
    with (result.path / "cells.csv").open(encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [float(row["value"]) for row in table] == [
        row["measurement"]["metrics"]["perplexity"] for row in rows
    ]
    assert [row["achieved_sparsity"] for row in table] == ["", "0.25", "0.5"]
    for path in result.path.rglob("result.json"):  # nothing that differs from run to run
        assert "second" not in path.read_text(encoding="utf-8")


def test_a_model_is_loaded_once_and_does_not_outlive_its_sweep(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[Any] = []
    prepared: list[Any] = []
    load, ready = loading.load, prepare.prepare

    def watched(*args: Any, **more: Any) -> Any:
        model, tokenizer = load(*args, **more)
        models.append(weakref.ref(model))
        return model, tokenizer

    monkeypatch.setattr(loading, "load", watched)
    monkeypatch.setattr(
        prepare, "prepare", lambda *args, **more: prepared.append(args[2]) or ready(*args, **more)
    )
    wanted = cells(base, tasks=[f"perplexity:{base / 'text.txt'}", "perplexity:embedded"])
    alive: list[bool] = []
    result = quiet_sweep(wanted, tmp_path, on_cell=lambda row: alive.append(bool(models[0]())))
    assert len(result.results) == 6 and not result.failed
    assert alive == 6 * [True] and [model() for model in models] == [None]
    assert [one.sparsity for one in prepared] == [0.0, 0.25, 0.5]
    times = [sweep_cells.read_timing(result.path / "cells" / c.key)["load_s"] for c in wanted]
    assert [seconds > 0 for seconds in times] == [True] + 5 * [False]

    def stop(document: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as stopped:
        quiet_sweep(cells(base), tmp_path / "stopped", on_cell=stop)
    assert stopped.tb is not None and [model() for model in models] == [None, None]


def test_the_tables_grow_with_every_cell_and_the_time_left_is_told(
    base: Path, tmp_path: Path
) -> None:
    lines = []
    ui = Ui(quiet=True)

    def look(document: dict[str, Any]) -> None:
        folder = next((tmp_path / "sweep").iterdir())
        lines.append([row["key"] for row in read_results(folder)])

    wanted = cells(base)
    run_sweep(wanted, SweepPlace(tmp_path, "sweep"), ui, on_cell=look)
    keys = [cell.key for cell in wanted]
    assert lines == [keys[:1], keys[:2], keys]
    told = [line for line in ui.log if " on perplexity:text.txt: perplexity " in line]
    assert [line.split()[0] for line in told] == ["1/3", "2/3", "3/3"]
    assert ["left" in line for line in told] == [True, True, False]


def test_a_larger_grid_takes_over_what_is_finished(
    base: Path, tmp_path: Path, computed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = quiet_sweep(cells(base), tmp_path)
    larger = cells(base, sparsities=[0.25, 0.5, 0.75])
    second = quiet_sweep(larger, tmp_path)
    assert second.path != first.path
    assert (second.computed, len(second.results), len(computed)) == (1, 4, 4)
    assert second.results[:3] == first.results
    same = quiet_sweep(larger, tmp_path)
    assert same.computed == 0 and same.results == second.results
    place = SweepPlace(tmp_path, "sweep", fresh=True)
    assert run_sweep(cells(base), place, Ui(quiet=True)).computed == 3
    monkeypatch.setattr(sweep_cells, "versions", lambda: {"torch": "0"})
    assert quiet_sweep(larger, tmp_path).computed == 4


@pytest.mark.contract("resume gives the same bytes")
def test_what_was_half_written_is_computed_again(base: Path, tmp_path: Path) -> None:
    result = quiet_sweep(cells(base), tmp_path)
    whole = {name: (result.path / name).read_bytes() for name in TABLES}
    folder = result.path / "cells"
    cell, other, _ = (folder / row["key"] for row in result.results)
    (cell / "result.json").write_bytes((cell / "result.json").read_bytes()[:-9])
    shutil.move(other, folder / f".partial-1-{other.name}")
    document = {**config(result.path), "status": "running", "process": 2**22 + 1}
    (result.path / "config.json").write_text(json.dumps(document), encoding="utf-8")
    again = quiet_sweep(cells(base), tmp_path)
    assert (again.path, again.computed) == (result.path, 2)
    assert not list(folder.glob(".partial*"))
    assert {name: (again.path / name).read_bytes() for name in TABLES} == whole


def test_a_cell_replaces_its_failed_self(tmp_path: Path) -> None:
    write_cell(tmp_path, "k", {"result.json": b"{}\n", "old": b""})
    write_cell(tmp_path, "k", {"result.json": b"[]\n"})
    assert [p.name for p in tmp_path.iterdir()] == ["k"]
    assert [(p.name, p.read_bytes()) for p in (tmp_path / "k").iterdir()] == [
        ("result.json", b"[]\n")
    ]


def test_bad_calls(base: Path, tmp_path: Path) -> None:
    wanted = cells(base)
    with pytest.raises(ConfigError, match="no cells"):
        quiet_sweep((), tmp_path)
    with pytest.raises(UnknownName, match="did you mean local"):
        quiet_sweep(wanted, tmp_path, engine="locale")
    with pytest.raises(ConfigError, match="workers 0"):
        quiet_sweep(wanted, tmp_path, workers=0)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ResultsError, match="holds no sweep"):
        read_results(tmp_path)
    (tmp_path / "results.jsonl").write_text("{", encoding="utf-8")
    with pytest.raises(ResultsError, match="damaged"):
        read_results(tmp_path)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.44, "0.4 s"), (12.4, "12 s"), (200, "3 min"), (7800, "2 h 10 min"), (72 * 3600, "3 days")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# Failures and interruptions.


@pytest.mark.contract("resume gives the same bytes")
def test_a_failed_cell_does_not_stop_the_others_and_is_tried_again(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, computed: list[str]
) -> None:
    with monkeypatch.context() as patch:

        def broken(candidate: Any, measured: Measurement) -> Measurement:
            if candidate.label == "griffin@0.25":
                raise ZeroDivisionError("nothing\nthere")
            return measured

        fake(patch, broken)
        first = quiet_sweep(cells(base), tmp_path)
    assert [row["status"] for row in first.results] == ["done", "failed", "done"]
    assert first.failed[0]["error"] == "ZeroDivisionError: nothing there"
    assert first.failed[0]["measurement"] is None
    assert config(first.path)["status"] == "failed"
    again = quiet_sweep(cells(base), tmp_path)
    assert (again.path, again.computed, again.failed) == (first.path, 1, ())
    assert [label.split()[0] for label in computed].count("griffin@0.25") == 2
    whole = quiet_sweep(cells(base), tmp_path / "other")
    for name in TABLES:
        assert (again.path / name).read_bytes() == (whole.path / name).read_bytes()


@pytest.mark.contract("resume gives the same bytes")
def test_an_interrupt_keeps_what_was_computed(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, computed: list[str]
) -> None:
    with monkeypatch.context() as patch:

        def stop(candidate: Any, measured: Measurement) -> Measurement:
            if candidate.label == "griffin@0.5":
                raise KeyboardInterrupt
            return measured

        fake(patch, stop)
        with pytest.raises(KeyboardInterrupt):
            quiet_sweep(cells(base), tmp_path)
    (folder,) = (tmp_path / "sweep").iterdir()
    assert config(folder)["status"] == "interrupted"
    assert len(read_results(folder)) == 2
    assert len(load_file(folder / "masks.safetensors")) == LAYERS
    again = quiet_sweep(cells(base), tmp_path)
    assert (again.path, again.computed, len(computed)) == (folder, 1, 4)


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_a_number_that_is_not_finite_fails_the_cell(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float | None
) -> None:
    def spoil(candidate: Any, measured: Measurement) -> Measurement:
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


def test_only_the_headline_metric_must_have_a_value() -> None:
    measured = Measurement("t", "decode", "acc", True, {"acc": 0.5, "stderr": None}, ())
    assert not_finite(measured) is None
    assert not_finite(replace(measured, metric="f1")) == "t gave no f1"
    items = ({"id": "a", "losses": [0.1]}, {"id": "b", "losses": [0.1, math.inf]})
    assert "first in item b, losses" in str(not_finite(replace(measured, items=items)))


def test_a_model_that_cannot_be_loaded_fails_its_cells_once(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries, load = [], loading.load
    monkeypatch.setattr(
        loading, "load", lambda *args, **more: tries.append(more["model"]) or load(*args, **more)
    )
    ui = Ui(quiet=True)
    wanted = cells(base, models=["nobody/nothing", str(base / "model")])
    result = run_sweep(wanted, SweepPlace(tmp_path, "sweep"), ui)
    assert [row["status"] for row in result.results] == 3 * ["failed"] + 3 * ["done"]
    assert tries == ["nobody/nothing", str(base / "model")]
    sentence = result.failed[0]["error"]
    assert sentence.startswith("nobody/nothing is not in the hub's cache")
    assert {row["error"] for row in result.failed} == {sentence}
    assert sum(sentence in line for line in ui.log) == 1
    assert any(line.startswith("3 of 6 cells failed") for line in ui.log)


def test_a_missing_package_is_the_sentence_of_its_cells(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(candidate: Any, measured: Measurement) -> Measurement:
        raise MissingExtra("lm_eval", "eval")

    fake(monkeypatch, missing)
    result = quiet_sweep(cells(base, methods="dense"), tmp_path)
    assert result.failed[0]["error"].endswith("pip install 'dart-llm[eval]'")


# ``--dry-run``.


def test_a_plan_before_and_after(base: Path, tmp_path: Path) -> None:
    place = SweepPlace(tmp_path / "results", "sweep")
    wanted = cells(base)
    before = plan(wanted, place)
    assert not place.root.exists()
    assert [row.status for row in before.rows] == 3 * ["to do"]
    assert (before.downloads, before.disk_bytes) == ((), 3 * 500_000)
    lines = before.sentences()
    assert lines[:2] == ["3 cells: 0 finished, 3 to do", "download: nothing"]
    assert lines[2].startswith("disk: about 1.5 MB; ") and len(lines) == 3
    console = Console(width=120, no_color=True)
    with console.capture() as capture:
        console.print(before.table())
    assert "perplexity:text.txt" in capture.get() and "griffin@0.25" in capture.get()
    quiet_sweep(wanted, place.root)
    after = plan(cells(base, sparsities=[0.25, 0.5, 0.75]), place)
    assert [row.status for row in after.rows] == [*3 * ["finished"], "to do"]
    assert json.loads(json.dumps(after.to_dict()))["rows"][3]["label"] == "griffin@0.75"
    fresh = plan(wanted, SweepPlace(place.root, "sweep", fresh=True))
    assert [row.status for row in fresh.rows] == 3 * ["to do"]


def test_downloads_of_a_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"a/large": 4_000_000, "b/unknown": None, "c/there": 0}
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(sweep_plan, "download_size", lambda cell: sizes[cell.model])
    tasks = ("perplexity:c4", "arc_easy", "summarize:xsum", "perplexity:embedded", "mine")
    wanted = [Cell(model, "dense", task) for model in sizes for task in tasks]
    found = plan(wanted, SweepPlace(tmp_path, "sweep"))
    assert [(d.name, d.size) for d in found.downloads] == [
        ("a/large", 4_000_000),
        ("b/unknown", None),
        ("data set allenai/c4 (en, validation)", 41_000_000),
        ("data set allenai/ai2_arc (ARC-Easy, test)", 1_000_000),
        ("data set EdinburghNLP/xsum (test)", 338_000_000),
    ]
    (tmp_path / "hub" / "datasets--allenai--c4").mkdir(parents=True)
    assert all("c4" not in d.name for d in plan(wanted, SweepPlace(tmp_path, "s")).downloads)


def test_models_that_are_not_there() -> None:
    assert download_size(Cell("nobody/nothing", "dense", "x")) is None
    with pytest.raises(LoadError, match="there is no file or folder"):
        download_size(Cell("./nothing", "dense", "x"))
    with pytest.raises(UnknownName, match="smollm2"):
        download_size(Cell("smolm2", "dense", "x"))
