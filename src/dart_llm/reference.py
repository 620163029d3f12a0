"""Which tokens count as evidence, and for a drift detector's reference; sinks are left out.

The first tokens of a sequence draw attention whatever they say (docs/method.md, "Drift").
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dart_llm.drift import SINKS
from dart_llm.life import Life
from dart_llm.plan import Call, Held, Kind, token_weights


def add_reference(lives: Sequence[Life], held: Held, v: Tensor, real: Sequence[float]) -> None:
    """Hand v [B, T, D] to the detectors of the lives that observe.

    ``real``: tokens of each row before this forward, padding left out.
    """
    end = v.shape[1]
    weights, live = token_weights(held.call, end), held.call.live
    padded = held.call.kind is Kind.PREFILL and weights is not None
    if padded:
        weights = without_sinks(weights, real, held.call.rows, end)
    for life, wanted in zip(lives, held.observing, strict=True):
        if wanted:
            rows, skip = life.batch_rows, 0 if padded else sinks_ahead(life, end, real)
            w = None if weights is None else weights[rows, skip:].to(v.device)
            life.detector.observe(v[rows, skip:], w, None if live is None else live[rows])


def sinks_ahead(life: Life, tokens: int, real: Sequence[float]) -> int:
    """How many of the next ``tokens`` are attention sinks (of the shortest row)."""
    before = min(real) if life.row is None else real[life.row]
    return max(0, min(SINKS - int(before), tokens))


def evidence_weights(call: Call, end: int, real: Sequence[float], skip: bool) -> Tensor | None:
    """Weights of a forward's first ``end`` tokens in the evidence: [B, end], or None for all ones.

    ``real``: tokens of each row before them; ``skip``: sinks weigh nothing.
    """
    weights = token_weights(call, end)
    if not skip or min(real) >= SINKS:
        return weights
    return without_sinks(weights, real, call.rows, end)


def without_sinks(weights: Tensor | None, real: Sequence[float], rows: int, end: int) -> Tensor:
    """Token weights [B, end] with 0 where a token is one of the first of its row.

    ``weights``: [B, end] or None for all ones; ``real``: tokens of each row before these.
    """
    if weights is None:
        weights = torch.ones(rows, end, dtype=torch.float32)
    before = torch.tensor(real, device=weights.device)[:, None]
    return weights * (weights.cumsum(1) - 1 + before >= SINKS)
