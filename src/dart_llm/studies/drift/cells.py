"""The cells of a drift study: every source with every seed and every method, in that order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from dart_llm.data import passages
from dart_llm.data.passages import SHIPPED, Topic
from dart_llm.data.prompts import given_prompt
from dart_llm.data.topic_prompts import DriftPrompt
from dart_llm.errors import ConfigError
from dart_llm.pruning.config import PruneConfig
from dart_llm.studies.drift.settings import DENSE, FORCED, DriftMethod, DriftSettings

LONGEST_FILE = 240
"""Bytes of a file's name; most disks hold 255, and a file is written under a longer one first."""


@dataclass(frozen=True)
class Source:
    """A prompt, or a passage with ``changes``: characters at which its later topics begin."""

    id: str
    text: str
    topics: tuple[Topic, ...] = ()
    changes: tuple[int, ...] = ()


@dataclass(frozen=True)
class DriftCell:
    """One method on one source."""

    mode: str
    source: Source
    method: DriftMethod
    seed: int

    @property
    def key(self) -> str:
        return f"{self.mode}/{self.source.id}/{self.method.label}/{self.seed}"

    @property
    def dense_key(self) -> str:
        """Of the untouched model on the same source with the same seed."""
        return f"{self.mode}/{self.source.id}/{DENSE}/{self.seed}"

    @property
    def file(self) -> str:
        """Name of the cell's file of masks."""
        return f"{self.key.replace('/', '-')}.safetensors"

    def config(self) -> PruneConfig | None:
        """How the model is pruned; None for the untouched one."""
        config = self.method.config
        if config is None or config.weight_bits is not None:
            return config
        return config.replace({"seed": self.seed})

    def facts(self, model: str, dtype: str | None) -> dict[str, Any]:
        """What stands under ``cell`` in results.jsonl."""
        return {
            "model": model,
            "dtype": dtype,
            "mode": self.mode,
            "source": self.source.id,
            "method": self.method.name,
            "sparsity": self.method.sparsity,
            "seed": self.seed,
        }


def load_sources(settings: DriftSettings) -> tuple[Source, ...]:
    """What the study writes after or reads; raises ``ConfigError`` for a file that does not fit."""
    if settings.kind == FORCED:
        given = passages.passages(settings.passages)[: settings.limit]
        return tuple(Source(one.id, one.text, one.topics, one.changes) for one in given)
    if settings.prompt is not None:
        text = given_prompt(settings.prompt)
        if not text.strip():
            raise ConfigError("the prompt is empty: give at least one word")
        return (Source("prompt", text),)
    own = settings.prompts != SHIPPED
    file = passages.existing("prompts", str(settings.prompts)) if own else None
    return tuple(map(_prompt, passages.listed_prompts(file)[: settings.limit]))


def _prompt(prompt: DriftPrompt) -> Source:
    """The topics are those of the slots where the prompt has some."""
    names = [prompt.slots.get(f"topic_{side}") for side in "ab"]
    topics = tuple(
        Topic(name or domain, domain)
        for name, domain in zip(names[: len(prompt.domains)], prompt.domains, strict=True)
    )
    return Source(prompt.id, prompt.text, topics)


def expand(
    settings: DriftSettings, sources: Sequence[Source], methods: Sequence[DriftMethod]
) -> tuple[DriftCell, ...]:
    """All cells; raises ``ConfigError`` when an id names no file, or two cells would share one."""
    cells = tuple(
        DriftCell(settings.kind, source, method, seed)
        for source in sources
        for seed in settings.seed_list()
        for method in methods
    )
    files: dict[str, DriftCell] = {}
    for cell in cells:
        if "\0" in cell.file or len(cell.file.encode()) > LONGEST_FILE:
            raise ConfigError(
                f'no file can be named after the id "{cell.source.id[:40]}...": give a shorter '
                "one, without NUL"
            )
        other = files.setdefault(cell.file.lower(), cell)
        if other is not cell:
            raise ConfigError(
                f'the ids "{other.source.id}" and "{cell.source.id}" would give two cells one '
                "file: rename one"
            )
    return cells


def shortened(source: Source, end: int) -> Source:
    """The passage cut at character ``end``, without the topics that begin after it."""
    changes = tuple(change for change in source.changes if change < end)
    topics = source.topics[: len(changes) + 1]
    return replace(source, text=source.text[:end], topics=topics, changes=changes)


def digest(sources: Sequence[Source]) -> str:
    """sha256 of everything that the sources say."""
    data = json.dumps([asdict(source) for source in sources], sort_keys=True)
    return hashlib.sha256(data.encode()).hexdigest()
