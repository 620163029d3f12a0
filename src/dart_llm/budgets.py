"""Layer budgets: how many neurons each layer keeps (docs/method.md, "Budgets").

A budget is one function ``(layers, keep) -> keep counts``: whole numbers that sum to ``keep``.
Everything here runs on the host in float64, so that all executors and devices agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dart_llm.linear_time import largest

FLOOR = 0.1
"""Share of its neurons that rankings over all layers and ``auto`` leave in every layer."""


@dataclass(frozen=True)
class LayerView:
    """What a budget may look at.  All tensors on the host, float64.

    ``width``: neurons I; ``depth``: 0 for the first layer, 1 for the last.
    ``score``: [I]; ``sensitivity`` and ``residual_sensitivity``: S_l of ``depth`` and of
    ``depth-residual``; ``impact``: [I], the output energy of each neuron relative to the residual
    stream.  What no budget of the run needs is None.
    """

    width: int
    depth: float
    score: Tensor
    sensitivity: float | None = None
    residual_sensitivity: float | None = None
    impact: Tensor | None = None


@dataclass(frozen=True)
class Budget:
    """An allocator and the statistics that it needs: ``sensitivity``, ``sensitivity-residual``,
    ``squares``, or none.  ``source``: the paper and the formula.
    """

    function: Callable[[Sequence[LayerView], int], list[int]]
    needs: frozenset[str]
    source: str

    def __call__(self, layers: Sequence[LayerView], keep: int) -> list[int]:
        """Keep counts, one per layer, each in 1..width, summing to ``keep``."""
        return self.function(layers, keep)

    @property
    def summary(self) -> str:
        """First line of the function's docstring."""
        return (self.function.__doc__ or "").split("\n")[0]


def budget(
    source: str, needs: Sequence[str] = ()
) -> Callable[[Callable[[Sequence[LayerView], int], list[int]]], Budget]:
    """Turn a function ``(layers, keep) -> counts`` into a ``Budget``."""

    def wrap(function: Callable[[Sequence[LayerView], int], list[int]]) -> Budget:
        return Budget(function, frozenset(needs), source)

    return wrap


def floor_count(width: int) -> int:
    """The fewest neurons that are at least 10 % of a layer, for what must stay in every layer."""
    return math.ceil(FLOOR * width - 1e-9)


def round_counts(wanted: Sequence[float], widths: Sequence[int], keep: int) -> list[int]:
    """Whole counts in 1..width that sum to ``keep``, by largest remainder; ties: lower layer.

    ``keep`` is clipped to what the bounds allow.
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


def align_counts(counts: Sequence[int], widths: Sequence[int], multiple: int) -> list[int]:
    """Counts moved to multiples of ``multiple`` (the full width is always allowed).

    The total moves by less than one multiple per layer.
    """
    if multiple <= 1:
        return list(counts)
    units = [math.ceil(width / multiple) for width in widths]
    wanted = [
        _in_units(count, width, multiple) for count, width in zip(counts, widths, strict=True)
    ]
    aligned = round_counts(wanted, units, round(sum(wanted)))
    return [min(unit * multiple, width) for unit, width in zip(aligned, widths, strict=True)]


def _in_units(count: int, width: int, multiple: int) -> float:
    """``count`` in units of ``multiple``; the last unit holds what is left of the width."""
    whole = math.ceil(width / multiple) - 1
    if count <= whole * multiple:
        return count / multiple
    return whole + (count - whole * multiple) / (width - whole * multiple)


def blend_counts(first: Sequence[int], second: Sequence[int], widths: Sequence[int]) -> list[int]:
    """The mean of two allocations with the same total."""
    wanted = [(a + b) / 2 for a, b in zip(first, second, strict=True)]
    return round_counts(wanted, widths, sum(first))


@budget("GRIFFIN, arXiv 2404.01365: the same share in every layer")
def uniform(layers: Sequence[LayerView], keep: int) -> list[int]:
    """Every layer keeps the same share."""
    share = keep / sum(layer.width for layer in layers)
    return round_counts([share * layer.width for layer in layers], _widths(layers), keep)


@budget("this project; docs/method.md")
def energy(layers: Sequence[LayerView], keep: int) -> list[int]:
    """One level e: each layer keeps the fewest neurons that hold the share e of its energy.

    Energy is the summed squared score; at least 10 % of a layer stay.
    """
    reached = []
    for layer in layers:
        squares = layer.score.square().sort(descending=True).values
        total = squares.sum()
        before = squares.cumsum(0) - squares
        # no neuron is needed to hold a share of nothing: an all-zero layer keeps its floor first
        reached.append(before / total if total > 0 else torch.ones_like(squares))
    return _smallest(reached, keep)


@budget("this project, after FLAP (arXiv 2312.11983); docs/method.md", needs=["squares"])
def global_rank(layers: Sequence[LayerView], keep: int) -> list[int]:
    """All neurons in one ranking by output energy relative to the residual stream.

    At least 10 % of a layer stay.
    """
    ranked = []
    for layer in layers:
        if layer.impact is None:
            raise RuntimeError("budget global needs the squares statistic")
        ranked.append(-layer.impact)
    return _smallest(ranked, keep)


@budget("this project; docs/method.md: for scores whose values compare between layers")
def ranked(layers: Sequence[LayerView], keep: int) -> list[int]:
    """All neurons in one ranking by the score itself, as it is.

    At least 10 % of a layer stay.
    """
    return _smallest([-layer.score for layer in layers], keep)


@budget("FLAP, arXiv 2312.11983: standardised metrics in one ranking")
def standardized(layers: Sequence[LayerView], keep: int) -> list[int]:
    """All neurons in one ranking, after each layer's scores got mean 0 and deviation 1.

    At least 10 % of a layer stay.
    """
    ranked = []
    for layer in layers:
        spread = layer.score.std(correction=0).clamp_min(1e-300)
        ranked.append((layer.score.mean() - layer.score) / spread)
    return _smallest(ranked, keep)


def _smallest(values: Sequence[Tensor], keep: int) -> list[int]:
    """Count, per layer, the ``keep`` smallest of ``values``; each layer's floor comes first.

    A ``keep`` below the sum of the floors is spread evenly.
    """
    widths = [len(value) for value in values]
    floors = [floor_count(width) for width in widths]
    if sum(floors) > keep:
        return round_counts([keep * width / sum(widths) for width in widths], widths, keep)
    flat = torch.cat(
        [
            value.index_fill(0, value.topk(floor, largest=False).indices, -torch.inf)
            for value, floor in zip(values, floors, strict=True)
        ]
    )
    chosen = largest(-flat, keep)
    return [int(part.sum()) for part in torch.split(chosen, widths)]


def _widths(layers: Sequence[LayerView]) -> list[int]:
    return [layer.width for layer in layers]
