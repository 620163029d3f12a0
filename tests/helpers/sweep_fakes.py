"""For tests of grids: a tiny model on disk, studies of it, and computations that die."""

import json
import os
import signal
import time
from pathlib import Path

from dart_llm.errors import CellsFailed
from dart_llm.experiments.study import run_study
from dart_llm.reporting.console import Ui
from dart_llm.settings import merge
from dart_llm.studies.sweep.settings import SweepSettings
from dart_llm.studies.sweep.study import MeasureStudy, measure_cell
from tiny_gpt2 import write_gpt2

SLOW = "SWEEP_TEST_SECONDS"
"""Seconds that every cell takes longer, so that a kill finds it at work."""
KILL = "SWEEP_TEST_KILL"
"""File that asks the next cell's process to kill itself; it is gone afterwards."""


def place(folder):
    """``folder`` with the model and a text of some 900 characters, which are its tokens."""
    write_gpt2(folder / "model")
    words = [f"line {n}: the {n * n % 97} birds of winter {n * 31 % 89}.\n" for n in range(24)]
    (folder / "text.txt").write_text("".join(words), encoding="utf-8")
    return folder


def config(path):
    return json.loads((path / "config.json").read_text(encoding="utf-8"))


def settings(folder, root, **changes):
    """A sweep of the model in ``folder/model`` on ``folder/text.txt`` into ``root/sweep``."""
    grid = {"models": [str(folder / "model")], "tasks": [f"perplexity:{folder / 'text.txt'}"]}
    grid |= {"methods": ["dense", "griffin"], "sparsities": [0.25, 0.5], "device": "cpu"}
    grid |= {"limit": 2, "prompt_tokens": 48, "scored_tokens": 24, "results_dir": str(root)}
    return merge(SweepSettings, {**grid, **changes}, environment={})


def sweep(folder, root, fresh=False, ui=None, study=MeasureStudy, **changes):
    """The study of ``settings`` after its work, also where cells failed."""
    made = study(settings(folder, root, **changes), ui or Ui(quiet=True))
    try:
        return run_study(made, fresh)
    except CellsFailed:
        return made


def failures(study):
    """The documents of the cells that failed."""
    return [line for line in study.lines if line["status"] != "done"]


def compute(cell, cache):
    """``measure_cell``, slow and mortal where the environment says so."""
    value = measure_cell(cell, cache)
    time.sleep(float(os.environ[SLOW]))
    marker = Path(os.environ[KILL])
    if marker.exists():
        marker.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    return value


def without_model(cell, cache):
    """A cell that fails at once, so that no model is loaded; its worker may die instead."""
    if cell.seed == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    raise ValueError("no\nresult")
