"""One cell of a grid: everything that decides one measurement, as plain data with a stable key.

A cell travels as JSON (``to_dict``, ``from_dict``), so that any process on any machine can
compute it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dart_llm.evaluation.measurement import MeasureOptions
from dart_llm.pruning.config import USER_MASKS, PruneConfig
from dart_llm.pruning.registry import METHODS
from dart_llm.settings import load_arguments

_SLUG = 56

_ELSEWHERE = ("cache_dir",)
"""Fields that decide where files are, not what a result is."""


@dataclass(frozen=True)
class Cell:
    """One model, pruned in one way, measured on one task.

    ``overrides``: changes to the preset, as ``PruneConfig.build`` takes them.  ``layers``,
    ``keep``, ``base_keep``: how the layer table in ``overrides`` was made, for tables and plots.
    ``calibration``: name of the text that calibrated methods read; None: their default.
    ``masks``: a file with the masks to use.  ``name``: label in the results, where the method
    and the sparsity are not enough.  ``inputs``: sha256 of the files that the cell only names.
    """

    model: str
    method: str
    task: str
    sparsity: float | None = None
    seed: int = 0
    layers: str = ""
    keep: float | None = None
    base_keep: float | None = None
    options: MeasureOptions = field(default_factory=MeasureOptions)
    overrides: Mapping[str, Any] = field(default_factory=dict)
    calibration: str | None = None
    masks: str | None = None
    name: str = ""
    dtype: str | None = None
    weights: str | None = None
    device: str | None = None
    device_map: str | None = None
    revision: str | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    cache_dir: str | None = None
    inputs: Mapping[str, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """A readable name and a hash of everything that decides the result."""
        data = {k: v for k, v in self.to_dict().items() if k not in _ELSEWHERE and v is not None}
        text = json.dumps(data, sort_keys=True, ensure_ascii=True)
        return f"{self._slug}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"

    @property
    def label(self) -> str:
        """What is measured: ``dense``, ``dart@0.5`` or ``griffin layers 0-3 keep 0.5``."""
        if self.name:
            return self.name
        if self.masks:
            return USER_MASKS
        if self.layers:
            return f"{self.method} layers {self.layers} keep {self.keep:g}"
        return self.method if self.sparsity is None else f"{self.method}@{self.sparsity:g}"

    @property
    def short_task(self) -> str:
        """The task, with the name of a file in place of its path."""
        return short_task(self.task)

    @property
    def _slug(self) -> str:
        model = Path(self.model.rstrip("/")).name
        text = "-".join((model, self.label, self.short_task, self.options.protocol)).lower()
        return re.sub(r"[^a-z0-9.@_]+", "-", text)[:_SLUG].strip("-.")

    @property
    def load_arguments(self) -> dict[str, Any]:
        """Keyword arguments of ``dart_llm.load``; cells with equal ones share a model."""
        return load_arguments(self)

    def config(self) -> PruneConfig:
        """The preset with the cell's changes; raises ``ConfigError`` when they do not fit."""
        changes = {**self.overrides, "sparsity": self.sparsity, "seed": self.seed}
        return PruneConfig.build(self.method, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able data; ``from_dict`` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Cell:
        return cls(**{**data, "options": MeasureOptions(**data["options"])})


def removes_nothing(method: str) -> bool:
    """Whether a method is a form of the dense model, which no sparsity changes."""
    return bool(METHODS.get(method).sparsity == 0)


def short_task(task: str) -> str:
    """A task, with the name of a file in place of its path."""
    return ":".join(Path(part).name for part in task.split(":"))
