"""The published budget: sensitivity times a fixed profile over depth."""

from __future__ import annotations

from collections.abc import Sequence

from dart_llm.budgets import LayerView, budget, round_counts

_SOURCE = "DART, arXiv 2601.22632, the published scripts' allocator"


def depth_profile(y: float) -> float:
    """D_l for relative depth ``y`` = l / (L - 1): low in the first 30 % and the last 15 %."""
    if y < 0.3:
        return 0.25 + 0.75 * y / 0.3
    if y > 0.85:
        return 0.35 + 0.65 * (1 - y) / 0.15
    return 1.0


def depth_sparsities(
    sensitivity: Sequence[float], depths: Sequence[float], rho: float
) -> list[float]:
    """Sparsity of each layer for a mean of ``rho``.

    ``R = 1 - (S - min S) / (max S - min S + 1e-6)``, ``P = R * D``,
    ``p = clip(rho L P / sum P, lo, hi)``; the residue is spread over the layers that are not at a
    bound in proportion to P until the mean is exact.
    """
    count = len(sensitivity)
    if count == 1 or rho == 0:
        return [rho] * count
    low, high = min(sensitivity), max(sensitivity)
    robust = [1 - (s - low) / (high - low + 1e-6) for s in sensitivity]
    priority = [r * depth_profile(y) for r, y in zip(robust, depths, strict=True)]
    lo, hi = min(0.1, rho), max(0.9, rho)
    scale = rho * count / max(sum(priority), 1e-300)
    p = [min(max(scale * one, lo), hi) for one in priority]
    for _ in range(1000):
        residue = rho * count - sum(p)
        inside = [i for i in range(count) if lo < p[i] < hi]
        movable = [i for i in range(count) if (p[i] < hi if residue > 0 else p[i] > lo)]
        free = inside or movable  # the bounds give way only where nothing else can
        if abs(residue) < 1e-12 or not free:
            break
        weight = sum(priority[i] for i in free)
        for i in free:
            share = priority[i] / weight if weight > 0 else 1 / len(free)
            p[i] = min(max(p[i] + residue * share, lo), hi)
    return p


def _allocate(layers: Sequence[LayerView], found: Sequence[float | None], keep: int) -> list[int]:
    sensitivity = [one for one in found if one is not None]
    if len(sensitivity) != len(layers):
        raise RuntimeError("this budget needs the sensitivity statistic of every layer")
    widths = [layer.width for layer in layers]
    rho = 1 - keep / sum(widths)
    p = depth_sparsities(sensitivity, [layer.depth for layer in layers], rho)
    return round_counts([(1 - s) * w for s, w in zip(p, widths, strict=True)], widths, keep)


@budget(_SOURCE, needs=["sensitivity"])
def depth(layers: Sequence[LayerView], keep: int) -> list[int]:
    """Layers whose FFN output resembles its input lose more, under a fixed depth profile."""
    return _allocate(layers, [layer.sensitivity for layer in layers], keep)


@budget(_SOURCE + ", with the residual stream after the FFN", needs=["sensitivity-residual"])
def depth_residual(layers: Sequence[LayerView], keep: int) -> list[int]:
    """The same with the change that the FFN makes to the residual stream."""
    return _allocate(layers, [layer.residual_sensitivity for layer in layers], keep)
