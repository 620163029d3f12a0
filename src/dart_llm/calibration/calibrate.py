"""Calibration: what a method learns from the dense model before any prompt is seen.

Static methods (``wanda``, ``flap``) take their masks from a text, ``glass`` a prior from what the
model writes by itself (docs/method.md, "Calibration").
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dart_llm.calibration import cache
from dart_llm.calibration.progress import (
    INSTEAD,
    ONE_BY_ONE,
    READING,
    WRITING,
    Advance,
    Say,
    forwards,
    graph_bytes,
    learning,
    nothing,
    text_bytes,
    weights_of,
)
from dart_llm.calibration.self_text import WRITTEN, sample_sequences
from dart_llm.data import documents
from dart_llm.errors import ConfigError, LoadError
from dart_llm.models.describe import describe
from dart_llm.patching.patch import ModelPatch, check_free
from dart_llm.pruning.config import BudgetConfig, CalibrationConfig, PruneConfig
from dart_llm.pruning.controller import PruningController
from dart_llm.pruning.masks import Masks
from dart_llm.pruning.registry import SCORES
from dart_llm.pruning.selection import MaskSelector, check_fits
from dart_llm.pruning.statistics import LayerStatistics, summed
from dart_llm.pruning.weights import FfnWeights

BATCH = 8
"""Sequences of one observed forward."""


@dataclass(frozen=True)
class Calibrated:
    """Masks, or a prior [I] per layer, and where they came from."""

    held: Masks | None
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
    """What ``config.calibration`` asks for; ``source`` as in data/documents.py.

    Raises ``ConfigError`` and ``LoadError`` for a text that cannot be used or had.
    """
    part = config.calibration
    assert part is not None
    selector = check_fits(observing(config), _layers(model, config))
    ids = None
    if part.source == "text":
        texts = documents.calibration_texts(source)
        ids = documents.sequences(tokenizer, texts, part.sequences, part.length)
        tokens = cache.digest_of(ids)
    else:
        start = documents.start_token(tokenizer) or _own_start(tokenizer)
        tokens = f"self {part.sequences} {part.length} {start} {config.seed}"
    key = cache.make_key(model, selector.statistics, tokens)
    devices = [layer.device for layer in selector.layers]
    evidence = cache.find(model, key, cache_dir, devices)
    note = _note(part, source, part.sequences if ids is None else len(ids))
    if evidence is None:
        check_free(model)
        what = f"calibrating {config.method}, once per model ({note})"
        work = _work(model, part, ids)
        memory = _memory(model, part, ids)
        with learning(model, say, what, work, memory, INSTEAD) as (faster, progress):
            if ids is None:
                write = progress.stage(WRITING)
                ids = sample_sequences(
                    faster, start, part.sequences, part.length, config.seed, write
                )
            evidence = observe(faster, config, ids, progress.stage(READING))
        try:
            cache.keep(model, key, cache_dir, evidence, {"note": note})
        except LoadError as error:
            say(f"the calibration is not kept for the next time: {error}")
    held, prior = choose(model, config, evidence)
    return Calibrated(held, prior, note)


def _work(model: Any, part: CalibrationConfig, ids: Tensor | None) -> dict[str, float]:
    """Multiply-adds of each stage of a calibration; ids None: the model writes its text."""
    tokens = part.sequences * part.length if ids is None else ids.numel()
    each = float(weights_of(model) * tokens)
    return ({WRITING: ONE_BY_ONE * each} if ids is None else {}) | {READING: each}


def _memory(model: Any, part: CalibrationConfig, ids: Tensor | None) -> int:
    """Bytes that a calibration takes beside the model, about."""
    rows = part.sequences if ids is None else len(ids)
    seen = graph_bytes(model, min(BATCH, rows) * part.length, backward=False)
    return (
        seen if ids is not None else max(seen, text_bytes(model, min(WRITTEN, rows), part.length))
    )


def _note(part: CalibrationConfig, source: str | None, found: int) -> str:
    words = "the model's own text"
    if part.source == "text":
        words = documents.calibration_source(source).title()
    short = "" if found == part.sequences else f" of {part.sequences}"
    size = f"{found}{short} sequences of {part.length} tokens ({found * part.length:,} tokens)"
    return f"calibration: {size} of {words}"


def observing(config: PruneConfig) -> PruneConfig:
    """The configuration that observes all that ``config`` needs at any sparsity and table.

    Signed means are observed for masks with and without compensation alike.  Raises
    ``ConfigError`` for a score that learns from the model's own text instead.
    """
    if SCORES.get(config.score.name).learns:
        raise ConfigError(
            f'score "{config.score.name}" learns from the model itself and never from a '
            "calibration: drop the calibration"
        )
    masks = config.calibration is not None and config.calibration.purpose == "masks"
    return PruneConfig(
        method=config.method,
        sparsity=0.5,
        score=config.score.model_copy(update={"strategy": "topk", "prior_weight": None}),
        budget=BudgetConfig(name=config.budget.name if masks else "uniform"),
        compensation=masks,
        seed=config.seed,
    )


@torch.no_grad()
def observe(
    model: Any, config: PruneConfig, ids: Tensor, advance: Advance = nothing
) -> list[LayerStatistics]:
    """Run ids [n, T] through the dense model; the evidence of every layer over all tokens.

    Raises ``AttachError`` when the model is being pruned.
    """
    layers = _layers(model, config)
    controller = PruningController(observing(config), layers)
    patch = ModelPatch(model, describe(model), controller, "masked")
    batches = torch.split(ids, BATCH)

    def observed() -> Iterator[Sequence[LayerStatistics]]:
        for _ in forwards(model, batches, advance):
            yield controller.sequences[0].evidence

    patch.install()
    try:
        return summed(observed(), [layer.device for layer in layers])
    finally:
        patch.remove()


@torch.no_grad()
def choose(
    model: Any, config: PruneConfig, evidence: Sequence[LayerStatistics]
) -> tuple[Masks | None, tuple[Tensor, ...] | None]:
    """(masks, None) or (None, prior), by the calibration's purpose."""
    part, layers = config.calibration, _layers(model, config)
    assert part is not None
    with torch.inference_mode(False):
        if part.purpose == "masks":
            return check_fits(config, layers).select(evidence).masks, None
        return None, tuple(MaskSelector(observing(config), layers).scores(evidence))


def _layers(model: Any, config: PruneConfig) -> tuple[FfnWeights, ...]:
    return describe(model).weights(config.score.proxy_embedding, config.seed)


def _own_start(tokenizer: Any) -> list[int]:
    """A token to start from where the tokenizer adds none: its start or end token, or nothing."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return [int(token)]
    return []
