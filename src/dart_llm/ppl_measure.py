"""Perplexity as a measurement: one method on one text, resumable window by window."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor

from dart_llm import ppl_texts
from dart_llm.arch import context_length
from dart_llm.candidate import Candidate, Parts
from dart_llm.errors import ConfigError
from dart_llm.likelihood import SHORT
from dart_llm.mask_counts import MaskCounts
from dart_llm.mask_parts import unpack
from dart_llm.measurement import LEAK, Measurement, MeasureOptions
from dart_llm.merge import add_dense, merge_reports
from dart_llm.perplexity import perplexity
from dart_llm.ppl_parts import Part, is_first, part_key, ran_pruned, score_part
from dart_llm.ppl_windows import STANDARD, Window, cut
from dart_llm.session import Run

Score = Callable[[Candidate, Run | None, Window, str], Part]


def measure(
    candidate: Candidate,
    name: str,
    options: MeasureOptions,
    parts: Parts,
    advance: Callable[[int], None],
) -> Measurement:
    """Perplexity on the text called ``name`` (``ppl_texts.read``); see ``measure_text``."""
    return measure_text(candidate, name, ppl_texts.read(name), options, parts, advance)


def measure_text(
    candidate: Candidate,
    name: str,
    text: str,
    options: MeasureOptions,
    parts: Parts,
    advance: Callable[[int], None],
) -> Measurement:
    """Perplexity on ``text`` under ``options.protocol``; ``advance(1)`` after each window.

    Raises ``ConfigError`` when the text is too short, a slice too long, or all tokens of a slice
    ran dense though sparsity was asked for; ``DartError`` when a loss is not finite.
    """
    windows, notes = cut(_ids(candidate.tokenizer, text), options, context_length(candidate.model))
    return measure_windows(candidate, name, windows, options.protocol, parts, advance, notes)


def count(name: str, options: MeasureOptions, tokenizer: Any, longest: int | None = None) -> int:
    """How many windows ``measure`` scores; ``longest``: tokens of the model's context."""
    return len(cut(_ids(tokenizer, ppl_texts.read(name)), options, longest)[0])


def _ids(tokenizer: Any, text: str) -> Tensor:
    """[T]; special tokens as the tokenizer adds them."""
    ids: Tensor = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    return ids


def measure_windows(
    candidate: Candidate,
    name: str,
    windows: Sequence[Window],
    protocol: str,
    parts: Parts,
    advance: Callable[[int], None],
    notes: Sequence[str] = (),
    score: Score = score_part,
) -> Measurement:
    """Score all windows, keeping each as a part; ``name``: what the text is called."""
    run = candidate.run(likelihood=protocol != "decode")
    if protocol == STANDARD and run is not None and run.asks_for_pruning:
        _check_any_pruned(candidate, windows)
    found: list[Part] = []
    for window in windows:
        key = part_key(candidate, name, protocol, window)
        part = parts.part(key)
        if part is None:
            part = score(candidate, run, window, protocol)
            parts.save_part(key, part)
        found.append(part)
        advance(1)
    items = tuple(_item(window, part) for window, part in zip(windows, found, strict=True))
    counts = MaskCounts()
    for part in found:
        for packed in part["masks"]:
            counts(unpack(packed))
    return Measurement(
        task=f"perplexity:{name}",
        protocol=protocol,
        metric="perplexity",
        higher_is_better=False,
        metrics=_metrics(found),
        items=items,
        accounting=None if run is None else _accounting(run, found),
        samples=tuple(_sample(window, part) for window, part in zip(windows, found, strict=True)),
        notes=(*candidate.notes, *notes, *_notes(run, protocol, found)),
        counts=counts.counts,
        masks=counts.masks,
    )


def _check_any_pruned(candidate: Candidate, windows: Sequence[Window]) -> None:
    if all(is_first(window) for window in windows):
        raise ConfigError(
            f"perplexity of {candidate.label}: protocol standard takes the masks of a window from "
            "the text before it, and the first window, which has none, is all there is; give a "
            "longer text, a larger --limit or a smaller --window"
        )


def _item(window: Window, part: Part) -> dict[str, Any]:
    losses = part["losses"]
    return {
        "id": window.id,
        "mean_loss": math.fsum(losses) / len(losses),
        "tokens": len(losses),
        "pruned_tokens": sum(ran_pruned(part)),
    }


def _sample(window: Window, part: Part) -> dict[str, Any]:
    """``first``: index of the first scored token in its window; ``pruned``: runs of equal flags."""
    return {
        "id": window.id,
        "start": window.start,
        "first": window.first,
        "losses": list(part["losses"]),
        "pruned": [list(run) for run in part["pruned"]],
    }


def _metrics(parts: Sequence[Part]) -> dict[str, float | None]:
    """``..._pruned_tokens`` only where some ran pruned."""
    losses = [loss for part in parts for loss in part["losses"]]
    flags = [flag for part in parts for flag in ran_pruned(part)]
    pruned = [loss for loss, flag in zip(losses, flags, strict=True) if flag]
    found = {"perplexity": perplexity(_mean(losses)), "mean_loss": _mean(losses)}
    if pruned:
        found["perplexity_pruned_tokens"] = perplexity(_mean(pruned))
        found["mean_loss_pruned_tokens"] = _mean(pruned)
    return {**found, "tokens": len(losses), "pruned_tokens": len(pruned)}


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _accounting(run: Run, parts: Iterable[Part]) -> dict[str, Any]:
    reports = [part["report"] for part in parts if part["report"]]
    run.reset()
    merged = merge_reports(reports) if reports else run.report().to_dict()
    merged = dict(add_dense(merged, sum(part["dense_tokens"] for part in parts)))
    merged.pop("sequences")
    return merged


def _notes(run: Run | None, protocol: str, parts: Sequence[Part]) -> list[str]:
    if run is None:
        return []
    notes = [LEAK] if protocol == "published" else []
    dense = sum(part["dense_tokens"] for part in parts)
    if dense:
        notes.append(
            f"{dense} tokens ran dense: fewer than {SHORT} tokens lie before their window, too few "
            "to choose masks from"
        )
    return notes
