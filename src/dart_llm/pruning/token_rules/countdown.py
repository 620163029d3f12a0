"""CountDown (arXiv 2505.17701), variant M."""

from __future__ import annotations

from torch import Tensor

from dart_llm.pruning.config import TokenConfig
from dart_llm.pruning.token_level import TokenMask
from dart_llm.pruning.token_rules.rule import LayerCost, TokenRule


class Countdown(TokenRule):
    """Winners of every token by the exact up projection (in a plain FFN: by u)."""

    @classmethod
    def selection_bytes(cls, config: TokenConfig, cost: LayerCost) -> float:
        return cost.stored(cost.layer.stored_up) * (1 - cost.computed / cost.layer.width)

    def strengths(self, fed: Tensor, u: Tensor | None, mask: TokenMask) -> Tensor:
        up = self.block.up_of(fed)
        return (self.block.act(up) if self.block.plain else up).abs()
