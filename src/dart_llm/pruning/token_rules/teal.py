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
    """Every token's largest inputs of each matrix of the FFN.

    ``W x`` becomes ``W s(x)``, where s keeps the entries of largest ``abs(x_j)`` and sets the
    others to 0: x of gate and up, u of down (arXiv 2408.14690).
    """

    selects_neurons: ClassVar[bool] = False

    @classmethod
    def selection_bytes(cls, config: TokenConfig, cost: LayerCost) -> float:
        """Inputs of gate and up beyond the winners' share, which is rounded up."""
        layer = cost.layer
        if cost.computed == layer.width:
            return 0.0
        count = input_count(layer.hidden, cost.winners, layer.width)
        excess = count - layer.hidden * cost.winners / layer.width
        inputs = stored_bytes(layer.stored_up, cost.width) / layer.hidden
        return (len(layer.matrices) - 1) * inputs * excess

    def hidden(self, fed: Tensor, mask: LayerMask | None) -> Tensor:
        """[B, T, I]; with a sequence mask: its neurons alone, from all inputs."""
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
        """The inputs x [..., M] of ``matrix`` [N, M]; only the largest under a ``TokenMask``.

        ``key``: identifies the matrix in a cache of norms.
        """
        if not isinstance(mask, TokenMask):
            return x
        count = input_count(x.shape[-1], mask.winners, mask.width)
        return at_largest(x, count, self.input_norms(key, matrix))

    def input_norms(self, key: Hashable, matrix: Tensor) -> Tensor | None:
        """Factors on the inputs' magnitudes, [M]; None: ones."""
        return None


class TealAttention(Teal):
    """Every token's largest inputs of each matrix of FFN and attention."""

    attention = True
