"""Perplexity under the ``decode`` protocol: every prediction is made by a decode forward.

A slice is P prompt tokens and C scored ones.  The first P - 1 tokens are the prompt (dense,
observed); token P and the C - 1 that follow run as decode tokens through the live tracer, so all C
predictions are pruned ones.  docs/method.md, "Evaluation".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dart_llm.errors import ConfigError, DartError
from dart_llm.records import RunReport
from dart_llm.session import Run

CHUNK = 256
"""Decode tokens fed in one forward at most, where no state can change in between."""


@dataclass(frozen=True)
class Scored:
    """Losses of one method on all slices (nats per token), and how they came about."""

    losses: tuple[tuple[float, ...], ...]
    report: RunReport | None

    @property
    def mean_loss(self) -> float:
        flat = [loss for losses in self.losses for loss in losses]
        return sum(flat) / len(flat)

    @property
    def perplexity(self) -> float:
        return math.exp(min(700.0, self.mean_loss))


def slices(ids: Tensor, count: int | None, prompt: int, scored: int) -> list[Tensor]:
    """``count`` evenly spaced windows of ``prompt + scored`` tokens; None: as many as fit.

    ids: [T].  Raises ``ConfigError`` when the text is too short for one.
    """
    if prompt < 2 or scored < 1:
        raise ConfigError("a perplexity slice needs at least 2 prompt tokens and 1 scored token")
    size = prompt + scored
    fit = len(ids) // size
    if not fit:
        raise ConfigError(
            f"the text has {len(ids)} tokens; a slice needs {prompt} prompt + {scored} scored "
            "tokens: give a longer text or fewer tokens"
        )
    number = fit if count is None else min(count, fit)
    starts = [round(i * (len(ids) - size) / max(1, number - 1)) for i in range(number)]
    return [ids[start : start + size] for start in starts]


@torch.inference_mode()
def score_slice(model: Any, run: Run | None, window: Tensor, prompt: int) -> list[float]:
    """Losses (nats) of the tokens after the first ``prompt`` of one window [P + C].

    ``run``: an attached run, or None for the untouched model.  Raises ``DartError`` when a loss is
    not finite.
    """
    losses = _score_window(model, run, window[None].to(model.device), prompt)
    if not bool(losses.isfinite().all()):
        raise DartError("a loss is not finite: the model overflows; try dtype float32")
    return [float(loss) for loss in losses.tolist()]


def score(
    model: Any,
    run: Run | None,
    windows: Sequence[Tensor],
    prompt: int,
    advance: Callable[[int], None] = lambda tokens: None,
) -> Scored:
    """``score_slice`` over all windows; ``advance(1)`` is called after each."""
    results = []
    for window in windows:
        results.append(tuple(score_slice(model, run, window, prompt)))
        advance(1)
    return Scored(tuple(results), None if run is None else run.report())


def _score_window(model: Any, run: Run | None, ids: Tensor, prompt: int) -> Tensor:
    """ids: [1, P + C].  Returns C losses, float32."""
    cache = model(ids[:, : prompt - 1], use_cache=True, logits_to_keep=1).cache
    losses, start, end = [], prompt - 1, ids.shape[1] - 1
    while start < end:
        size = min(CHUNK, end - start)
        if run is not None:
            size = min(size, run.tokens_until_change() or size)
        output = _decode(model, run, ids[:, start : start + size], cache)
        cache = output.cache
        targets = ids[0, start + 1 : start + size + 1]
        losses.append(F.cross_entropy(output.logits[0].float(), targets, reduction="none"))
        start += size
    return torch.cat(losses)


def _decode(model: Any, run: Run | None, ids: Tensor, cache: Any) -> Any:
    if run is None:
        return model(ids, cache=cache, use_cache=True)
    with run.decoding():
        return model(ids, cache=cache, use_cache=True)


def ratio_interval(
    pruned: Scored, dense: Scored, samples: int = 2000, seed: int = 0
) -> tuple[float, float] | None:
    """95 % bootstrap interval over slices of ``perplexity(pruned) / perplexity(dense)``.

    None with fewer than two slices, which say nothing of the spread.
    """
    import numpy as np

    gaps = np.array(
        [
            sum(a) / len(a) - sum(b) / len(b)
            for a, b in zip(pruned.losses, dense.losses, strict=True)
        ]
    )
    if len(gaps) < 2:
        return None
    draws = np.random.default_rng(seed).integers(0, len(gaps), (samples, len(gaps)))
    low, high = np.quantile(gaps[draws].mean(1), [0.025, 0.975])
    return float(math.exp(low)), float(math.exp(high))
