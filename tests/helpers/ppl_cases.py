"""A text of one token per character, and how the perplexity tests measure on it."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import torch

from dart_llm.evaluation.measurement import Measurement, MeasureOptions
from dart_llm.evaluation.perplexity import measure_text, ran_pruned
from dart_llm.pruning.config import PruneConfig
from dart_llm.session.prepare import MemoryStore as Memory
from dart_llm.session.prepare import PreparedMethod as Candidate
from tiny import VOCAB, tiny

TEXT = "".join(chr(32 + (i * i * 7 + i // 3 * 11) % 90) for i in range(1000))
SLICES = MeasureOptions(limit=3, prompt_tokens=40, scored_tokens=30)
STANDARD = MeasureOptions(protocol="standard", window=100)
INTERVAL: dict[str, Any] = {
    "min_evidence": 0,
    "drift": {"rule": "interval 8", "min_distance": 0, "max_dense_share": 1.0},
    "remask": {"observe_tokens": 3},
}
shared = functools.cache(tiny)


def tokenizer(text: str, **options: Any) -> SimpleNamespace:
    """One token per character."""
    ids = [3 + ord(character) % (VOCAB - 3) for character in text]
    return SimpleNamespace(input_ids=torch.tensor([ids]))


IDS = tokenizer(TEXT).input_ids[0]


def candidate(method: str | None = None, model: str = "llama", **settings: Any) -> Candidate:
    config = None if method is None else PruneConfig.build(method, **settings)
    return Candidate(shared(model), tokenizer, config)


def measured(
    method: str | None = None,
    options: MeasureOptions = SLICES,
    text: str = TEXT,
    model: str = "llama",
    **settings: Any,
) -> Measurement:
    own = candidate(method, model, **settings)
    return measure_text(own, "a text", text, options, Memory(), lambda n: None)


def losses(found: Measurement) -> list[float]:
    return [loss for sample in found.samples for loss in sample["losses"]]


def flags(found: Measurement) -> list[bool]:
    return [flag for sample in found.samples for flag in ran_pruned(sample)]
