"""An inspection keeps what it can: without scipy, and never of two models at once."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dart_llm.experiments.study import run_study
from dart_llm.reporting.console import Ui
from dart_llm.studies.inspection import study as inspect_job
from dart_llm.studies.inspection.settings import InspectSettings
from dart_llm.studies.inspection.study import InspectionStudy
from inspect_cases import without_pictures
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

    without_pictures(monkeypatch)
    monkeypatch.setitem(inspect_job.SECTIONS, "neurons", stops)
    with pytest.raises(KeyboardInterrupt):
        run_study(InspectionStudy(asked, (), Ui(quiet=True)))
    monkeypatch.setitem(inspect_job.SECTIONS, "neurons", whole["neurons"])
    file = tmp_path / "model" / "model.safetensors"
    halved = {name: (tensor / 2).clone() for name, tensor in load_file(file).items()}
    save_file(halved, file, {"format": "pt"})
    job = run_study(InspectionStudy(asked, (), Ui(quiet=True)))
    assert len(list((tmp_path / "results").glob("*/*"))) == 2
    norm = job.sections["weights"]["weights"]["layers"][0]["down"]["mean"]
    down = halved["transformer.h.0.mlp.c_proj.weight"]
    assert norm == pytest.approx(float(torch.linalg.vector_norm(down, dim=1).mean()))
