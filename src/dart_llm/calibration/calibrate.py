"""Calibration: what a method collects from the dense model before any prompt is seen.

Static methods (``wanda``, ``flap``) take their masks from a text, ``glass`` a prior from
self-generated text (docs/reference.md, "Self-calibration").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dart_llm.calibration import cache
from dart_llm.calibration.collect import BATCH, Needs, collect
from dart_llm.calibration.progress import (
    INSTEAD,
    ONE_BY_ONE,
    READING,
    WRITING,
    Say,
    graph_bytes,
    learning,
    text_bytes,
)
from dart_llm.calibration.self_text import (
    WRITTEN,
    sample_continuations,
    start_ids,
    start_tokens,
)
from dart_llm.data import documents
from dart_llm.errors import ConfigError, LoadError
from dart_llm.models.describe import describe
from dart_llm.models.fingerprint import digest_of, fingerprint
from dart_llm.patching.patch import check_free
from dart_llm.pruning.config import BudgetConfig, CalibrationConfig, PruneConfig
from dart_llm.pruning.masks import Masks
from dart_llm.pruning.registry import SCORES
from dart_llm.pruning.selection import MaskSelector, check_fits
from dart_llm.pruning.statistics import LayerStatistics, from_tensors, to_tensors
from dart_llm.pruning.weights import FfnWeights


@dataclass(frozen=True)
class Calibrated:
    """Masks, or a prior [I] per layer, and a note of where they came from."""

    fixed_masks: Masks | None
    prior: tuple[Tensor, ...] | None
    note: str


def calibrate(
    model: Any,
    tokenizer: Any,
    config: PruneConfig,
    source: str | None,
    cache_dir: str | None,
    say: Say,
) -> Calibrated:
    """What ``config.calibration`` requests; ``source`` as in data/documents.py.

    Raises ``ConfigError`` and ``LoadError`` for a text that cannot be used or had.
    """
    part = config.calibration
    assert part is not None
    statistics = observing(config, _layers(model, config)).statistics
    ids = None
    if part.source == "text":
        texts = documents.load(documents.calibration_source(source))
        ids = documents.sequences(tokenizer, texts, part.sequences, part.length)
        tokens = digest_of(ids)
    else:
        tokens = f"self {part.sequences} {part.length} {start_tokens(model)} {config.seed}"
    parts = cache.rule_of(statistics), statistics.ema_decay, sorted(statistics.beside_score)
    key = cache.key_of(fingerprint(model), *parts, tokens)
    count = part.sequences if ids is None else len(ids)
    note = _note(part, source, count)
    tensors = cache.find(model, key, cache_dir)
    if tensors is None:
        check_free(model)
        what = f"calibrating {config.method}, once per model ({note})"
        work, memory = _effort(model, part, count)
        with learning(model, say, what, work, memory, INSTEAD) as (faster, progress):
            if ids is None:
                generator = torch.Generator().manual_seed(config.seed)
                first = start_ids(faster, part.sequences, generator)
                write = progress.stage(WRITING)
                ids = sample_continuations(faster, first, part.length, generator, write)
            tensors = to_tensors(collect(faster, ids, Needs(statistics), progress.stage(READING)))
        try:
            cache.keep(model, key, cache_dir, tensors, {"note": note})
        except LoadError as error:
            say(f"the calibration is not kept for the next time: {error}")
    masks, prior = choose(model, config, from_tensors(tensors, len(_layers(model, config))))
    return Calibrated(masks, prior, note)


def _effort(model: Any, part: CalibrationConfig, count: int) -> tuple[dict[str, float], int]:
    """Tokens of each stage, and bytes beside the model, about."""
    reading = float(count * part.length)
    memory = graph_bytes(model, min(BATCH, count) * part.length, backward=False)
    if part.source == "text":
        return {READING: reading}, memory
    written = text_bytes(model, min(WRITTEN, count), part.length)
    return {WRITING: ONE_BY_ONE * reading, READING: reading}, max(memory, written)


def _note(part: CalibrationConfig, source: str | None, count: int) -> str:
    words = "self-generated text"
    if part.source == "text":
        words = documents.calibration_source(source).label
    short = "" if count == part.sequences else f" of {part.sequences}"
    size = f"{count}{short} sequences of {part.length} tokens ({count * part.length:,} tokens)"
    return f"calibration: {size} of {words}"


def observing(config: PruneConfig, layers: Sequence[FfnWeights]) -> MaskSelector:
    """The selector that observes all that ``config`` needs at any sparsity and table.

    Signed means are observed for masks with and without compensation alike.  Raises
    ``ConfigError`` for a score that reads learned gradients instead.
    """
    if SCORES.get(config.score.name).needs_fisher:
        raise ConfigError(
            f'score "{config.score.name}" reads gradients that the model learns from itself, not '
            "a calibration: drop the calibration"
        )
    masks = config.calibration is not None and config.calibration.purpose == "masks"
    observed = PruneConfig(
        method=config.method,
        sparsity=0.5,
        score=config.score.model_copy(update={"strategy": "topk", "prior_weight": None}),
        budget=BudgetConfig(name=config.budget.name if masks else "uniform"),
        compensation=masks,
        seed=config.seed,
    )
    return check_fits(observed, layers)


@torch.no_grad()
def choose(
    model: Any, config: PruneConfig, evidence: Sequence[LayerStatistics]
) -> tuple[Masks | None, tuple[Tensor, ...] | None]:
    """(masks, None) or (None, prior), by the calibration's purpose."""
    part, layers = config.calibration, _layers(model, config)
    assert part is not None
    for layer, statistics in zip(layers, evidence, strict=True):
        for entry in statistics.sums.values():
            entry.total = entry.total.to(layer.device)
    with torch.inference_mode(False):
        if part.purpose == "masks":
            return check_fits(config, layers).select(evidence).masks, None
        return None, tuple(observing(config, layers).scores(evidence))


def _layers(model: Any, config: PruneConfig) -> tuple[FfnWeights, ...]:
    return describe(model).weights(config.score.proxy_embedding, config.seed)
