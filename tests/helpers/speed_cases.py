"""Jobs of ``bench speed`` on tiny models with random weights."""

import json

from dart_llm.experiments.study import run_study
from dart_llm.experiments.timing import repetition
from dart_llm.reporting.console import Ui
from dart_llm.settings import merge
from dart_llm.studies.bench.settings import SpeedSettings
from dart_llm.studies.bench.speed import SpeedStudy
from tiny import CONFIGS

PROMPT, TOKENS = 12, 12


def shape(root, name="llama"):
    """The config.json of a tiny model."""
    kind, settings = CONFIGS[name]
    root.mkdir(parents=True, exist_ok=True)
    path = root / f"{name}.json"
    path.write_text(json.dumps({"model_type": kind, **settings}), encoding="utf-8")
    return path


def settings(root, name="llama", **more):
    given = {"shape": str(shape(root, name)), "results_dir": str(root / "results")}
    given |= {"device": "cpu", "dtype": "float32", "methods": "griffin", "sparsities": "0.5"}
    given |= {"prompt_tokens": PROMPT, "tokens": TOKENS, "repeats": 2, "warmup": False}
    return merge(SpeedSettings, {**given, **more}, environment={})


def job(root, name="llama", ui=None, **more):
    return run_study(
        SpeedStudy(settings(root, name, **more), ui or Ui(quiet=True), bandwidth_mib=1)
    )


def steady(model, ids, tokens, make):
    """``repetition`` whose tokens always take the same time: nothing that it times is disturbed."""
    found = repetition(model, ids, tokens, make)
    ms = 2.0 - 0.4 * found["achieved_sparsity"] if "achieved_sparsity" in found else 4.0
    return {**found, "steps_s": [ms / 1000] * len(found["steps_s"])}


def sample(steps_ms, **more):
    """A sample as the clock gives it."""
    steps = [ms / 1000 for ms in steps_ms]
    return {"first_token_s": 0.1, "warm_s": [0.03, 0.002], "steps_s": steps, **more}
