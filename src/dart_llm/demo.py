"""``dart-llm demo``: what this project does, in a minute or two, on the default model."""

from __future__ import annotations

from dart_llm.config import PruneConfig
from dart_llm.job import run_job
from dart_llm.job_state import Job
from dart_llm.settings import RunSettings
from dart_llm.ui import Ui

SPARSITIES = (0.2, 0.5)
TOKENS = 96
SLICES = 6


def run_demo(cache_dir: str | None, results_dir: str, quiet: bool) -> Job:
    """Generate and measure perplexity, dense beside 20 % and 50 % of the FFN neurons removed."""
    low, high = SPARSITIES
    settings = RunSettings(
        model="smollm2-135m",
        cache_dir=cache_dir,
        sparsity=high,
        prompt="sky",
        chat=True,
        generation=TOKENS,
        eval_perplexity=True,
        ppl_max_samples=SLICES,
        experiment_name="demo",
        results_dir=results_dir,
    )
    also = [PruneConfig.build("dart", sparsity=low)]
    return run_job(settings, Ui(quiet), also=also)
