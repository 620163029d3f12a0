"""Prox (arXiv 2607.27591)."""

from __future__ import annotations

import math

from torch import Tensor

from dart_llm.pruning.config import TokenConfig
from dart_llm.pruning.token_level import at_largest
from dart_llm.pruning.token_rules.low_bit import LowBit
from dart_llm.pruning.token_rules.rule import TokenRule


class Prox(LowBit):
    """Each token selects neurons by low-bit proxies, multiplied with its largest inputs only.

    ``u~ = act(gate~ x~) * (up~ x~)``, where x~ keeps the share ``inputs`` of the entries of x,
    those with the largest ``abs(x_j)``, and gate~, up~ are proxies (arXiv 2607.27591).
    """

    native = False
    options = LowBit.options | {"inputs"}

    @classmethod
    def for_weights(cls, config: TokenConfig, quantized: bool) -> type[TokenRule]:
        return cls

    def estimate(self, fed: Tensor, ids: Tensor | None = None) -> Tensor:
        count = math.ceil(self.config.inputs * fed.shape[-1])
        return super().estimate(at_largest(fed, count), ids)
