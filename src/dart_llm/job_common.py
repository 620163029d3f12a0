"""What every job does: load the model, say where a result comes from, keep what was computed."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dart_llm.loading import checkpoint_facts, load
from dart_llm.outputs import timing_text
from dart_llm.provenance import git_state, machine, versions
from dart_llm.results import SCHEMA, ResultsFolder, now, write_text
from dart_llm.settings_base import BaseSettings
from dart_llm.ui import Ui


def write_logs(folder: ResultsFolder, said: Sequence[str], timing: dict[str, Any]) -> None:
    """output_<time>.log, what was said, and timing_<time>.log, for people."""
    write_text(folder.path / f"output_{folder.stamp}.log", "\n".join(said) + "\n")
    write_text(folder.path / f"timing_{folder.stamp}.log", timing_text(timing))


def load_model(settings: BaseSettings, ui: Ui) -> tuple[Any, Any, float]:
    """Model, tokenizer and the seconds it took."""
    for note in settings.notes:
        ui.say(note)
    begin = time.perf_counter()
    with ui.status(f"loading {settings.model}") as news:
        model, tokenizer = load(
            settings.model,
            dtype=settings.dtype,
            device=settings.device or (None if settings.device_map else "auto"),
            device_map=settings.device_map,
            revision=settings.revision,
            attn_implementation=settings.attn_implementation,
            trust_remote_code=settings.trust_remote_code,
            cache_dir=settings.cache_dir,
            progress=news,
        )
    facts = checkpoint_facts(model)
    ui.say(
        f"{facts.get('name')}: file quantisation {facts.get('file_quantisation') or 'none'}, "
        f"dtype {facts.get('dtype')}, device {model.device}"
    )
    return model, tokenizer, time.perf_counter() - begin


def config_document(
    kind: str,
    identity: Mapping[str, Any],
    prune: Mapping[str, Any],
    model: Any,
    status: str,
    previous: Mapping[str, Any],
) -> dict[str, Any]:
    """config.json: what was asked for, and where the result comes from.

    ``identity``: what makes two runs the same run.  ``model``: None before it is loaded.
    """
    done = status in ("complete", "interrupted", "failed")
    return {
        "schema": SCHEMA,
        "kind": kind,
        "status": status,
        "settings": dict(identity),
        "prune": dict(prune),
        "command": sys.argv,
        "process": os.getpid(),
        "versions": versions(),
        "git": git_state(Path(__file__).parent),
        "machine": machine(None if model is None else str(model.device)),
        "checkpoint": None if model is None else dict(checkpoint_facts(model)),
        "seed": identity.get("seed"),
        "started": previous.get("started", now().isoformat()),
        "finished": now().isoformat() if done else None,
    }
