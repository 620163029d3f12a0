"""The rule of ``dart-token``: low-bit proxies, or quantized weights, rank the neurons."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from dart_llm.pruning.config import TokenConfig
from dart_llm.pruning.token_level import SCALE_BYTES, TokenMask, contribution_estimate, low_bit
from dart_llm.pruning.token_rules.rule import NORM_BYTES, LayerCost, TokenRule
from dart_llm.pruning.weights import norms_of


class LowBit(TokenRule):
    """Each token selects neurons by low-bit proxies of gate and up."""

    native = True
    compensates = True
    options = frozenset({"proxy", "bits", "group"})

    @classmethod
    def for_weights(cls, config: TokenConfig, quantized: bool) -> type[TokenRule]:
        return ByActivations if quantized and config.proxy == "auto" else cls

    @classmethod
    def selection_bytes(cls, config: TokenConfig, cost: LayerCost) -> float:
        """Bytes of norms, of all scales, and of low-bit values for the share ``config.inputs``."""
        inputs, matrices = cost.layer.hidden, len(cost.layer.matrices) - 1
        levels = math.ceil(math.ceil(config.inputs * inputs) * config.bits / 8)
        row = levels + SCALE_BYTES * math.ceil(inputs / config.group)
        return cost.layer.width * (matrices * row + NORM_BYTES)

    def prepare(self) -> None:
        *inputs, down = self.block.matrices()
        parts = [part.detach() for part in inputs if part is not None]
        config = self.config
        self.proxies = tuple(low_bit(part, config.bits, config.group) for part in parts)
        self.norms = norms_of(down.detach(), 0)

    def estimate(self, fed: Tensor, ids: Tensor | None = None) -> Tensor:
        """Activations u~ of neurons ``ids`` (None: all), [..., n], estimated by the proxies."""
        products = [proxy.product(fed, ids) for proxy in self.proxies]
        for number, bias in enumerate(self.block.biases()[2 - len(products) : 2]):
            if bias is not None:
                products[number] += bias if ids is None else bias[ids]
        act: Callable[[Tensor], Tensor] = self.block.act
        return act(products[0]) * products[1] if len(products) == 2 else act(products[0])

    def saliency(self, mask: TokenMask) -> Tensor:
        """Factor by which each neuron's activation is multiplied to rank it, [I] float32."""
        return self.norms if mask.saliency is None else mask.saliency

    def strengths(self, fed: Tensor, u: Tensor | None, mask: TokenMask) -> Tensor:
        ids, saliency = mask.candidates, self.saliency(mask)
        saliency = saliency if ids is None else saliency[ids]
        return contribution_estimate(self.estimate(fed, ids), saliency)

    def nbytes(self) -> int:
        return self.norms.nbytes + super().nbytes()


class ByActivations(LowBit):
    """Each token selects neurons by exact activations, computed from quantized gate and up."""

    by_weights = True

    @classmethod
    def selection_bytes(cls, config: TokenConfig, cost: LayerCost) -> float:
        """Bytes of rows of unselected neurons, all of gate and up, and of a norm per neuron."""
        *inputs, down = cost.layer.matrices
        read = (*inputs, down) if cost.reads_all else inputs
        return cost.ranking_rows(*read) + NORM_BYTES * cost.layer.width

    def prepare(self) -> None:
        self.norms = norms_of(self.block.matrices()[-1].detach(), 0)

    def strengths(self, fed: Tensor, u: Tensor | None, mask: TokenMask) -> Tensor:
        u = (self.block.hidden(fed) if u is None else u).float()
        ids, saliency = mask.candidates, self.saliency(mask)
        if ids is not None:
            u, saliency = u[..., ids], saliency[ids]
        return contribution_estimate(u, saliency)
