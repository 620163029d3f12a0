"""TEAL (arXiv 2408.14690)."""

from __future__ import annotations

from collections.abc import Hashable
from typing import ClassVar

from torch import Tensor

from dart_llm.pruning.config import TokenConfig
from dart_llm.pruning.masks import LayerMask
from dart_llm.pruning.token_level import TokenMask, at_largest, input_count
from dart_llm.pruning.token_rules.rule import LayerCost, TokenRule
from dart_llm.pruning.weights import stored_bytes


class Teal(TokenRule):
    """Each token selects the largest inputs of each matrix of the FFN.

    ``W x`` becomes ``W s(x)``, where s keeps the entries with the largest ``abs(x_j)`` and sets the
    others to 0.  The inputs of gate and up are x, those of down are u (arXiv 2408.14690).
    """

    selects_neurons: ClassVar[bool] = False

    @classmethod
    def selection_bytes(cls, config: TokenConfig, cost: LayerCost) -> float:
        """Bytes of gate and up that are read only because the number of inputs is rounded up."""
        layer = cost.layer
        if cost.computed == layer.width:
            return 0.0
        count = input_count(layer.hidden, cost.winners, layer.width)
        excess = count - layer.hidden * cost.winners / layer.width
        per_input = stored_bytes(layer.stored_up, cost.weight_bytes) / layer.hidden
        return (len(layer.matrices) - 1) * per_input * excess

    def hidden(self, fed: Tensor, mask: LayerMask | None) -> Tensor:
        """The down projection's input u, [B, T, I]; only a ``TokenMask`` restricts the inputs."""
        block, (gate, up, down) = self.block, self.block.matrices()
        u: Tensor = block.up_of(self.largest(fed, mask, "up", up))
        if gate is None:
            u = block.act(u)
        else:
            u = u * block.act(block.gate_of(self.largest(fed, mask, "gate", gate)))
        if mask is None or isinstance(mask, TokenMask):
            return self.largest(u, mask, "down", down)
        return u * mask.dense(u.dtype).to(u.device)

    def largest(self, x: Tensor, mask: LayerMask | None, key: Hashable, matrix: Tensor) -> Tensor:
        """The inputs x [..., M] of ``matrix`` [N, M]; under a ``TokenMask``, only the largest.

        ``key`` identifies the matrix in a cache of norms.
        """
        if not isinstance(mask, TokenMask):
            return x
        count = input_count(x.shape[-1], mask.winners, mask.width)
        return at_largest(x, count, self.input_norms(key, matrix))

    def input_norms(self, key: Hashable, matrix: Tensor) -> Tensor | None:
        """Factors by which the inputs' magnitudes are multiplied to rank them, [M]; None: all 1."""
        return None


class TealAttention(Teal):
    """Each token selects the largest inputs of each matrix of the FFN and of attention."""

    attention = True
