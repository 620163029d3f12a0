"""The rule of ``dart-token``: low-bit proxies of gate and up rank the neurons."""

from __future__ import annotations

import math

from torch import Tensor

from dart_llm.pruning.config import TokenConfig
from dart_llm.pruning.token_level import (
    SCALE_BYTES,
    TokenMask,
    contribution_estimate,
    low_bit,
    squared_error,
)
from dart_llm.pruning.token_rules.rule import LayerCost, TokenRule
from dart_llm.pruning.weights import norms_of

NORM_BYTES = 4


class LowBit(TokenRule):
    """Winners of every token by low-bit proxies of gate and up."""

    native = True
    compensates = True
    options = frozenset({"proxy", "bits", "group", "candidates"})

    @classmethod
    def for_weights(cls, config: TokenConfig, blocks: bool) -> type[TokenRule]:
        return ByActivations if blocks and config.proxy == "auto" else cls

    @classmethod
    def describe(cls, config: TokenConfig) -> str:
        proxies = f"{config.bits}-bit proxies in groups of {config.group}"
        if cls.for_weights(config, blocks=True) is not cls:
            proxies += ", or by weights that are in blocks themselves"
        return f"winners of every token by {proxies}"

    @classmethod
    def selection_bytes(cls, config: TokenConfig, cost: LayerCost) -> float:
        """The rows of the proxies with all of their scales, and a norm per candidate."""
        inputs, matrices = cost.layer.hidden, len(cost.layer.matrices) - 1
        levels = math.ceil(math.ceil(config.inputs * inputs) * config.bits / 8)
        row = levels + SCALE_BYTES * math.ceil(inputs / config.group)
        return cost.candidates * (matrices * row + NORM_BYTES)

    def prepare(self) -> None:
        *inputs, down = self.block.matrices()
        parts = [part.detach() for part in inputs if part is not None]
        config = self.config
        self.proxies = tuple(low_bit(part, config.bits, config.group) for part in parts)
        self.error = [squared_error(*pair) for pair in zip(parts, self.proxies, strict=True)]
        self.norms = norms_of(down.detach(), 0)

    def estimate(self, fed: Tensor, ids: Tensor | None = None) -> Tensor:
        """u~ [..., n] float32 of the neurons ``ids`` (None: all), from the proxies alone."""
        made = [proxy.product(fed, ids) for proxy in self.proxies]
        for at, bias in enumerate(self.block.biases()[2 - len(made) : 2]):
            if bias is not None:
                made[at] += bias if ids is None else bias[ids]
        act = self.block.act
        return act(made[0]) if len(made) == 1 else act(made[0]) * made[1]

    def saliency(self, mask: TokenMask) -> Tensor:
        """What multiplies each neuron's activation, [I] float32."""
        return self.norms if mask.saliency is None else mask.saliency

    def strengths(self, fed: Tensor, u: Tensor | None, mask: TokenMask) -> Tensor:
        ids, saliency = mask.candidates, self.saliency(mask)
        saliency = saliency if ids is None else saliency[ids]
        return contribution_estimate(self.estimate(fed, ids), saliency)

    def nbytes(self) -> int:
        return self.norms.nbytes + super().nbytes()


class ByActivations(LowBit):
    """Winners of every token by exact activations, from weights that are in low-bit blocks."""

    by_weights = True

    @classmethod
    def selection_bytes(cls, config: TokenConfig, cost: LayerCost) -> float:
        """Gate and up of the candidates that lose, and a norm per candidate."""
        whole = sum(cost.stored(matrix) for matrix in cost.layer.matrices[:-1])
        return whole * cost.losers / cost.layer.width + NORM_BYTES * cost.candidates

    def prepare(self) -> None:
        self.norms = norms_of(self.block.matrices()[-1].detach(), 0)

    def strengths(self, fed: Tensor, u: Tensor | None, mask: TokenMask) -> Tensor:
        u = (self.block.hidden(fed) if u is None else u).float()
        ids, saliency = mask.candidates, self.saliency(mask)
        if ids is not None:
            u, saliency = u[..., ids], saliency[ids]
        return contribution_estimate(u, saliency)
