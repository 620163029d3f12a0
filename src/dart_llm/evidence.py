"""What is remembered of the observed tokens: weighted sums per layer, float32, detached.

Token weights are 1 for a real token of a live row and 0 for padding and finished rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dart_llm.scores import EPS

REFERENCE_TOKENS = 256
"""Decayed evidence weighs at most as much as this many tokens before the decay."""


def full_precision(t: Tensor) -> contextlib.AbstractContextManager[object]:
    """Inside, products on the device of ``t`` are not rounded by an autocast of the caller's."""
    kind = t.device.type
    if t.is_meta or not torch.is_autocast_enabled(kind):
        return contextlib.nullcontext()
    return torch.autocast(kind, enabled=False)


@dataclass
class Sum:
    """A weighted sum over tokens and its weight."""

    total: Tensor
    weight: Tensor | float = 0.0

    @property
    def divisor(self) -> Tensor | float:
        """The weight, never 0."""
        weight = self.weight
        return weight.clamp_min(EPS) if isinstance(weight, Tensor) else max(weight, EPS)

    @property
    def mean(self) -> Tensor:
        """The weighted mean."""
        return self.total / self.divisor

    def rows(self, ids: Tensor) -> Tensor:
        """The weighted means of some rows, [n, ...]; ids: [n] int64."""
        return self.total.index_select(0, ids) / self.divisor


@dataclass
class LayerEvidence:
    """Named sums of one layer: ``score`` [I], ``signed`` [I], ``squares`` [I] and scalars.

    ``lost`` [I] holds the activations of neurons where a token would not choose them, ``losses``
    [I] how often that was.  For low-rank compensation also ``features`` [r], ``moments`` [r, r]
    and ``cross`` [I, r].
    """

    sums: dict[str, Sum] = field(default_factory=dict)

    def add(self, name: str, values: Tensor, weights: Tensor | None) -> None:
        """Add per-token ``values`` [T] or [T, I]; ``weights``: [T] or None for all ones."""
        add_sums([self], name, values[None], weights)

    def more(self, name: str, part: Tensor, weight: Tensor | float) -> None:
        """Add a sum over tokens and its weight."""
        known = self.sums.get(name)
        if known is None:
            self.sums[name] = Sum(part, weight)
        else:
            known.total += part
            known.weight = known.weight + weight

    def add_ema(self, values: Tensor, decay: float, weights: Tensor | None) -> None:
        """``s <- d s + a`` over the tokens of [B, T, I] in order, rows summed."""
        tokens = values.shape[1]
        if weights is None:
            later = torch.arange(tokens - 1, -1, -1, device=values.device)
            factors = (decay ** later.float()).expand(len(values), tokens)
            shift: Tensor | float = float(decay**tokens)
        else:
            alive = weights.amax(0)
            later = alive.flip(0).cumsum(0).flip(0) - alive
            factors = decay**later * weights
            shift = decay ** alive.sum()
        with full_precision(values):
            part, weight = torch.einsum("bt,bti->i", factors, values), factors.sum()
        known = self.sums.get("score")
        if known is None:
            self.sums["score"] = Sum(part, weight)
        else:
            known.total = known.total * shift + part
            known.weight = known.weight * shift + weight

    def fade(self, decay: float, rows: int) -> None:
        """Scale all sums by ``decay * min(1, 256 / n)``, n = tokens per row seen so far."""
        for known in self.sums.values():
            if isinstance(known.weight, float):
                factor: Tensor | float = decay * min(
                    1.0, REFERENCE_TOKENS * rows / max(known.weight, EPS)
                )
            else:
                ratio = REFERENCE_TOKENS * rows / known.weight.clamp_min(EPS)
                factor = decay * ratio.clamp_max(1.0)
            known.total = known.total * factor
            known.weight = known.weight * factor

    def mean_when_lost(self) -> Tensor:
        """Mean activation of each neuron over the tokens that would leave it out, [I]."""
        return self.sums["lost"].total / self.sums["losses"].total.clamp_min(EPS)

    def nbytes(self) -> int:
        return sum(known.total.numel() * known.total.element_size() for known in self.sums.values())


Layers = Sequence[LayerEvidence]
"""What is remembered of some layers, in the order of the first dimension of what is added."""


def add_sums(evidence: Layers, name: str, values: Tensor, weights: Tensor | None) -> None:
    """Add per-token values [L, T] or [L, T, I] of some layers; weights: [T] or None."""
    weight: Tensor | float = float(values.shape[1]) if weights is None else weights.sum()
    if weights is None:
        parts = values.sum(1)
    else:
        with full_precision(values):
            parts = torch.einsum("t,lt...->l...", weights, values)
    add_parts(evidence, name, parts, weight)


def add_parts(evidence: Layers, name: str, parts: Tensor, weight: Tensor | float) -> None:
    """Add sums over tokens [L, ...] of some layers, and the tokens' weight."""
    for one, part in zip(evidence, parts.unbind(0), strict=True):
        one.more(name, part, weight)
