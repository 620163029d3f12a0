"""Track with Weights & Biases, offline unless ``WANDB_MODE`` says otherwise; imports wandb."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dart_llm.trackers import optional


class WandbBackend:
    """One wandb run."""

    def __init__(self, run: Any, where: str) -> None:
        self.where = where
        self._run = run

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def open_backend(project: str, run_name: str, config: dict[str, Any], folder: Path) -> WandbBackend:
    """A new run below ``folder / "wandb"``; without ``WANDB_MODE`` nothing is sent."""
    mode = os.environ.get("WANDB_MODE") or "offline"
    if mode == "offline":
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # wandb's own crash reports
    wandb = optional("wandb", "wandb")
    folder.mkdir(parents=True, exist_ok=True)
    run = wandb.init(
        project=project,
        name=run_name,
        config=config,
        dir=str(folder),
        mode=mode,
        settings={"console": "off", "quiet": True},  # terminal output is not copied
    )
    data = shlex.quote(str(folder / "wandb"))
    hint = f"; upload with wandb sync {data}/offline-run-*" if mode == "offline" else ""
    return WandbBackend(run, f"tracking to {data} (wandb, {mode}){hint}")
