"""Layer budgets: how many neurons each layer keeps (docs/reference.md, "Budgets").

A budget is one function ``(layers, keep) -> keep counts``.  The keep counts, one per layer, are
whole numbers that sum to ``keep``.  Budgets run on the host in float64, so that the counts are the
same for all executors and devices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dart_llm.pruning.masks import floor_count, largest


@dataclass(frozen=True)
class LayerView:
    """The data of one layer that budgets use; tensors are float64 on the host.

    ``width``: number of neurons I.  ``depth``: 0 for the first layer, 1 for the last.  ``score``:
    [I], the neurons' scores.  ``sensitivity``: S_l, which measures how much the FFN changes its
    input, for the budget ``depth``; None if no budget of the run needs it.
    """

    width: int
    depth: float
    score: Tensor
    sensitivity: float | None = None


Allocate = Callable[[Sequence[LayerView], int], list[int]]


@dataclass(frozen=True)
class Budget:
    """A budget's function, the statistics that the function ``needs``, and the budget's source.

    ``needs``: empty, or ``sensitivity``.
    """

    function: Allocate
    needs: frozenset[str]
    source: str

    def __call__(self, layers: Sequence[LayerView], keep: int) -> list[int]:
        """Keep counts, one per layer, each from 1 to the layer's width; they sum to ``keep``."""
        return self.function(layers, keep)


def budget(source: str, needs: Sequence[str] = ()) -> Callable[[Allocate], Budget]:
    """Turn a function ``(layers, keep) -> counts`` into a ``Budget``."""
    return lambda function: Budget(function, frozenset(needs), source)


def round_counts(wanted: Sequence[float], widths: Sequence[int], keep: int) -> list[int]:
    """Round ``wanted`` by largest remainder to whole counts in 1..width that sum to ``keep``.

    In ties, lower layers are changed first.  ``keep`` is clipped to the range that the widths
    allow.
    """
    keep = min(max(keep, len(widths)), sum(widths))
    clipped = [
        min(max(want, 1.0), float(width)) for want, width in zip(wanted, widths, strict=True)
    ]
    counts = [int(want) for want in clipped]
    while (missing := keep - sum(counts)) != 0:
        sign = 1 if missing > 0 else -1
        free = [
            layer
            for layer, width in enumerate(widths)
            if (counts[layer] < width if sign > 0 else counts[layer] > 1)
        ]
        free.sort(key=lambda layer: (-sign * (clipped[layer] - counts[layer]), layer))
        for layer in free[: abs(missing)]:
            counts[layer] += sign
    return counts


def blend_counts(first: Sequence[int], second: Sequence[int], widths: Sequence[int]) -> list[int]:
    """Keep counts halfway between two allocations that have the same total."""
    wanted = [(a + b) / 2 for a, b in zip(first, second, strict=True)]
    return round_counts(wanted, widths, sum(first))


@budget("GRIFFIN, arXiv 2404.01365: the same share in every layer")
def uniform(layers: Sequence[LayerView], keep: int) -> list[int]:
    """Every layer keeps the same share."""
    widths = [layer.width for layer in layers]
    return round_counts([keep / sum(widths) * width for width in widths], widths, keep)


@budget("this project; docs/reference.md")
def energy(layers: Sequence[LayerView], keep: int) -> list[int]:
    """Each layer keeps the fewest neurons that have a share e of its energy, the same e for all.

    Energy is the sum of the squared scores.  Each layer keeps at least 10 % of its neurons.
    """
    reached = []
    for layer in layers:
        squares = layer.score.square().sort(descending=True).values
        total = squares.sum()
        before = squares.cumsum(0) - squares
        # a layer whose scores are all zero ranks last, except for the neurons that it must keep
        reached.append(before / total if total > 0 else torch.ones_like(squares))
    return _smallest(reached, keep)


@budget("this project; docs/reference.md: for scores whose values compare between layers")
def ranked(layers: Sequence[LayerView], keep: int) -> list[int]:
    """All neurons of all layers are in one ranking, by their unscaled scores.

    Each layer keeps at least 10 % of its neurons.
    """
    return _smallest([-layer.score for layer in layers], keep)


@budget("FLAP, arXiv 2312.11983: standardised metrics in one ranking")
def standardized(layers: Sequence[LayerView], keep: int) -> list[int]:
    """All neurons are in one ranking, with each layer's scores scaled to mean 0 and deviation 1.

    Each layer keeps at least 10 % of its neurons.
    """
    ranked = []
    for layer in layers:
        spread = layer.score.std(correction=0).clamp_min(1e-300)
        ranked.append((layer.score.mean() - layer.score) / spread)
    return _smallest(ranked, keep)


def _smallest(values: Sequence[Tensor], keep: int) -> list[int]:
    """For each layer, how many of its ``values`` are among the ``keep`` smallest of all layers.

    Each layer first gets its floor, 10 % of its neurons.  If ``keep`` is less than the sum of the
    floors, all layers keep the same share.
    """
    widths = [len(value) for value in values]
    floors = [floor_count(width) for width in widths]
    if sum(floors) > keep:
        return round_counts([keep * width / sum(widths) for width in widths], widths, keep)
    flat = torch.cat(
        [
            value.index_fill(0, value.topk(floor, largest=False, sorted=False).indices, -torch.inf)
            for value, floor in zip(values, floors, strict=True)
        ]
    )
    return [int(part.sum()) for part in torch.split(largest(-flat, keep), widths)]


# The budget of the published DART scripts: a layer's sensitivity times a fixed profile over depth.


def depth_profile(y: float) -> float:
    """Factor D at relative depth ``y`` = l / (L - 1): lower in the first 30 % and last 15 %."""
    if y < 0.3:
        return 0.25 + 0.75 * y / 0.3
    if y > 0.85:
        return 0.35 + 0.65 * (1 - y) / 0.15
    return 1.0


def depth_sparsities(
    sensitivity: Sequence[float], depths: Sequence[float], rho: float
) -> list[float]:
    """The layers' sparsities p, with mean ``rho``, from sensitivities S and depth factors D.

    ``R = 1 - (S - min S) / (max S - min S + 1e-6)``, ``P = R * D``,
    ``p = clip(rho L P / sum P, lo, hi)``, with L layers, lo = min(0.1, rho), hi = max(0.9, rho).
    Then the missing sparsity is distributed in proportion to P over the layers that are not at a
    bound (lo or hi), until the mean is exact.
    """
    count = len(sensitivity)
    if count == 1 or rho == 0:
        return [rho] * count
    low, high = min(sensitivity), max(sensitivity)
    robust = [1 - (s - low) / (high - low + 1e-6) for s in sensitivity]
    priority = [r * depth_profile(y) for r, y in zip(robust, depths, strict=True)]
    lo, hi = min(0.1, rho), max(0.9, rho)
    scale = rho * count / max(sum(priority), 1e-300)
    p = [min(max(scale * value, lo), hi) for value in priority]
    for _ in range(1000):
        residue = rho * count - sum(p)
        inside = [i for i in range(count) if lo < p[i] < hi]
        movable = [i for i in range(count) if (p[i] < hi if residue > 0 else p[i] > lo)]
        free = inside or movable  # layers at a bound change only if all layers are at a bound
        if abs(residue) < 1e-12 or not free:
            break
        weight = sum(priority[i] for i in free)
        for i in free:
            share = priority[i] / weight if weight > 0 else 1 / len(free)
            p[i] = min(max(p[i] + residue * share, lo), hi)
    return p


@budget("DART, arXiv 2601.22632, the published scripts' allocator", needs=["sensitivity"])
def depth(layers: Sequence[LayerView], keep: int) -> list[int]:
    """Layers whose FFN output resembles its input lose more; first and last layers lose less."""
    sensitivity = [layer.sensitivity for layer in layers if layer.sensitivity is not None]
    if len(sensitivity) != len(layers):
        raise RuntimeError("budget depth needs the sensitivity statistic of every layer")
    widths = [layer.width for layer in layers]
    rho = 1 - keep / sum(widths)
    p = depth_sparsities(sensitivity, [layer.depth for layer in layers], rho)
    return round_counts([(1 - s) * w for s, w in zip(p, widths, strict=True)], widths, keep)
