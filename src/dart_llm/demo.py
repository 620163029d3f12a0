"""``dart-llm demo``: what this project does, in a minute or two."""

from __future__ import annotations

from typing import Any

from dart_llm.config import PruneConfig
from dart_llm.job import run_job
from dart_llm.job_state import Job
from dart_llm.settings import RunSettings
from dart_llm.ui import Ui

SPARSITIES = (0.2, 0.5)
SETTINGS = {
    "prompt": "sky",
    "chat": None,
    "generation": 96,
    "eval_perplexity": True,
    "ppl_max_samples": 6,
    "experiment_name": "demo",
}


def run_demo(ui: Ui, **given: Any) -> Job:
    """Generate and measure perplexity, dense beside 20 % and 50 % of the FFN neurons removed.

    ``given``: settings of a run, such as model, device and results_dir; they win.
    """
    low, high = SPARSITIES
    settings = RunSettings(**{**SETTINGS, "sparsity": high, **given})
    also = [PruneConfig.build(settings.method, sparsity=low)]
    return run_job(settings, ui, also=also)
