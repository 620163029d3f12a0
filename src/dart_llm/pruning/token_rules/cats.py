"""CATS (arXiv 2404.08763)."""

from __future__ import annotations

from torch import Tensor

from dart_llm.pruning.config import TokenConfig
from dart_llm.pruning.token_level import TokenMask
from dart_llm.pruning.token_rules.rule import LayerCost, TokenRule


class Cats(TokenRule):
    """Each token selects neurons by the exact gate (by u in an FFN without a gate).

    ``v = act(W_gate x)``; ``z = W_down[:, S] (v_S * (W_up[S] x))`` with S the k largest
    ``abs(v_i)`` (arXiv 2404.08763).
    """

    @classmethod
    def selection_bytes(cls, config: TokenConfig, cost: LayerCost) -> float:
        gate = cost.layer.gate
        return cost.ranking_rows(cost.layer.stored_up if gate is None else gate)

    def strengths(self, fed: Tensor, u: Tensor | None, mask: TokenMask) -> Tensor:
        block = self.block
        v: Tensor = block.act(block.up_of(fed) if block.plain else block.gate_of(fed))
        return v.abs()
