"""An inspection keeps what it can: without scipy, and never of two models at once."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dart_llm.errors import MissingExtra
from dart_llm.reporting.console import Ui
from dart_llm.studies.inspection import study as inspect_job
from dart_llm.studies.inspection.settings import InspectSettings
from dart_llm.studies.inspection.study import run_inspect
from inspect_cases import A, B
from lm_cases import place


def test_other_weights_in_the_same_folder_are_another_inspection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(place() / "model", tmp_path / "model")
    results = str(tmp_path / "results")
    asked = InspectSettings(model=str(tmp_path / "model"), device="cpu", results_dir=results)
    whole = dict(inspect_job.SECTIONS)

    def stops(study: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(inspect_job, "_write_pages", lambda job: None)
    monkeypatch.setitem(inspect_job.SECTIONS, "neurons", stops)
    with pytest.raises(KeyboardInterrupt):
        run_inspect(asked, (), Ui(quiet=True))
    monkeypatch.setitem(inspect_job.SECTIONS, "neurons", whole["neurons"])
    file = tmp_path / "model" / "model.safetensors"
    halved = {name: (tensor / 2).clone() for name, tensor in load_file(file).items()}
    save_file(halved, file, {"format": "pt"})
    job = run_inspect(asked, (), Ui(quiet=True))
    assert len(list((tmp_path / "results").glob("*/*"))) == 2
    norm = job.sections["weights"]["weights"]["layers"][0]["down"]["mean"]
    down = halved["transformer.h.0.mlp.c_proj.weight"]
    assert norm == pytest.approx(float(torch.linalg.vector_norm(down, dim=1).mean()))


def test_without_scipy_only_the_intervals_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*args: Any, **options: Any) -> None:
        raise MissingExtra("scipy", "eval")

    monkeypatch.setattr("dart_llm.experiments.stats._scipy", missing)
    texts = {"prompt": A, "prompt_b": B, "ablation_seeds": 1, "results_dir": str(tmp_path)}
    asked = InspectSettings(model=str(place() / "model"), device="cpu", **texts)
    job = run_inspect(asked, ["ablation"], Ui(quiet=True))
    row = job.sections["ablation"]["rows"][0]
    assert row["loss"] > 0 and row["over_dense"] is row["loss_interval"] is None
    assert "no intervals: this needs scipy" in (job.path / "inspect.md").read_text("utf-8")
    lines = list(csv.DictReader((job.path / "ablation.csv").open(encoding="utf-8")))
    assert lines[0]["over_dense_low"] == "" and float(lines[0]["loss"]) == row["loss"]
    assert (job.path / "report.html").exists()
