"""Jobs of ``bench speed`` on tiny models with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dart_llm.experiments.study import run_study
from dart_llm.reporting.console import Ui
from dart_llm.settings import merge
from dart_llm.studies.speed.settings import SpeedSettings
from dart_llm.studies.speed.study import SpeedStudy
from tiny import CONFIGS

PROMPT, TOKENS = 12, 12


def shape(root: Path, name: str = "llama") -> Path:
    """The config.json of a tiny model."""
    kind, settings = CONFIGS[name]
    root.mkdir(parents=True, exist_ok=True)
    path = root / f"{name}.json"
    path.write_text(json.dumps({"model_type": kind, **settings}), encoding="utf-8")
    return path


def settings(root: Path, name: str = "llama", **more: Any) -> SpeedSettings:
    given = {
        "shape": str(shape(root, name)),
        "results_dir": str(root / "results"),
        "device": "cpu",
        "dtype": "float32",
        "methods": "griffin",
        "sparsities": "0.5",
        "prompt_tokens": PROMPT,
        "tokens": TOKENS,
        "repeats": 2,
        "warmup": False,
    }
    return merge(SpeedSettings, {**given, **more}, environment={})


def job(root: Path, name: str = "llama", ui: Ui | None = None, **more: Any) -> SpeedStudy:
    return run_study(
        SpeedStudy(settings(root, name, **more), ui or Ui(quiet=True), bandwidth_mib=1)
    )


def sample(
    steps_ms: list[float], phases: str = "", built: tuple[int, ...] = (), **more: Any
) -> dict[str, Any]:
    """A sample as the clock gives it; ``phases``: a letter per step, o observe, p pruned."""
    names = {"o": "observe", "p": "pruned"}
    found = {"first_token_s": 0.1, "warm_s": [0.03, 0.002]}
    found |= {"steps_s": [ms / 1000 for ms in steps_ms], **more}
    if phases:
        found |= {"phases": [names[letter] for letter in phases], "built": list(built)}
    return found
