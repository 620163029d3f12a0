"""Sweeps in process: what is written, what is computed again, and what a failure leaves."""

from __future__ import annotations

import csv
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import sweep_fakes
from dart_llm.errors import ConfigError, ResultsError, UnknownName
from dart_llm.evaluation import tasks as measure
from dart_llm.evaluation.measurement import MeasureOptions
from dart_llm.experiments.cell import Cell
from dart_llm.models import loading
from dart_llm.reporting.console import Ui
from dart_llm.session import prepare
from dart_llm.session.prepare import MemoryStore as Memory
from dart_llm.studies.sweep import cells as sweep_files
from dart_llm.studies.sweep.cells import read_results, write_cell
from dart_llm.studies.sweep.study import Clock, SweepPlace, duration, run_sweep
from sweep_fakes import cells, config, quiet_sweep
from tiny import LAYERS, WIDTH


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model and the text."""
    return sweep_fakes.place(tmp_path_factory.mktemp("sweep"))


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Labels of the cells that were measured."""
    return sweep_fakes.watch(monkeypatch)


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
    direct = measure.measure(candidate, cell.task, cell.options, Memory(), lambda items: None)
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


def test_the_files_of_a_sweep(base: Path, tmp_path: Path) -> None:
    result = quiet_sweep(cells(base), tmp_path)
    assert config(result.path)["status"] == "complete"
    assert config(result.path)["kind"] == "sweep"
    assert config(result.path)["machine"]["device"] == "cpu"
    timing = json.loads((result.path / "timing.json").read_text(encoding="utf-8"))
    assert sorted(timing["cells"]) == sorted(row["key"] for row in result.results)
    with (result.path / "cells.csv").open(encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [row["method"] for row in table] == ["dense", "griffin", "griffin"]
    for row, document in zip(table, result.results, strict=True):
        assert float(row["value"]) == document["measurement"]["metrics"]["perplexity"]
    assert [row["achieved_sparsity"] for row in table] == ["", "0.25", "0.5"]
    for path in result.path.rglob("result.json"):
        assert "second" not in path.read_text(encoding="utf-8")


def test_a_model_is_loaded_once_and_a_method_prepared_once(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads, prepared = [], []
    load, ready = loading.load, prepare.prepare
    monkeypatch.setattr(
        loading, "load", lambda *args, **more: loads.append(more["model"]) or load(*args, **more)
    )
    monkeypatch.setattr(
        prepare, "prepare", lambda *args, **more: prepared.append(args[2]) or ready(*args, **more)
    )
    text = base / "text.txt"
    wanted = cells(base, tasks=[f"perplexity:{text}", "perplexity:embedded"])
    result = quiet_sweep(wanted, tmp_path)
    assert len(result.results) == 6 and not result.failed
    assert loads == [str(base / "model")]
    assert [one.sparsity for one in prepared] == [0.0, 0.25, 0.5]
    times = [sweep_files.read_timing(result.path / "cells" / c.key)["load_s"] for c in wanted]
    assert [seconds > 0 for seconds in times] == [True] + 5 * [False]


def test_a_model_does_not_outlive_its_sweep(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, load = [], loading.load

    def watched(*args: Any, **more: Any) -> Any:
        model, tokenizer = load(*args, **more)
        models.append(weakref.ref(model))
        return model, tokenizer

    monkeypatch.setattr(loading, "load", watched)
    alive = []
    quiet_sweep(cells(base), tmp_path, on_cell=lambda row: alive.append(models[0]() is not None))
    assert alive == 3 * [True]
    assert [model() for model in models] == [None]

    def stop(document: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as stopped:
        quiet_sweep(cells(base), tmp_path / "stopped", on_cell=stop)
    assert stopped.tb is not None and [model() for model in models] == [None, None]


def test_the_tables_grow_with_every_cell(base: Path, tmp_path: Path) -> None:
    lines = []

    def look(document: dict[str, Any]) -> None:
        folder = next((tmp_path / "sweep").iterdir())
        lines.append([row["key"] for row in read_results(folder)])
        assert lines[-1][-1] == document["key"]

    wanted = cells(base)
    quiet_sweep(wanted, tmp_path, on_cell=look)
    keys = [cell.key for cell in wanted]
    assert lines == [keys[:1], keys[:2], keys]


def test_a_larger_grid_takes_over_what_is_finished(
    base: Path,
    tmp_path: Path,
    computed: list[str],
    monkeypatch: pytest.MonkeyPatch,
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
    monkeypatch.setattr(sweep_files, "versions", lambda: {"torch": "0"})
    assert quiet_sweep(larger, tmp_path).computed == 4


def test_what_was_half_written_is_computed_again(base: Path, tmp_path: Path) -> None:
    result = quiet_sweep(cells(base), tmp_path)
    whole = {p.name: p.read_bytes() for p in result.path.glob("*.*") if p.suffix != ".log"}
    folder = result.path / "cells"
    cell, other, _ = (folder / row["key"] for row in result.results)
    (cell / "result.json").write_bytes((cell / "result.json").read_bytes()[:-9])
    shutil.move(other, folder / f".partial-1-{other.name}")
    document = {**config(result.path), "status": "running", "process": 2**22 + 1}
    (result.path / "config.json").write_text(json.dumps(document), encoding="utf-8")
    again = quiet_sweep(cells(base), tmp_path)
    assert (again.path, again.computed) == (result.path, 2)
    assert not list(folder.glob(".partial*"))
    for name in ("results.jsonl", "masks.safetensors", "cells.csv"):
        assert (again.path / name).read_bytes() == whole[name]


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


def test_the_time_left() -> None:
    options = MeasureOptions()
    todo = [Cell("m", "dense", task, options=options) for task in ("a", "a", "b", "b")]
    clock = Clock(todo)
    assert clock.seconds_left() is None
    for place, seconds in ((0, 10.0), (2, 40.0)):
        clock._last -= seconds
        clock.finished(todo[place])
    left = clock.seconds_left()
    assert left == pytest.approx(50.0, abs=1.0)
    assert clock.left_text() == "; about 50 s left"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.44, "0.4 s"),
        (12.4, "12 s"),
        (200, "3 min"),
        (7800, "2 h 10 min"),
        (72 * 3600, "3 days"),
        (1.5e9, "17,361 days"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
