"""A run in progress: what every part of the main job reads and adds to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dart_llm.config import PruneConfig
from dart_llm.results import ResultsFolder
from dart_llm.settings import RunSettings
from dart_llm.ui import Ui


@dataclass
class Job:
    """One run in progress.  ``also``: further configurations for the perplexity table."""

    settings: RunSettings
    ui: Ui
    folder: ResultsFolder
    also: Sequence[PruneConfig] = ()
    inputs: dict[str, Any] = field(default_factory=dict)
    """Digests of the prompt and of the files that the settings name."""
    model: Any = None
    tokenizer: Any = None
    config: dict[str, Any] = field(default_factory=dict)
    generations: dict[str, dict[str, Any]] = field(default_factory=dict)
    perplexity: list[dict[str, Any]] = field(default_factory=list)
    evaluations: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Rows of mmlu.json, general_nlp.json and summarization.json, by name."""
    timing: dict[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        return self.folder.path
