"""For tests of sweeps: a tiny model on disk, cells of it, and a ``compute`` that dies."""

import json
import os
import signal
import time
from pathlib import Path

from dart_llm.experiments.cell import Cell
from dart_llm.reporting.console import Ui
from dart_llm.studies.sweep import compute as sweep_compute
from dart_llm.studies.sweep.cells import SweepPlace
from dart_llm.studies.sweep.grid import collect, expand
from dart_llm.studies.sweep.study import run_sweep
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


def cells(folder, **changes):
    """Cells of the model in ``folder/model`` on ``folder/text.txt``."""
    grid = {"models": [str(folder / "model")], "tasks": [f"perplexity:{folder / 'text.txt'}"]}
    grid |= {"methods": ["dense", "griffin"], "sparsities": [0.25, 0.5], "device": "cpu"}
    grid["options"] = {"limit": 2, "prompt_tokens": 48, "scored_tokens": 24}
    return expand(collect({**grid, **changes}))


def quiet_sweep(where, root, **arguments):
    """``run_sweep`` into ``root/sweep``, without a terminal."""
    return run_sweep(where, SweepPlace(root, "sweep"), Ui(quiet=True), **arguments)


def compute(data, held):
    """``compute.compute``, slow and mortal where the environment says so."""
    files = sweep_compute.compute(data, held)
    time.sleep(float(os.environ[SLOW]))
    marker = Path(os.environ[KILL])
    if marker.exists():
        marker.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    return files


def without_model(data, held):
    """A cell that fails at once, so that no model is loaded; its worker may die instead."""
    if data["seed"] == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if data["seed"] == 2:
        raise ValueError("no\nresult")
    return sweep_compute.document_files(Cell.from_dict(data), None, "failed by hand")
