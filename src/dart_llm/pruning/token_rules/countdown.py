"""CountDown (arXiv 2505.17701)."""

from __future__ import annotations

from torch import Tensor

from dart_llm.pruning.config import TokenConfig
from dart_llm.pruning.token_level import TokenMask
from dart_llm.pruning.token_rules.rule import LayerCost, TokenRule


class Countdown(TokenRule):
    """Each token selects neurons by the exact up projection (by u in an FFN without a gate).

    ``s = W_up x``; ``z = W_down[:, S] (act(W_gate[S] x) * s_S)`` with S the k largest ``abs(s_i)``
    (arXiv 2505.17701, variant M).
    """

    @classmethod
    def selection_bytes(cls, config: TokenConfig, cost: LayerCost) -> float:
        return cost.ranking_rows(cost.layer.stored_up)

    def strengths(self, fed: Tensor, u: Tensor | None, mask: TokenMask) -> Tensor:
        up: Tensor = self.block.up_of(fed)
        s: Tensor = self.block.act(up) if self.block.plain else up
        return s.abs()
