"""What token-level selection costs: the low-bit copies, the ranking, the winners' rows.

Per token and layer with C candidates (docs/method.md, "Token-level tracing"): the product with the
copies counts like one with the dense gate and up, and the ranking C log2 C; of bytes, the copies'
rows with their scales, and 4 per candidate for norm(w).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dart_llm.config import TokenConfig
from dart_llm.life import Life
from dart_llm.low_bit import SCALE_BYTES
from dart_llm.token_select import TokenMask, candidate_count
from dart_llm.weights import FfnWeights

IF_COMPACT = "if compact"
"""Stands for an executor that reads each forward's winners once, from where they lie."""

READ_WINNERS = ("native", "slim")
"""Executors that read a single token's winners alone; the others compute all neurons."""

NORM_BYTES = 4


@dataclass(frozen=True)
class Work:
    """Neurons per layer: ``computed`` per token, ``read`` per forward."""

    computed: Sequence[int]
    read: Sequence[int]


@dataclass(frozen=True)
class TokenCosts:
    """Costs of one configuration on one model."""

    config: TokenConfig
    layers: tuple[FfnWeights, ...]

    @classmethod
    def of(cls, life: Life, layers: tuple[FfnWeights, ...]) -> TokenCosts | None:
        """None where the tokens of ``life`` do not choose for themselves."""
        given = life.given
        by_hand = given is not None and not any(isinstance(mask, TokenMask) for mask in given)
        return None if life.config.token is None or by_hand else cls(life.config.token, layers)

    def _candidates(self, kept: Sequence[int]) -> list[int]:
        """Neurons that are ranked for each token; 0 where there is nothing to choose."""
        share = self.config.candidates
        counts = [
            candidate_count(share, layer.width, keep)
            for layer, keep in zip(self.layers, kept, strict=True)
        ]
        return [n if n > keep else 0 for n, keep in zip(counts, kept, strict=True)]

    def chosen_once(self, kept: Sequence[int]) -> list[int]:
        """Neurons per layer that the sequence's mask keeps; 0 where every token chooses."""
        ranked = self._candidates(kept)
        return [0 if n else keep for n, keep in zip(ranked, kept, strict=True)]

    def flops(self, kept: Sequence[int]) -> int:
        """Of estimates and ranking, per token."""
        return sum(
            count * (2 * layer.hidden * _matrices(layer) + count.bit_length())
            for count, layer in zip(self._candidates(kept), self.layers, strict=True)
        )

    def bytes(self, kept: Sequence[int]) -> int:
        """Of copies and norms, per forward."""
        return sum(
            count * (_matrices(layer) * self._row_bytes(layer.up.shape[1]) + NORM_BYTES)
            for count, layer in zip(self._candidates(kept), self.layers, strict=True)
        )

    def _row_bytes(self, inputs: int) -> int:
        groups = math.ceil(inputs / self.config.group)
        return math.ceil(inputs * self.config.bits / 8) + SCALE_BYTES * groups

    def work(self, kept: Sequence[int], tokens: float, alone: bool, executor: str) -> Work:
        """The exact part of a period.  ``tokens``: per forward; ``alone``: of a single row.

        The native kernels read the winners of a forward of one token, where they lie; all else is
        dense.
        """
        widths = [layer.width for layer in self.layers]
        once = self.chosen_once(kept)
        if executor == IF_COMPACT:
            read = [
                k if one else min(width, math.ceil(k * tokens))
                for k, one, width in zip(kept, once, widths, strict=True)
            ]
            return Work(kept, read)
        if executor == "masked":
            return Work(widths, widths)
        if executor in READ_WINNERS and alone and tokens <= 1:
            return Work(kept, kept)
        every = [k or width for k, width in zip(once, widths, strict=True)]
        return Work(every, every)


def _matrices(layer: FfnWeights) -> int:
    """Matrices that are copied: gate and up, or fc."""
    return 1 if layer.gate is None else 2
