"""What the tests of sweeps share: a tiny model on disk, cells of it, and a ``compute`` that breaks.

``python sweep_fakes.py FOLDER`` runs the sweep of ``FOLDER/cells.json`` there, so that a test can
kill it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from dart_llm.evaluation import tasks as measure
from dart_llm.evaluation.measurement import Measurement
from dart_llm.experiments.cell import Cell
from dart_llm.reporting.console import Ui
from dart_llm.studies.sweep import compute as sweep_compute
from dart_llm.studies.sweep.cells import SweepPlace
from dart_llm.studies.sweep.compute import LoadedModelCache
from dart_llm.studies.sweep.grid import collect, expand
from dart_llm.studies.sweep.study import SweepResult, run_sweep
from tiny_gpt2 import write_gpt2

SLOW = "SWEEP_TEST_SECONDS"
"""Seconds that every cell takes longer, so that a kill finds it at work."""
KILL = "SWEEP_TEST_KILL"
"""File that asks the next cell's process to kill itself; it is gone afterwards."""


def write_text(folder: Path) -> Path:
    """A text of some 900 characters, which are tokens of the tiny model."""
    path = folder / "text.txt"
    words = [f"line {n}: the {n * n % 97} birds of winter {n * 31 % 89}.\n" for n in range(24)]
    path.write_text("".join(words), encoding="utf-8")
    return path


def place(folder: Path) -> Path:
    """``folder`` with the model and the text."""
    write_gpt2(folder / "model")
    write_text(folder)
    return folder


def watch(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Labels of the cells that are measured from now on."""
    seen: list[str] = []
    real = measure.measure

    def watched(candidate: Any, task: str, *rest: Any) -> Measurement:
        seen.append(f"{candidate.label} {Path(task).name}")
        return real(candidate, task, *rest)

    monkeypatch.setattr(measure, "measure", watched)
    return seen


def config(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "config.json").read_text(encoding="utf-8"))
    return found


def cells(folder: Path, **changes: Any) -> tuple[Cell, ...]:
    """Cells of the model in ``folder/model`` on ``folder/text.txt``."""
    grid: dict[str, Any] = {
        "models": [str(folder / "model")],
        "methods": ["dense", "griffin"],
        "sparsities": [0.25, 0.5],
        "tasks": [f"perplexity:{folder / 'text.txt'}"],
        "options": {"limit": 2, "prompt_tokens": 48, "scored_tokens": 24},
        "device": "cpu",
    }
    return expand(collect({**grid, **changes}))


def quiet_sweep(where: tuple[Cell, ...], root: Path, **arguments: Any) -> SweepResult:
    """``run_sweep`` into ``root/sweep``, without a terminal."""
    return run_sweep(where, SweepPlace(root, "sweep"), Ui(quiet=True), **arguments)


def compute(
    data: Mapping[str, Any], held: LoadedModelCache, ui: Ui | None = None
) -> dict[str, bytes]:
    """``compute.compute``, slow and mortal where the environment says so."""
    time.sleep(float(os.environ.get(SLOW, "0")) / 2)
    files = sweep_compute.compute(data, held, ui)
    time.sleep(float(os.environ.get(SLOW, "0")) / 2)
    marker = os.environ.get(KILL)
    if marker and Path(marker).exists():
        Path(marker).unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    return files


def without_model(data: Mapping[str, Any], held: LoadedModelCache) -> dict[str, bytes]:
    """A cell that fails at once, so that no model is loaded; its worker may die instead."""
    if data["seed"] == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if data["seed"] == 2:
        raise ValueError("no\nresult")
    return sweep_compute.document_files(Cell.from_dict(data), None, "failed by hand")


def write_cells(folder: Path, wanted: tuple[Cell, ...]) -> None:
    """For ``python sweep_fakes.py FOLDER``."""
    text = json.dumps([cell.to_dict() for cell in wanted])
    (folder / "cells.json").write_text(text, encoding="utf-8")


def main() -> None:
    import torch

    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    data = json.loads((folder / "cells.json").read_text(encoding="utf-8"))
    wanted = tuple(Cell.from_dict(one) for one in data)
    result = quiet_sweep(wanted, folder / "results", compute=compute)
    print(result.path)


if __name__ == "__main__":
    main()
