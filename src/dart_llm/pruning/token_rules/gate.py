"""The gate's exact output, times what a neuron's other weights usually make of it."""

from __future__ import annotations

from torch import Tensor

from dart_llm.pruning.config import TokenConfig
from dart_llm.pruning.statistics import UP
from dart_llm.pruning.token_level import TokenMask, contribution_estimate
from dart_llm.pruning.token_rules.cats import Cats
from dart_llm.pruning.token_rules.rule import NORM_BYTES, LayerCost
from dart_llm.pruning.weights import norms_of


class Gate(Cats):
    """Each token selects neurons by the exact gate, times learned factors of up and down.

    As ``Cats``, with the k largest ``abs(v_i) * rms(up_i) * norm(W_down[:, i])``, where rms(up_i)
    is the root mean square of the up projection over self-generated text.
    """

    learns = UP

    @classmethod
    def selection_bytes(cls, config: TokenConfig, cost: LayerCost) -> float:
        return super().selection_bytes(config, cost) + NORM_BYTES * cost.layer.width

    def prepare(self) -> None:
        self.norms = norms_of(self.block.matrices()[-1].detach(), 0)

    def strengths(self, fed: Tensor, u: Tensor | None, mask: TokenMask) -> Tensor:
        saliency = self.norms if mask.saliency is None else mask.saliency
        return contribution_estimate(super().strengths(fed, u, mask), saliency)

    def nbytes(self) -> int:
        return self.norms.nbytes
