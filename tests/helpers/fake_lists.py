"""Results folders of several kinds, with known numbers, as jobs would have written them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fake_results
from dart_llm.files import write_json, write_lines

CHECKPOINT = {"name": "Qwen2.5-0.5B", "file_quantisation": "none", "dtype": "float32"}


def measurement(task: str, value: float | None, achieved: float | None) -> dict[str, Any]:
    accounting = None
    if achieved is not None:
        accounting = {"achieved_sparsity": achieved, "dense_token_share": 0.125, "remasks": 2}
    return {
        "task": task,
        "protocol": "decode",
        "metric": "acc",
        "higher_is_better": True,
        "metrics": {"acc": value, "acc_norm": 0.4},
        "items": [{"id": 0, "acc": 1.0}, {"id": 1, "acc": 0.0}],
        "accounting": accounting,
    }


def cell(method: str, sparsity: float | None, task: str, value: float | None, **more: Any) -> Any:
    achieved = None if method == "dense" else sparsity
    return {
        "key": f"{method}-{sparsity}-{task}",
        "status": "done",
        "cell": {"model": "x/Qwen", "method": method, "sparsity": sparsity, "task": task},
        "label": method if sparsity is None else f"{method}@{sparsity:g}",
        "checkpoint": CHECKPOINT,
        "measurement": measurement(task, value, achieved),
        **more,
    }


def write_sweep(folder: Path, **changes: Any) -> Path:
    """Six cells planned, five computed, one of them failed."""
    cells = [
        cell("dense", None, "arc_easy", 0.6),
        cell("dart", 0.3, "arc_easy", 0.55),
        cell("dart", 0.5, "arc_easy", 0.45),
        cell("griffin", 0.5, "arc_easy", 0.25),
        cell("griffin", 0.7, "mmlu", None, status="failed", error="the loss is NaN at item 3"),
    ]
    folder.mkdir(parents=True)
    planned = [one["cell"] for one in cells] + [{"task": "mmlu", "method": "dart"}]
    config = {
        "status": "interrupted",
        "kind": "sweep",
        "cells": planned,
        "started": "2026-05-01T10:00:00+00:00",
        "finished": "2026-05-01T10:01:30+00:00",
    }
    write_json(folder / "config.json", {**config, **changes})
    write_lines(folder / "results.jsonl", cells)
    return folder


def write_root(root: Path) -> Path:
    """A run, an eval, a sweep, and folders that are no runs."""
    fake_results.write_results(root / "main" / "20260304-050607", {"kind": "run"})
    folder = root / "eval-qwen-griffin-0.5" / "20260401-120000"
    folder.mkdir(parents=True)
    config = {
        "status": "complete",
        "kind": "eval",
        "settings": {"model": "x/Qwen", "method": "griffin", "tasks": "arc_easy"},
        "prune": {"method": "griffin", "sparsity": 0.5},
        "checkpoint": CHECKPOINT,
        "started": "2026-04-01T12:00:00+00:00",
    }
    write_json(folder / "config.json", config)
    entry = {**measurement("arc_easy", 0.5, 0.48), "method": "griffin", "sparsity": 0.5}
    write_json(folder / "measurements.json", {"measurements": [{**entry, "label": "griffin@0.5"}]})
    write_sweep(root / "grids" / "first" / "20260501-100000")
    write_json(made(root / "a-model") / "config.json", {"model_type": "gpt2"})
    made(root / "tensorboard" / "main" / "20260304-050607")
    made(root / ".cache" / "20260304-050607")
    return root


def made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder
