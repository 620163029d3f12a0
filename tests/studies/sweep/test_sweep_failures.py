"""Cells that fail and sweeps that are interrupted: what is recorded, and what is tried again."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import sweep_fakes
from dart_llm.errors import MissingExtra
from dart_llm.evaluation import tasks as measure
from dart_llm.evaluation.measurement import Measurement
from dart_llm.models import loading
from dart_llm.reporting.console import Ui
from dart_llm.studies.sweep import study as sweep_cell
from dart_llm.studies.sweep.cells import read_results
from dart_llm.studies.sweep.study import SweepPlace, run_sweep
from sweep_fakes import cells, config, quiet_sweep
from tiny import LAYERS


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


def test_a_failed_cell_does_not_stop_the_others(
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
    assert len(computed) == 4
    whole = quiet_sweep(cells(base), tmp_path / "other")
    for name in ("results.jsonl", "masks.safetensors", "cells.csv"):
        assert (again.path / name).read_bytes() == (whole.path / name).read_bytes()


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
    assert sweep_cell.not_finite(measured) is None
    assert sweep_cell.not_finite(replace(measured, metric="f1")) == "t gave no f1"
    items = ({"id": "a", "losses": [0.1]}, {"id": "b", "losses": [0.1, math.inf]})
    found = sweep_cell.not_finite(replace(measured, items=items))
    assert found is not None and "first in item b, losses" in found


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
    assert (again.path, again.computed) == (folder, 1)
    assert len(computed) == 4
