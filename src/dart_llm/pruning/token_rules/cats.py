"""CATS (arXiv 2404.08763)."""

from __future__ import annotations

from torch import Tensor

from dart_llm.pruning.config import TokenConfig
from dart_llm.pruning.token_level import TokenMask
from dart_llm.pruning.token_rules.rule import LayerCost, TokenRule


class Cats(TokenRule):
    """Winners of every token by the exact gate (in a plain FFN: by u)."""

    @classmethod
    def selection_bytes(cls, config: TokenConfig, cost: LayerCost) -> float:
        gate = cost.layer.stored_up if cost.layer.gate is None else cost.layer.gate
        return cost.stored(gate) * (1 - cost.computed / cost.layer.width)

    def strengths(self, fed: Tensor, u: Tensor | None, mask: TokenMask) -> Tensor:
        block = self.block
        return block.act(block.up_of(fed) if block.plain else block.gate_of(fed)).abs()
