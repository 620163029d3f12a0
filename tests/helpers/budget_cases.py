"""Golden values of the published budget, and layers to allocate over."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dart_llm.pruning.budgets import LayerView

S = (14, 1, 1.2, 0.9, 1.1, 1.3, 1, 0.8)
GOLDEN = {
    0.5: (0.1, 0.4042, 0.6321, 0.6709, 0.6606, 0.6504, 0.6452, 0.2366),
    0.7: (0.1, 0.6308, 0.9, 0.9, 0.9, 0.9, 0.9, 0.3692),
}


def depths(count: int) -> list[float]:
    return [layer / max(1, count - 1) for layer in range(count)]


def views(
    scores: Sequence[Tensor],
    sensitivity: Sequence[float] | None = None,
    residual: Sequence[float] | None = None,
    impacts: Sequence[Tensor] | None = None,
) -> list[LayerView]:
    return [
        LayerView(
            len(score),
            depth,
            score.double(),
            None if sensitivity is None else sensitivity[layer],
            None if residual is None else residual[layer],
            None if impacts is None else impacts[layer].double(),
        )
        for layer, (score, depth) in enumerate(zip(scores, depths(len(scores)), strict=True))
    ]
